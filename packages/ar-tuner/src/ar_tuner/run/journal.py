"""`Run`: the directory in which a quantization keeps what it has finished.

    run.json        format version, settings, fingerprint
    journal.jsonl   one line per finished block: index, name, file, digest
    blocks/         one safetensors file per finished block
    events.jsonl    everything the run told, for programs to read
    done.json       written last: where the result lies

A block's file is written under another name, synced and renamed before its journal line is
appended and synced. So whatever the journal names is whole; a torn last line is dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file

from ar_kernels import QuantizedWeight
from ar_schemes import TensorSpec
from ar_tuner.errors import TunerError
from ar_tuner.run.lock import RunLock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

    from ar_tuner.events import RunEvent

VERSION = 1
"""Version of the run directory; another one is not resumed."""
_KEPT = "blocks-"
"""Begins the name of a folder with the blocks of a finished run whose model may be asked for."""


class Run:
    """One quantization in a directory; a context manager that holds the directory's lock."""

    def __init__(self, directory: Path, lock: RunLock, finished: dict[int, dict[str, Any]]) -> None:
        self.directory = directory
        self._lock = lock
        self._finished = finished
        self._blocks = directory / "blocks"

    @classmethod
    def open(
        cls,
        directory: Path,
        settings: Mapping[str, Any],
        fingerprint: Mapping[str, str],
        *,
        resume: bool,
    ) -> Run:
        """Return a fresh run, or with `resume` the one in the directory.

        Raises:
            TunerError: the directory holds an unfinished run and `resume` was not asked for; it
                belongs to other settings, data or weights; another process works in it; or
                something there is no run.
        """
        _check_is_run(directory)
        directory.mkdir(parents=True, exist_ok=True)
        lock = RunLock.take(directory)
        try:
            finished: dict[int, dict[str, Any]] = {}
            if resume and (directory / "run.json").is_file():
                _check_same(directory, fingerprint)
                finished = dict(_read_journal(directory))
            else:
                _check_unused(directory)
                _clear(directory)
                document = {
                    "version": VERSION,
                    "settings": dict(settings),
                    "fingerprint": dict(fingerprint),
                }
                (directory / "blocks").mkdir(exist_ok=True)
                _write(directory / "run.json", json.dumps(document, indent=2, default=str))
        except BaseException:
            lock.release()
            raise
        return cls(directory, lock, finished)

    @property
    def finished(self) -> frozenset[int]:
        """Indices of the blocks that are on disk."""
        return frozenset(self._finished)

    def save_block(
        self,
        index: int,
        name: str,
        weights: Mapping[str, QuantizedWeight],
        facts: Mapping[str, Any],
    ) -> None:
        """Put a finished block on disk, whole or not at all; returns when it is safe there."""
        tensors = {
            f"{layer}|{key}": tensor.detach().cpu().contiguous()
            for layer, weight in weights.items()
            for key, tensor in weight.tensors().items()
        }
        specs = {layer: weight.spec.to_dict() for layer, weight in weights.items()}
        path = self._blocks / f"{index:05d}.safetensors"
        part = path.with_suffix(".part")
        save_file(tensors, part, metadata={"specs": json.dumps(specs)})
        digest = _file_digest(part)
        _sync(part)
        part.replace(path)
        _sync(path.parent)
        entry = {
            "index": index,
            "name": name,
            "file": path.name,
            "sha256": digest,
            "facts": dict(facts),
        }
        _append(self.directory / "journal.jsonl", json.dumps(entry), sync=True)
        self._finished[index] = entry

    def load_block(self, index: int) -> tuple[dict[str, QuantizedWeight], dict[str, Any]]:
        """Return the weights of a finished block by layer name, and its facts.

        Raises:
            TunerError: the file is not what was written.
        """
        entry = self._finished[index]
        path = self._blocks / entry["file"]
        if not path.is_file() or _file_digest(path) != entry["sha256"]:
            msg = (
                f"{path}: the finished block {index} is missing or was changed since it was "
                f"written. Remove {self.directory} to start anew."
            )
            raise TunerError(msg)
        parts: dict[str, dict[str, Any]] = {}
        with safe_open(path, framework="pt") as file:
            specs = json.loads(file.metadata()["specs"])
            for key in file.keys():  # noqa: SIM118 - not a dict
                layer, _, part = key.rpartition("|")
                parts.setdefault(layer, {})[part] = file.get_tensor(key)
        weights = {
            layer: QuantizedWeight.from_tensors(TensorSpec.from_dict(spec), parts[layer])
            for layer, spec in specs.items()
        }
        return weights, dict(entry["facts"])

    def put_state(self, name: str, tensors: Mapping[str, Tensor], step: int) -> None:
        """Replace the state that a stage keeps, whole or not at all."""
        plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        path = self._state(name)
        part = path.with_suffix(".part")
        save_file(plain, part, metadata={"step": str(step)})
        _sync(part)
        part.replace(path)
        _sync(path.parent)

    def get_state(self, name: str) -> tuple[dict[str, Tensor], int] | None:
        """Return the state that a stage kept last and its number of steps, or None."""
        path = self._state(name)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, int(file.metadata()["step"])

    def _state(self, name: str) -> Path:
        return self._blocks / f"state-{name}.safetensors"

    def record(self, event: RunEvent) -> None:
        """Append an event to the log."""
        line = {"time": round(time.time(), 3), **event.to_dict()}
        _append(self.directory / "events.jsonl", json.dumps(line, default=str), sync=False)

    def finish(self, output: Path, *, keep_blocks: bool = False) -> None:
        """Note where the result lies; the log stays.

        `keep_blocks`: finished blocks can still be loaded, until `drop_blocks` or the next run.
        """
        _write(self.directory / "done.json", json.dumps({"output": str(output)}))
        if not keep_blocks:
            self.drop_blocks()
            return
        kept = self.directory / f"{_KEPT}{uuid.uuid4().hex}"  # not those of a run that comes after
        self._blocks.rename(kept)
        self._blocks = kept

    def drop_blocks(self) -> None:
        """Remove the finished blocks."""
        for path in self._blocks.glob("*.safetensors"):
            path.unlink(missing_ok=True)
        if self._blocks.name.startswith(_KEPT):
            with contextlib.suppress(OSError):
                self._blocks.rmdir()
        self._finished.clear()

    def __enter__(self) -> Run:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the directory."""
        self._lock.release()


def _check_is_run(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        msg = f"run directory {directory} is a file; give another with run_dir"
        raise TunerError(msg)
    if any(directory.iterdir()) and not (directory / "run.json").is_file():
        strangers = [p.name for p in directory.iterdir() if p.name != "lock"]
        if strangers:
            msg = (
                f"run directory {directory} holds other files ({', '.join(strangers[:3])}); "
                "give another with run_dir"
            )
            raise TunerError(msg)


def _check_unused(directory: Path) -> None:
    """Refuse to throw away finished blocks that nobody asked to throw away."""
    if (directory / "done.json").is_file():
        return
    count = sum(1 for _ in _read_journal(directory))
    if count:
        msg = (
            f"run directory {directory} holds an interrupted run with {count} finished blocks. "
            "Go on with it (resume), or remove the directory to start anew."
        )
        raise TunerError(msg)


def _check_same(directory: Path, fingerprint: Mapping[str, str]) -> None:
    try:
        document = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        version, known = document["version"], document["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{directory / 'run.json'} cannot be read ({error}); remove {directory}"
        raise TunerError(msg) from error
    if version != VERSION:
        msg = (
            f"run directory {directory} was written by another version of ar ({version}, "
            f"this one writes {VERSION}); remove it to start anew"
        )
        raise TunerError(msg)
    if (directory / "done.json").is_file():
        msg = f"the run in {directory} is finished; there is nothing to resume"
        raise TunerError(msg)
    changed = [k for k in fingerprint if known.get(k) != fingerprint[k]]
    if changed:
        msg = (
            f"run directory {directory} belongs to another run: {', '.join(changed)} differ. "
            "Resume with the same arguments, or give another directory with run_dir."
        )
        raise TunerError(msg)


def _read_journal(directory: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (index, entry) of every finished block; a torn last line counts for nothing."""
    path = directory / "journal.jsonl"
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            yield int(entry["index"]), entry


def _clear(directory: Path) -> None:
    for name in ("journal.jsonl", "events.jsonl", "done.json", "run.json"):
        (directory / name).unlink(missing_ok=True)
    for path in [*(directory / "blocks").glob("*"), *directory.glob(f"{_KEPT}*/*")]:
        path.unlink()
    for path in directory.glob(f"{_KEPT}*"):
        path.rmdir()


def _append(path: Path, line: str, *, sync: bool) -> None:
    torn = path.is_file() and not _ends_with_newline(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + line + "\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    _sync(part)
    part.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
