"""Scores on disk: one file per model, text and scorer; layers are added as they are finished."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ar_schemes import Scheme
    from ar_tuner.auto_scheme.scorers import Values

VERSION = 1
"""Version of the file; another one is not read."""


_NOISE = "noise"


class ScoreCache:
    """The values a scorer has found, under a key that says of what; written whole or not at all.

    Values are kept by layer and by the numbers of a scheme, so that other options, or more of
    them, find what was done before.
    """

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self._path = path
        self._key = dict(key)
        self._values: dict[str, dict[str, list[float]]] = {}
        self._measured: dict[str, float] = {}
        if path is not None and path.is_file():
            self._values, self._measured = _read(path, self._key)

    def known(self, open_to: Mapping[str, Mapping[str, Scheme]]) -> dict[str, Values]:
        """Return the values at hand by layer and option name."""
        out: dict[str, Values] = {}
        for layer, named in open_to.items():
            here = self._values.get(layer, {})
            found = {o: tuple(here[_id(s)]) for o, s in named.items() if _id(s) in here}
            if found:
                out[layer] = found
        return out

    def save(self, layer: str, values: Values, named: Mapping[str, Scheme]) -> None:
        """Add the values of a layer."""
        here = self._values.setdefault(layer, {})
        here |= {_id(named[option]): list(value) for option, value in values.items()}
        self._write()

    @property
    def noise(self) -> float | None:
        """What was measured where next to nothing was changed, or None."""
        return self._measured.get(_NOISE)

    @noise.setter
    def noise(self, value: float) -> None:
        self._measured[_NOISE] = value
        self._write()

    def measured(self, layers: Sequence[str], which: Scheme) -> float | None:
        """Return what was measured for some layers under a scheme, or None."""
        return self._measured.get(_probe(layers, which))

    def save_measured(self, found: Iterable[tuple[Sequence[str], Scheme, float]]) -> None:
        """Add what was measured, (layers, scheme, divergence) each."""
        self._measured |= {_probe(layers, which): loss for layers, which, loss in found}
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "version": VERSION,
            "key": self._key,
            "values": self._values,
            "measured": self._measured,
        }
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)


def default_path(key: Mapping[str, Any]) -> Path:
    """Return the file of a key in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return Path(home) / "ar" / "scores" / f"{digest}.json"


def _id(scheme: Scheme) -> str:
    parts = [None if s is None else s.to_dict() for s in (scheme.weight, scheme.activation)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _probe(layers: Sequence[str], which: Scheme) -> str:
    return f"{_id(which)}:{','.join(layers)}"


def _read(
    path: Path, key: Mapping[str, Any]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version, known = document["version"], document["key"]
        values, measured = document["values"], document["measured"]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"score cache {path} cannot be read ({error}); remove it or name another file"
        raise TunerError(msg) from error
    differing = [k for k in key if known.get(k) != key[k]]
    if version != VERSION or differing:
        what = ", ".join(differing) or f"version {version}"
        msg = (
            f"score cache {path} is of something else ({what} differ); "
            "remove it or name another file"
        )
        raise TunerError(msg)
    return values, measured
