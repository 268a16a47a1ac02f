"""Reads samples: local JSONL and JSON (chats, LLaVA's form), saved sets, names on a hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ar_tuner.calibration.files import is_local, read_path
from ar_vlm.errors import VlmError
from ar_vlm.samples.pictures import Places
from ar_vlm.samples.records import sample_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ar_tuner.calibration import DatasetSource
    from ar_vlm.samples.sample import Sample


def read_samples(
    source: Any,
    *,
    images: str | Path | Sequence[str | Path] | None = None,
    limit: int | None = None,
    allow_download: bool = False,
) -> list[Sample]:
    """Return the samples of a file, a folder, a named set or a list of records.

    A record is `{"messages": [{"role", "content"}]}` with contents of texts and of parts
    `{"type": "image", "path"}`, `{"type": "video", "frames"}`, `{"type": "text", "text"}`; LLaVA's
    `{"image", "conversations": [{"from", "value"}]}` with `<image>` in the text; a question and
    answer or a caption beside an image; or plain `{"text"}`.

    Args:
        source: .json, .jsonl or .parquet file, a folder of them, a set saved by `datasets`, a name
            on the Hugging Face hub, or records.
        images: folder or folders in which relative names of images are looked for, before the
            folder of the file itself.
        limit: at most so many.
        allow_download: named sets and images at addresses may be fetched.

    Raises:
        VlmError: a record that is no sample, images that are not there.
        TunerError: no such file or name.
    """
    given = [images] if isinstance(images, (str, Path)) else list(images or ())
    folders = [Path(folder).expanduser() for folder in given]
    lost = [str(folder) for folder in folders if not folder.is_dir()]
    if lost:
        msg = f"image folder {', '.join(map(repr, lost))} does not exist"
        raise VlmError(msg)
    records, where, home = _records(source, allow_download=allow_download)
    around = (*folders, *([home] if home is not None else []))
    places = Places(around, allow_download, getattr(known_set(source), "image_base", None))
    out: list[Sample] = []
    for number, record in enumerate(records, 1):
        if limit is not None and len(out) == limit:
            break
        out.append(sample_of(record, places, where=f"{where}, record {number}"))
    _check_there(out, places)
    return out


def _records(source: Any, *, allow_download: bool) -> tuple[Iterable[Any], str, Path | None]:
    """Return records, what to call them, and the folder their images may be in."""
    if isinstance(source, Mapping):
        return [source], "sample", None
    if not isinstance(source, (str, Path)):
        if not isinstance(source, Iterable):
            msg = f"samples of type {type(source).__name__} are not understood: give a file or list"
            raise VlmError(msg)
        return source, "samples", None
    name = str(source)
    if isinstance(source, Path) or is_local(name):
        path = Path(name).expanduser()
        return read_path(path), name, path if path.is_dir() else path.parent
    return _named(name, allow_download=allow_download), name, None


def _named(name: str, *, allow_download: bool) -> Iterator[Any]:
    from ar_tuner.calibration import HubSet, Place, Query

    found = known_set(name) or HubSet(name, hub=Place(name))
    return iter(found.records(Query(allow_download=allow_download)))


def known_set(name: Any) -> DatasetSource | None:
    """Return the registered set of a name."""
    from ar_tuner.registry import datasets

    if not isinstance(name, str):
        return None
    known = datasets()
    aliased = (s for s in known.values() if name in getattr(s, "aliases", ()))
    return known.get(name) or next(aliased, None)


def _check_there(samples: Sequence[Sample], places: Places) -> None:
    lost = [p for s in samples for p in s.pictures if p.missing]
    if lost:
        looked = ", ".join(map(str, places.folders)) or "the working directory"
        msg = (
            f"{len(lost)} images are not there: {', '.join(map(str, lost[:4]))}"
            f"{', ...' if len(lost) > 4 else ''}. Looked in {looked}; name their folder with "
            "--image-folder (images=...)."
        )
        raise VlmError(msg)
