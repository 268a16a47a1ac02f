"""The Triton kernels in Triton's interpreter. `test_triton.py` runs this file in a process of its
own: Triton decides when it is imported whether kernels are compiled or interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ar_kernels import equal
from ar_kernels.backends import Need
from ar_kernels.backends.cuda_triton import CUDA_TRITON
from ar_kernels.testing import BackendConformance, quantized
from ar_kernels.triton import configs, launch
from ar_kernels.triton.ops import triton_linear
from ar_kernels.triton.packing import pack
from ar_schemes import Granularity, Span, TensorSpec, scheme


def group(size: int) -> Granularity:
    return Granularity(Span.GROUP, (size,))


INTEGERS = (
    TensorSpec(bits=2, granularity=group(16), symmetric=False),
    TensorSpec(bits=3, granularity=group(32)),
    TensorSpec(bits=4, granularity=group(32), symmetric=False),
    TensorSpec(bits=8, granularity=Granularity(Span.CHANNEL)),
)
FLOATS = tuple(
    scheme(name).weight for name in ("FPW8A16", "MXFP4", "MXFP6", "MXFP8", "MXINT4", "NVFP4")
)
RARE = (
    TensorSpec(bits=5, granularity=group(80), symmetric=False),
    TensorSpec(bits=6, granularity=group(16)),
    TensorSpec(bits=7, granularity=Granularity(Span.TENSOR), symmetric=False),
    TensorSpec(bits=4, granularity=Granularity(Span.TILE, (8, 32))),
    TensorSpec("fp", 8, Granularity(Span.TILE, (8, 16)), scale_dtype="float32"),
    scheme("NVFP4_E5M3").weight,
)


class TestEveryType(BackendConformance):
    subject = CUDA_TRITON
    specs = INTEGERS + FLOATS
    shapes = ((40, 96),)
    dtypes = (torch.float16,)
    refused = (
        Need(TensorSpec(granularity=group(24)), 32, 48, "cuda", torch.float16),
        Need(scheme("GGUF:Q4_K_S").weight, 32, 256, "cuda", torch.float16),
        Need(scheme("GGUF:Q4_1").weight, 32, 256, "cuda", torch.float16),
        Need(TensorSpec(), 32, 128, "xpu", torch.float16),
        Need(TensorSpec(), 32, 128, "cuda", torch.float64),
    )


class TestEveryActivation(BackendConformance):
    subject = CUDA_TRITON
    specs = INTEGERS[2:3]
    shapes = ((32, 64),)


@pytest.mark.parametrize("spec", INTEGERS + FLOATS + RARE, ids=str)
@pytest.mark.parametrize("tokens", [1, 19], ids=["one row", "two blocks"])
def test_every_regime_is_right_for_every_type(spec: TensorSpec, tokens: int) -> None:
    weight = quantized(spec, 40, 160)
    packing, buffers = pack(weight)
    x = torch.randn(tokens, 160, dtype=torch.float16)
    bias = torch.randn(40, dtype=torch.float16)
    found = launch.linear(x, packing, buffers, bias).double()
    expected = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
    assert (found - expected).norm() / expected.norm() < 1e-3


def test_many_tokens_are_multiplied_by_the_expanded_weight() -> None:
    weight = quantized(INTEGERS[2], 40, 96)
    x, bias = torch.randn(30, 96), torch.randn(40)
    found = launch.linear(x, *pack(weight), bias)
    assert torch.allclose(found, x @ weight.dequantize().t() + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3], ids=["one row", "tensor cores"])
def test_shared_out_columns_add_up(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TensorSpec(granularity=group(64), symmetric=False)
    weight = quantized(spec, 48, 1100 // 64 * 64)
    packing, buffers = pack(weight)
    arch = configs.ARCHS["interpreter"]
    splits = []
    for processors in (0, 100):
        monkeypatch.setattr(launch, "device_facts", lambda *_, n=processors: (arch, n))
        x = torch.randn(tokens, packing.columns, generator=torch.Generator().manual_seed(0))
        steps = launch.plan(packing, tokens, arch, processors, bias=False, dot="fp32")
        splits.append(steps.splits)
        found = launch.linear(x, packing, buffers, torch.ones(48)).double()
        expected = x.double() @ weight.dequantize(torch.float64).t() + 1
        assert (found - expected).norm() / expected.norm() < 1e-6
    assert splits[0] == 1 < splits[1]


def test_bare_codes_and_scaled_weights_are_multiplied_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packing, buffers = pack(quantized(TensorSpec(granularity=group(32), symmetric=False), 64, 256))
    x = torch.randn(16, 256)
    arch = configs.ARCHS["interpreter"]
    regime = replace(arch.regimes[1], rows=64)
    assert regime.block_m == 16
    out, early = [], []
    for block_m in (16, 64):
        changed = replace(arch, regimes=(replace(regime, block_m=block_m),))
        monkeypatch.setattr(launch, "device_facts", lambda *_, a=changed: (a, 2))
        steps = launch.plan(packing, 16, changed, 2, bias=False, dot="fp32")
        early.append(steps.main.constants["EARLY"])
        out.append(launch.linear(x, packing, buffers, None))
    assert early == [0, 1]
    assert torch.allclose(*out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", INTEGERS + FLOATS + RARE, ids=str)
def test_the_expanded_weight_is_the_dequantized_one(spec: TensorSpec) -> None:
    weight = quantized(spec, 24, 80 if spec.granularity == group(80) else 96)
    packing, buffers = pack(weight)
    found = launch.dense(packing, buffers, torch.float32)
    assert torch.allclose(found.t(), weight.dequantize(), rtol=1e-6, atol=0)


def test_the_smallest_and_largest_block_scales_are_decoded_exactly() -> None:
    for name in ("MXFP4", "NVFP4", "NVFP4_E5M3"):
        weight = quantized(scheme(name).weight, 256, 32)
        every = torch.arange(256, dtype=torch.uint8).view(-1, 1)
        bits = every.repeat(1, weight.scale.shape[1]).clone()
        if name == "MXFP4":  # the decoder's own 2**14 would overflow
            bits.clamp_(max=127 + 113)
        if name == "NVFP4_E5M3":  # its NaN
            bits.clamp_(max=254)
        if name == "NVFP4":  # neither sign nor NaN
            bits.bitwise_and_(127).clamp_(max=126)
        weight = replace(weight, scale=bits.view(weight.scale.dtype))
        found = launch.dense(*pack(weight), torch.float32).t()
        assert torch.equal(found, weight.dequantize()), name


def test_the_op_is_well_formed() -> None:
    spec = TensorSpec(bits=3, granularity=group(32), symmetric=False)
    packing, buffers = pack(quantized(spec, 32, 64))
    args = (list(buffers.values()), list(packing.meta()), None)
    x = torch.randn(2, 3, 64, dtype=torch.float16)
    torch.library.opcheck(triton_linear, (x, *args))
    assert triton_linear(x.to("meta"), *args).shape == (2, 3, 32)


def test_a_packed_weight_keeps_its_bits_on_the_way_back() -> None:
    for spec in RARE:
        weight = quantized(spec, 40, 160)
        need = Need(spec, 40, 160, "cpu", torch.float16)
        assert equal(CUDA_TRITON.unpack(CUDA_TRITON.pack(weight, need), need), weight)
