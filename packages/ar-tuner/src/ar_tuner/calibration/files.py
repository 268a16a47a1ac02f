"""Records of local files and directories, read one at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ar_tuner.calibration.optional import load
from ar_tuner.calibration.records import CHAT_KEYS, TEXT_KEYS
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

SUFFIXES = (".parquet", ".jsonl", ".json", ".txt")


def is_local(name: str) -> bool:
    """Tell whether a name means a file or directory: it looks like one or is there."""
    return Path(name).suffix.lower() in SUFFIXES or _kind(name) is not None


def is_file(name: str) -> bool:
    """Tell whether a text is the whole name of a file that is there."""
    return _kind(name) == "file"


def _kind(name: str) -> str | None:
    path = Path(name).expanduser()
    try:
        return "file" if path.is_file() else "other" if path.exists() else None
    except (OSError, ValueError):  # no name of a file: too long, or with a zero byte
        return None


def read_path(path: Path, *, splits: Sequence[str] = ()) -> Iterator[Any]:
    """Return the records of a file or directory; what cannot be opened is refused at once.

    Args:
        path: .txt (paragraphs), .json, .jsonl or .parquet; a directory of such files (of the
            first kind it holds in the order .parquet, .jsonl, .json, .txt); or a set saved by
            `datasets`' save_to_disk.
        splits: parts that are meant: lists of a .json object, files or folders of a directory
            that begin with the name, splits of a saved set.

    Raises:
        TunerError: no such file or split, or an unknown kind of file; while reading: a file
            that cannot be read.
    """
    path = path.expanduser()
    if path.is_dir():
        return _directory(path, splits)
    if not path.is_file():
        msg = f"calibration file {str(path)!r} does not exist"
        raise TunerError(msg)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        msg = f"calibration file {str(path)!r}: use one of {', '.join(SUFFIXES)}"
        raise TunerError(msg)
    if splits and suffix != ".json":
        msg = (
            f"calibration file {str(path)!r} has no splits, so split={'+'.join(splits)} means "
            "nothing: leave it out, or give a .json object of lists or a directory"
        )
        raise TunerError(msg)
    return _guarded(path, splits)


def _guarded(path: Path, splits: Sequence[str]) -> Iterator[Any]:
    readers: dict[str, Callable[[Path], Iterable[Any]]] = {
        ".parquet": _parquet,
        ".jsonl": _lines,
        ".txt": _paragraphs,
    }
    reader = readers.get(path.suffix.lower())
    try:
        yield from _json(path, splits) if reader is None else reader(path)
    except (UnicodeDecodeError, ValueError, OSError) as error:
        msg = f"calibration file {str(path)!r} cannot be read: {error}"
        raise TunerError(msg) from error


def _paragraphs(path: Path) -> Iterator[str]:
    part: list[str] = []
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                part.append(line)
            elif part:
                yield "".join(part).rstrip("\n")
                part = []
    if part:
        yield "".join(part).rstrip("\n")


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as lines:  # a file's lines do not end at U+2028
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _parquet(path: Path) -> Iterator[Any]:
    parquet = load("pyarrow.parquet", f"calibration file {str(path)!r}")
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _json(path: Path, splits: Sequence[str]) -> Iterator[Any]:
    """Yield the records of a list, of an object of lists (its splits), or of one by name."""
    value = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(value, dict):
        lists = {} if _is_record(value) else {k: v for k, v in value.items() if isinstance(v, list)}
        lost = [name for name in splits if name not in lists]
        if lost:
            raise TunerError(_no_split(str(path), lost[0], lists))
        if lists:
            value = [record for name in splits or lists for record in lists[name]]
        else:
            value = [value] if _is_record(value) else list(value.values())
    elif splits:
        raise TunerError(_no_split(str(path), splits[0], ()))
    yield from value if isinstance(value, list) else [value]


def _is_record(value: dict[str, Any]) -> bool:
    """Tell a single record from an object that holds many."""
    if any(isinstance(value.get(key), str) for key in TEXT_KEYS):
        return True
    ids = value.get("input_ids")
    if isinstance(ids, list):
        return not any(isinstance(item, (list, dict)) for item in ids)
    chats = [value[key] for key in CHAT_KEYS if isinstance(value.get(key), list)]
    return any(isinstance(m, dict) and ("role" in m or "from" in m) for m in sum(chats, []))


def _directory(path: Path, splits: Sequence[str]) -> Iterator[Any]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, splits)
    files: list[Path] = []
    for suffix in SUFFIXES:
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() == suffix and p.is_file())
        if files:
            break
    if not files:
        msg = f"calibration directory {str(path)!r} holds no {', '.join(SUFFIXES)} file"
        raise TunerError(msg)
    chosen: list[Path] = []
    for split in splits:
        begins = re.compile(rf"{re.escape(split)}(?=$|[-_.])")
        found = [p for p in files if any(begins.match(n) for n in p.relative_to(path).parts)]
        if not found:
            raise TunerError(_no_split(str(path), split, [p.name for p in files[:8]]))
        chosen += found
    return (record for file in chosen or files for record in _guarded(file, ()))


def _saved(path: Path, splits: Sequence[str]) -> Iterator[Any]:
    saved = load("datasets", f"calibration data {str(path)!r}").load_from_disk(str(path))
    if not isinstance(saved, dict):
        if splits:
            raise TunerError(_no_split(str(path), splits[0], ()))
        return iter(saved)
    for split in splits:
        if split not in saved:
            raise TunerError(_no_split(str(path), split, saved))
    return (record for name in splits or saved for record in saved[name])


def _no_split(where: str, split: str, known: Iterable[str]) -> str:
    names = ", ".join(known) or "none"
    return f"calibration data {where!r} has no split {split!r}. It has: {names}."
