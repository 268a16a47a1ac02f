"""Where calibration texts come from: files, lists, named sources, `datasets` names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ar_schemes import unknown_name
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
TEXT_KEYS = ("text", "content", "prompt", "input", "instruction")
OPTIONS = ("split", "num", "key")


@runtime_checkable
class DatasetSource(Protocol):
    """A named source of calibration texts."""

    @property
    def name(self) -> str:
        """What a user types."""

    def texts(self, *, split: str | None) -> Iterable[str]:
        """Return the texts, in an order that is always the same."""


class EmbeddedTexts:
    """Source `default`: plain English prose and code that ships with ar-tuner."""

    name = "default"

    def texts(self, *, split: str | None) -> Iterable[str]:  # noqa: ARG002
        """Return the texts."""
        return read_file(Path(__file__).with_name("default.jsonl"))


def texts_of(
    request: str | Path, known: Mapping[str, DatasetSource], *, allow_download: bool
) -> list[str]:
    """Return the texts a user names: `FILE`, `NAME` or either with `:split=train,num=512`.

    Raises:
        TunerError: no such file or source, no consent to download, or a file that cannot be read.
    """
    name, options = _options(str(request))
    path = Path(name)
    if path.suffix in SUFFIXES or path.exists():
        texts: Iterable[str] = read_file(path, key=options.get("key"))
    elif name in known:
        texts = known[name].texts(split=options.get("split"))
    elif allow_download:
        texts = _from_hub(name, options)
    else:
        hint = (
            "A local file ends in .txt, .json, .jsonl or .parquet. To load a set by its name from "
            "the Hugging Face hub, allow downloads (--allow-download)."
        )
        raise TunerError(unknown_name("calibration dataset", name, known, hint=hint))
    wanted = int(options["num"]) if "num" in options else None
    out: list[str] = []
    for text in texts:
        if wanted is not None and len(out) == wanted:
            break
        if text.strip():
            out.append(text)
    if not out:
        msg = f"calibration dataset {name!r} is empty: it holds no text to calibrate with"
        raise TunerError(msg)
    return out


def read_file(path: Path, *, key: str | None = None) -> Iterator[str]:
    """Yield the texts of a .txt (paragraphs), .json, .jsonl or .parquet file.

    Raises:
        TunerError: no such file, an unknown kind of file, or one that cannot be read.
    """
    if not path.is_file():
        msg = f"calibration file {str(path)!r} does not exist"
        raise TunerError(msg)
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from _records(pyarrow.parquet.read_table(path).to_pylist(), path, key)
            return
        raw = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            yield from (part for part in raw.split("\n\n") if part.strip())
        elif path.suffix == ".jsonl":
            lines = (line for line in raw.split("\n") if line.strip())  # not at U+2028
            yield from _records((json.loads(line) for line in lines), path, key)
        elif path.suffix == ".json":
            yield from _records(json.loads(raw), path, key)
        else:
            msg = f"calibration file {str(path)!r}: use one of {', '.join(SUFFIXES)}"
            raise TunerError(msg)
    except (UnicodeDecodeError, ValueError, OSError) as error:
        msg = f"calibration file {str(path)!r} cannot be read: {error}"
        raise TunerError(msg) from error


def _records(records: Any, path: Path, key: str | None) -> Iterator[str]:
    if isinstance(records, dict):
        records = next((v for v in records.values() if isinstance(v, list)), [records])
    for record in records:
        yield text_of(record, where=str(path), key=key)


def text_of(record: Any, *, where: str, key: str | None = None) -> str:
    """Return the text of one record: a string, a dict with a text field, or chat messages.

    Raises:
        TunerError: none of these.
    """
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        for name in (key,) if key else TEXT_KEYS:
            if isinstance(record.get(name), str):
                return str(record[name])
        messages = record.get("messages") or record.get("conversations")
        if isinstance(messages, list) and messages:
            return "\n".join(str(m.get("content") or m.get("value") or "") for m in messages)
        found = f"a record with the fields {', '.join(map(str, record)) or 'none'}"
    else:
        found = f"a record of type {type(record).__name__}"
    msg = (
        f"{where}: {found} holds no text. Use strings, or records with one of the fields "
        f"{', '.join(TEXT_KEYS)}, messages (or name the field: FILE:key=NAME)."
    )
    raise TunerError(msg)


def _options(request: str) -> tuple[str, dict[str, str]]:
    name, colon, tail = request.partition(":")
    if not colon or "=" not in tail:
        return request, {}
    options = dict(part.partition("=")[::2] for part in tail.split(","))
    for option in options:
        if option not in OPTIONS:
            raise TunerError(unknown_name("dataset option", option, OPTIONS))
    if not options.get("num", "1").isdigit():
        msg = f"dataset option num={options['num']!r} must be a whole number"
        raise TunerError(msg)
    return name, options


def _from_hub(name: str, options: Mapping[str, str]) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=options.get("split", "train"), streaming=True)
    except (OSError, ValueError, ConnectionError) as error:
        msg = f"calibration dataset {name!r} cannot be loaded: {error}"
        raise TunerError(msg) from error
    for row in rows:
        yield text_of(row, where=name, key=options.get("key"))
