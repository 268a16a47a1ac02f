from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from ar_kernels import data_type, layout
from ar_kernels.layouts.gguf import GGUF_LAYOUTS, gguf_type
from ar_kernels.layouts.gguf_fields import (
    pack_scales_min,
    pack_scales_q3,
    unpack_scales_min,
    unpack_scales_q3,
)
from ar_kernels.numerics.float_min import FloatMinimum
from ar_kernels.numerics.k_quants import KQuant
from ar_kernels.testing.data_types import DataTypeConformance
from ar_kernels.testing.layouts import LayoutConformance
from ar_kernels.testing.samples import float_weights, quantized
from ar_schemes import scheme

gguf = pytest.importorskip("gguf")
PRESETS = {
    "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q8_0": "Q8_0",
    "Q2_K": "Q2_K_S", "Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S", "Q6_K": "Q6_K",
}  # fmt: skip


def spec_of(kind: str):
    return scheme(f"GGUF:{PRESETS[kind]}").weight


class _Wide(DataTypeConformance):
    shape = (4, 512)


class TestFloatMinimum(_Wide):
    subject = FloatMinimum()
    specs = (spec_of("Q4_1"), spec_of("Q5_1"))
    refused = (spec_of("Q4_1").with_(symmetric=True),)


class TestSymmetric(_Wide):
    subject = KQuant("int_sym_dq", symmetric=True)
    specs = (spec_of("Q3_K"), spec_of("Q6_K"))
    refused = (spec_of("Q3_K").with_(super_group=None), spec_of("Q3_K").with_(symmetric=False))

    def as_stored(self, params, spec):
        whole = params.extra["super_scale"].half().float().repeat_interleave(16, -1)
        return whole * params.extra["inner"].to(torch.int8).float()


class TestAsymmetric(_Wide):
    subject = KQuant("int_asym_dq", symmetric=False)
    specs = (spec_of("Q2_K"), spec_of("Q4_K"), spec_of("Q5_K"))

    def as_stored(self, params, spec):
        whole = params.extra["super_scale"].half().float()
        whole = whole.repeat_interleave(spec.super_group.size, -1)
        return whole * params.extra["inner"].to(torch.uint8).float()


class TestLayouts(LayoutConformance):
    shapes = ((2, 256), (3, 768))
    refused = ((spec_of("Q4_K"), 2, 288),)

    def pytest_generate_tests(self, metafunc):
        metafunc.fixturenames.append("kind")
        metafunc.parametrize("kind", PRESETS)

    @pytest.fixture(autouse=True)
    def _of(self, kind):
        self.subject = layout(f"gguf_{kind.lower()}")
        self.specs = (spec_of(kind),)
        self.refused = ((scheme("W4A16").weight, 2, 256),)


@pytest.mark.parametrize("kind", PRESETS)
def test_the_gguf_package_decodes_exactly_our_weight(kind) -> None:
    spec = spec_of(kind)
    for label, weight in float_weights(5, 512).items():
        found = data_type(spec.data_type)
        for params in (found.parameters(weight, spec), found.search(weight, spec)):
            made = found.quantize(weight, spec, params)
            blocks = layout(f"gguf_{kind.lower()}").pack(made)["blocks"]
            theirs = gguf.quants.dequantize(
                blocks.numpy(), getattr(gguf.GGMLQuantizationType, kind)
            )
            assert torch.equal(torch.from_numpy(theirs), made.dequantize()), label
            assert gguf_type(spec) == kind


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(PRESETS)), st.integers(0, 2**31))
def test_any_code_and_any_parameter_survive(kind, seed) -> None:
    spec = spec_of(kind)
    generator = torch.Generator().manual_seed(seed)
    weight = quantized(spec, 2, 512)
    weight.codes.copy_(torch.randint(0, 2**spec.bits, weight.codes.shape, generator=generator))
    if spec.super_group is not None:
        levels = 2**spec.super_group.bits
        low = -levels // 2 if spec.symmetric else 0
        shape = weight.scale.shape
        weight.scale.copy_(torch.randint(low, low + levels, shape, generator=generator))
        if not spec.symmetric:
            weight.extra["minimum"].copy_(torch.randint(0, levels, shape, generator=generator))
    found = layout(f"gguf_{kind.lower()}")
    blocks = found.pack(weight)
    theirs = gguf.quants.dequantize(
        blocks["blocks"].numpy(), getattr(gguf.GGMLQuantizationType, kind)
    )
    assert torch.equal(torch.from_numpy(theirs), weight.dequantize())
    assert torch.equal(found.unpack(blocks, spec, 2, 512).codes, weight.codes)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_plain_rounding_is_as_good_as_that_of_the_gguf_package(kind) -> None:
    spec = spec_of(kind)
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    found = data_type(spec.data_type)
    ours = found.fake_quant(weight, spec, found.parameters(weight, spec))
    kind = getattr(gguf.GGMLQuantizationType, kind)
    theirs = torch.from_numpy(
        gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    )
    assert (ours - weight).square().mean() <= (theirs - weight).square().mean() * 1.01


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_search_is_clearly_better_than_plain_rounding(kind) -> None:
    spec = spec_of(kind)
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)) + 0.1
    found = data_type(spec.data_type)

    def error(params) -> float:
        gap = found.fake_quant(weight, spec, params) - weight
        return float((gap.square() * importance).mean())

    plain = error(found.parameters(weight, spec))
    searched = error(found.search(weight, spec, importance=importance))
    assert searched < 0.93 * plain


def test_the_published_scales() -> None:
    u = torch.tensor([[3, 10, 17, 24, 31, 38, 45, 52, 59, 2, 9, 16, 23, 30, 37, 44]]).byte()
    packed = pack_scales_q3(u)
    assert bytes(packed[0].tolist()).hex() == "b32a91087fe65dc47448899d"
    assert torch.equal(unpack_scales_q3(packed), u)
    scale = torch.tensor([[1, 2, 3, 4, 0x15, 0x26, 0x37, 0x3F]]).byte()
    minimum = torch.tensor([[5, 6, 7, 8, 0x11, 0x22, 0x33, 0x3E]]).byte()
    packed = pack_scales_min(scale, minimum)
    assert bytes(packed[0].tolist()).hex() == "4182c3c44586c7c8152637ef"
    assert all(map(torch.equal, unpack_scales_min(packed), (scale, minimum)))


def test_block_sizes_are_those_of_ggml() -> None:
    for found in GGUF_LAYOUTS:
        kind = getattr(gguf.GGMLQuantizationType, found.type)
        assert gguf.GGML_QUANT_SIZES[kind] == (found.block, found.size)
