"""Conformance of every registered backend, plugins' included, over all that it says it serves.

    pytest --pyargs ar_kernels.testing.test_registered
    pytest --pyargs ar_kernels.testing.test_registered -k cuda_triton

A backend whose device or packages this machine lacks is skipped with the reason, so that the owner
of the hardware runs the same line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from ar_kernels.backends import Declares, Need
from ar_kernels.registry import backends
from ar_kernels.testing.backends import TOLERANCE, BackendConformance
from ar_schemes import Granularity, Span, TensorSpec, schemes

if TYPE_CHECKING:
    from ar_kernels.backends import Backend

_SHAPES = ((64, 128), (96, 256))
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_COARSE = {"cpu_aten": 8e-3}
"""Backends that compute in bfloat16 whatever the type of the activations."""


def _candidates() -> list[TensorSpec]:
    """Return the weights of all schemes and some beside them, each once."""
    found = [s.weight for s in schemes().values() if s.weight is not None]
    found += [
        TensorSpec(bits=bits, granularity=granularity, symmetric=symmetric)
        for bits in (2, 3, 4, 5, 6, 8)
        for granularity in (Granularity(Span.GROUP, (32,)), Granularity(Span.CHANNEL))
        for symmetric in (True, False)
    ]
    return list(dict.fromkeys(found))


def _device(backend: Backend) -> str:
    named = backend.support.devices if isinstance(backend, Declares) else ()
    return named[0] if named else getattr(backend, "device", "cpu")


def _suite(backend: Backend) -> type[BackendConformance]:
    """Return the tests of a backend."""
    device = _device(backend)

    def serves(spec: TensorSpec, dtype: torch.dtype) -> bool:
        needs = [Need(spec, *shape, device, dtype) for shape in _SHAPES]
        return all(_divides(n) and backend.refuses(n) is None for n in needs)

    pairs = {d: [s for s in _candidates() if serves(s, d)] for d in _DTYPES}
    dtypes = tuple(d for d in _DTYPES if pairs[d])
    specs = tuple(s for s in _candidates() if dtypes and all(s in pairs[d] for d in dtypes))
    coarse = _COARSE.get(backend.name, 0.0)
    made = type(
        f"Test_{backend.name}",
        (BackendConformance,),
        {
            "subject": backend,
            "specs": specs,
            "shapes": _SHAPES,
            "dtypes": dtypes,
            "device": device,
            "tolerance": {d: max(t, coarse) for d, t in TOLERANCE.items()},
            "__module__": __name__,
        },
    )
    lacks = backend.missing() or _no_device(device)
    if lacks is None and not specs:
        lacks = f"it serves none of the schemes on {device}"
    marked: type[BackendConformance] = pytest.mark.skipif(
        lacks is not None, reason=f"{backend.name}: {lacks}"
    )(made)
    return marked


def _divides(need: Need) -> bool:
    down, across = need.spec.granularity.region(need.rows, need.columns)
    return need.rows % down == 0 and need.columns % across == 0 and need.spec.super_group is None


def _no_device(device: str) -> str | None:
    if device == "cpu":
        return None
    module = getattr(torch, device, None)
    if module is not None and module.is_available():
        return None
    return f"this machine has no {device}"


globals().update({f"Test_{b.name}": _suite(b) for b in backends().values()})
