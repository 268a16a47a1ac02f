"""Choose among backends by their measured time, shape by shape. Off unless asked for.

With `AR_KERNELS_AUTOTUNE=1` every usable backend multiplies a random weight of the layer's shape by
1, 16 and 512 tokens; the weighted times (decoding counts most) decide. Results are kept in a JSON
file, one per device and torch version, so that each shape is measured once per machine.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ar_kernels.registry import data_type

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ar_kernels.backends.base import Backend, Need, PackedWeight
    from ar_kernels.weight import QuantizedWeight

_log = logging.getLogger(__name__)

SWITCH, FOLDER = "AR_KERNELS_AUTOTUNE", "AR_KERNELS_CACHE"
_SHARES = {1: 0.7, 16: 0.2, 512: 0.1}
"""Tokens per call to their weight in the score."""
_SECONDS = 0.02
"""Time spent on each backend and number of tokens."""
_NEVER = ("reference",)
"""Backends that are not measured: known to be the slowest, and slow to measure."""


def fastest(need: Need, usable: Sequence[Backend], env: Mapping[str, str]) -> str | None:
    """Return the name of the fastest usable backend, or None when measuring is off.

    Args:
        need: what the layer asks.
        usable: the backends to compare, best ranked first.
        env: where the switch and the folder of the cache are read.
    """
    if env.get(SWITCH, "").strip().lower() not in ("1", "true", "yes", "on"):
        return None
    if need.activation is not None:  # a random weight has no ranges of static activations
        return None
    candidates = [b for b in usable if b.name not in _NEVER]
    if len(candidates) < 2:  # noqa: PLR2004 - nothing to compare
        return None
    path = cache_file(need.device, env)
    known = _read(path)
    times = known.setdefault(_key(need), {})
    fresh = [b for b in candidates if b.name not in times]
    if fresh:
        weight = _random(need)
        times |= {b.name: _score(b, need, weight) for b in fresh}
        _write(path, known)
        shown = ", ".join(f"{name} {1e6 * t:.0f} us" for name, t in times.items())
        _log.info("measured %s: %s", _key(need), shown)
    return min((b.name for b in candidates), key=lambda name: times[name])


def cache_file(device: str, env: Mapping[str, str] = os.environ) -> Path:
    """Return the file that holds the times measured on this machine."""
    folder = env.get(FOLDER) or Path.home() / ".cache" / "ar_kernels"
    kind = platform.processor() or platform.machine()
    if device == "cuda" and torch.cuda.is_available():
        kind = torch.cuda.get_device_name()
    threads = torch.get_num_threads() if device == "cpu" else 0
    name = f"{device}-{kind}-{threads}-torch{torch.__version__}"
    return Path(folder) / ("".join(c if c.isalnum() or c in ".-+" else "_" for c in name) + ".json")


def _key(need: Need) -> str:
    dtype = str(need.dtype).removeprefix("torch.")
    act = "" if need.activation is None else f" a {need.activation}"
    return f"{need.spec}{act} {need.rows}x{need.columns} {dtype}"


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Return what was measured before; nothing where the file is absent or not ours."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        _log.warning("%s cannot be read and is measured anew", path)
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, known: Mapping[str, Mapping[str, float]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(known, indent=1), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        _log.warning("measured times are not kept: %s", error)


def _random(need: Need) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(need.rows, need.columns, generator=generator) * 0.02
    kind = data_type(need.spec.data_type)
    return kind.quantize(values, need.spec, kind.parameters(values, need.spec))


def _score(backend: Backend, need: Need, weight: QuantizedWeight) -> float:
    """Return the weighted time of a call, in seconds."""
    with torch.inference_mode():
        packed = backend.pack(weight, need)
        total = 0.0
        for tokens, share in _SHARES.items():
            x = torch.ones(tokens, need.columns, dtype=need.dtype, device=need.device)
            # a prompt of 512 tokens is one call in a long time: counted as 16 of its tokens
            total += share * _median(backend, x, packed) * 16 / max(tokens, 16)
    return total


def _median(backend: Backend, x: torch.Tensor, packed: PackedWeight) -> float:
    times: list[float] = []
    backend.linear(x, packed, None)  # first call: caches, compilation
    stop = time.perf_counter() + _SECONDS
    while not times or time.perf_counter() < stop:
        start = time.perf_counter()
        backend.linear(x, packed, None)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
