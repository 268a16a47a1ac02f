"""What an owner of hardware runs: `pytest --pyargs ar_kernels.testing.hardware`.

Every installed backend multiplies every representation it takes on every device of this machine,
for numbers of tokens that reach each of its kernels; `-k cuda` and the like choose. What a backend
refuses or lacks is skipped with its reason (`-rs` shows them).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from ar_kernels.backends.base import ExactBackend, Need
from ar_kernels.numerics.activation import fake_quant_activation
from ar_kernels.registry import backend, backends
from ar_kernels.testing.backends import TOLERANCE
from ar_kernels.testing.samples import quantized
from ar_kernels.weight import equal
from ar_schemes import Granularity, Span, TensorSpec, scheme

TOKENS = (1, 2, 5, 16, 17, 64, 300)
SHAPE = (256, 1024)
_GROUPS = (16, 32, 128)


@dataclass(frozen=True)
class Case:
    """A weight, and how its activations are quantized, None: not."""

    weight: TensorSpec
    activation: TensorSpec | None = None

    def __str__(self) -> str:
        acts = "" if self.activation is None else f" x {self.activation}"
        return f"{self.weight}{acts}".replace(" ", "-")


def _cases() -> list[Case]:
    out = [
        Case(TensorSpec(bits=bits, granularity=Granularity(Span.GROUP, (size,)), symmetric=sym))
        for bits in (2, 3, 4, 8)
        for size in _GROUPS
        for sym in (True, False)
    ]
    out += [Case(TensorSpec(bits=4, granularity=Granularity(Span.CHANNEL)))]
    named = ("FPW8A16", "FP8_BLOCK", "FP8_STATIC", "MXFP4", "MXFP6", "MXFP8", "MXINT4", "NVFP4")
    weights = [spec for name in named if (spec := scheme(name).weight) is not None]
    token = TensorSpec("fp", 8, Granularity(Span.TOKEN), scale_dtype="float32")
    out += [Case(spec) for spec in weights]
    out += [Case(weights[2], token), Case(weights[0], token)]
    for name in ("FP8_BLOCK", "MXFP8", "NVFP4"):
        found = scheme(name)
        assert found.weight is not None
        assert found.activation is not None
        out.append(Case(found.weight, found.activation.with_(dynamic=True)))
    return out


def devices() -> list[str]:
    """Return the types of this machine's devices."""
    found = ["cpu"]
    for name in ("cuda", "xpu", "hpu"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            found.append(name)
    return found


@pytest.mark.parametrize("case", _cases(), ids=str)
@pytest.mark.parametrize("name", backends())
@pytest.mark.parametrize("device", devices())
def test_every_backend_is_right_on_every_device(device: str, name: str, case: Case) -> None:
    """Products agree with float64, equal inputs give equal bits, unpacking is exact."""
    subject = backend(name)
    lacks = subject.missing()
    if lacks is not None:
        pytest.skip(f"missing: {lacks}")
    weight = quantized(case.weight, *SHAPE)
    why, served = None, False
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        need = Need(case.weight, *SHAPE, device, dtype, case.activation)
        why = subject.refuses(need)
        if why is not None:
            continue
        served = True
        packed = subject.pack(weight, need)
        if isinstance(subject, ExactBackend):
            assert equal(subject.unpack(packed, need).to("cpu"), weight)
        for tokens in TOKENS:
            generator = torch.Generator().manual_seed(tokens)
            x = torch.randn(tokens, SHAPE[1], generator=generator).to(dtype)
            given = x if case.activation is None else fake_quant_activation(x, case.activation)
            expected = given.double() @ weight.dequantize(torch.float64).t()
            there = x.to(device)
            found, again = (subject.linear(there, packed, None) for _ in range(2))
            assert torch.equal(found, again), f"{tokens} tokens, {dtype}: two runs differ"
            error = (found.cpu().double() - expected).norm() / expected.norm()
            assert float(error) <= TOLERANCE[dtype], f"{tokens} tokens, {dtype}: error {error:.1e}"
    if not served:
        pytest.skip(f"{name} on {device}: {why}")
