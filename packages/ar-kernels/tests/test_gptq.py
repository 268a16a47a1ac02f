"""The GPTQ layouts: vectors for every width, conformance, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ar_kernels import KernelError, QuantizedWeight, equal
from ar_kernels import layout as find_layout
from ar_kernels.layouts.gptq import GPTQ, GPTQ_G_IDX, GPTQ_V2, GPTQ_V2_G_IDX, GptqLayout
from ar_kernels.testing import LayoutConformance, quantized
from ar_schemes import Granularity, Span, TensorSpec

GROUP = Granularity(Span.GROUP, (32,))
ALL = tuple(
    TensorSpec(bits=bits, granularity=granularity, symmetric=symmetric)
    for bits in range(2, 9)
    for granularity in (GROUP, Granularity(Span.CHANNEL))
    for symmetric in (True, False)
)
REFUSED = (
    (TensorSpec(bits=4, granularity=Granularity(Span.TENSOR)), 32, 64),
    (TensorSpec(bits=4, granularity=Granularity(Span.TILE, (16, 16))), 32, 64),
    (TensorSpec(bits=4, granularity=GROUP), 33, 64),
    (TensorSpec(bits=4, granularity=Granularity(Span.GROUP, (16,))), 32, 48),
)
SYMMETRIC_ZEROS = {
    # bits: (version 1, stored mid - 1; version 2, stored mid), one period of the stream
    2: ("55555555", "AAAAAAAA"),
    3: ("DB6DB6DB B6DB6DB6 6DB6DB6D", "24924924 49249249 92492492"),
    4: ("77777777", "88888888"),
    8: ("7F7F7F7F", "80808080"),
}


class _Gptq(LayoutConformance):
    specs = ALL
    refused = REFUSED

    def weight(self, spec: TensorSpec, rows: int, columns: int) -> QuantizedWeight:
        """Return random codes over the whole range, signed scales, every allowed zero point."""
        generator = torch.Generator().manual_seed(spec.bits)
        top = 2**spec.bits - 1
        codes = torch.randint(0, top + 1, (rows, columns), generator=generator)
        codes[0, :2] = torch.tensor([0, top])
        shape = spec.granularity.scale_shape(rows, columns)
        scale = torch.randn(shape, generator=generator).half()
        least = self.subject.zero_shift  # type: ignore[attr-defined]
        zero = torch.randint(least, top + 1, shape, generator=generator)
        zero[:2, 0] = torch.tensor([least, top])
        stored = None if spec.symmetric else zero.to(torch.uint8)
        return QuantizedWeight(spec, codes.to(torch.uint8), scale, stored)

    def needed(self, suffixes: object) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales")


class TestVersion1(_Gptq):
    subject = GPTQ


class TestVersion2(_Gptq):
    subject = GPTQ_V2


class TestVersion1WithGroupIndex(_Gptq):
    subject = GPTQ_G_IDX


class TestVersion2WithGroupIndex(_Gptq):
    subject = GPTQ_V2_G_IDX


def hexes(words: torch.Tensor) -> str:
    return " ".join(f"{w & 0xFFFFFFFF:08X}" for w in words.tolist())


def counting(bits: int) -> QuantizedWeight:
    """Return a weight whose row o holds the codes (i + o) % 2**bits."""
    codes = (torch.arange(32) + torch.arange(32)[:, None]) % 2**bits
    spec = TensorSpec(bits=bits, granularity=GROUP)
    return QuantizedWeight(spec, codes.to(torch.uint8), torch.ones(32, 1).half())


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, "E4E4E4E4 E4E4E4E4"),
        (3, "88FAC688 C688FAC6 FAC688FA"),
        (4, "76543210 FEDCBA98 76543210 FEDCBA98"),
        (5, "8A418820 C5A92839 CA307B9A 38BDAB49 FFBBCDEB"),
        (8, "03020100 07060504 0B0A0908 0F0E0D0C 13121110 17161514 1B1A1918 1F1E1D1C"),
    ],
)
def test_a_column_of_qweight_is_the_stream_of_one_row(bits: int, words: str) -> None:
    packed = GPTQ.pack(counting(bits))
    assert hexes(packed["qweight"][:, 0]) == words


@pytest.mark.parametrize("bits", range(2, 9))
def test_qweight_holds_each_code_at_its_bit(bits: int) -> None:
    weight = counting(bits)
    packed = GPTQ_V2.pack(weight)["qweight"]
    for o in (0, 1, 31):
        whole = sum((int(w) & 0xFFFFFFFF) << (32 * k) for k, w in enumerate(packed[:, o]))
        found = [(whole >> (bits * i)) & (2**bits - 1) for i in range(32)]
        assert found == weight.codes[o].tolist()


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_zero_words(bits: int) -> None:
    weight = quantized(TensorSpec(bits=bits, granularity=GROUP), 32, 64)
    for layout, at in ((GPTQ, 0), (GPTQ_V2, 1)):
        row = layout.pack(weight)["qzeros"][0]
        whole = sum((int(w) & 0xFFFFFFFF) << (32 * k) for k, w in enumerate(row))
        values = {(whole >> (bits * o)) & (2**bits - 1) for o in range(32)}
        assert values == {2 ** (bits - 1) - 1 + at}
        if bits in SYMMETRIC_ZEROS:
            period = SYMMETRIC_ZEROS[bits][at]
            assert hexes(row).startswith(period)


def test_group_index_names_the_group_of_each_channel() -> None:
    packed = GPTQ_G_IDX.pack(quantized(TensorSpec(granularity=GROUP), 32, 64))
    assert packed["g_idx"].tolist() == [0] * 32 + [1] * 32
    channel = quantized(TensorSpec(granularity=Granularity(Span.CHANNEL)), 32, 64)
    assert GPTQ_G_IDX.pack(channel)["g_idx"].unique().tolist() == [0]


def test_group_index_is_optional_when_reading() -> None:
    weight = quantized(TensorSpec(granularity=GROUP), 32, 64)
    assert equal(GPTQ_G_IDX.unpack(GPTQ.pack(weight), weight.spec, 32, 64), weight)


@pytest.mark.parametrize("layout", [GPTQ, GPTQ_G_IDX], ids=lambda layout: layout.name)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_channels_ordered_by_activation_are_read_as_the_file_says(
    layout: GptqLayout, symmetric: bool
) -> None:
    spec = TensorSpec(granularity=GROUP, symmetric=symmetric)
    plain = quantized(spec, 32, 64)
    packed = GPTQ_G_IDX.pack(plain)
    index = torch.randint(0, 2, (64,), generator=torch.Generator().manual_seed(0))
    index[:] = index.argsort().argsort() // 32  # each group 32 times, in no order
    packed["g_idx"] = index.int()
    found = layout.unpack(packed, spec, 32, 64)
    # by the definition: scale and zero point of a channel are those of its group
    scale = plain.scale.float()[:, index]
    zero = 8.0 if plain.zero_point is None else plain.zero_point.float()[:, index]
    assert torch.equal(found.dequantize(), scale * (plain.codes.float() - zero))
    again = GPTQ_G_IDX.pack(found)
    assert all(torch.equal(again[k], packed[k]) for k in packed)


def test_layouts_without_group_index_refuse_channels_in_another_order() -> None:
    spec = TensorSpec(granularity=GROUP)
    packed = GPTQ_G_IDX.pack(quantized(spec, 32, 64)) | {"g_idx": torch.arange(64).int() % 2}
    found = GPTQ_G_IDX.unpack(packed, spec, 32, 64)
    for other in ("gptq", "gptq_v2", "awq", "ct_int", "mlx"):
        with pytest.raises(KernelError, match="desc_act"):
            find_layout(other).pack(found)
    ct = find_layout("ct_pack")
    assert equal(ct.unpack(ct.pack(found), spec, 32, 64), found)


def test_groups_of_unequal_size_are_refused() -> None:
    spec = TensorSpec(granularity=GROUP)
    packed = GPTQ_G_IDX.pack(quantized(spec, 32, 64)) | {"g_idx": torch.zeros(64).int()}
    with pytest.raises(KernelError, match=r"each of 2 groups 32 times"):
        GPTQ_G_IDX.unpack(packed, spec, 32, 64)


def test_version_1_refuses_a_zero_point_of_zero() -> None:
    spec = TensorSpec(granularity=Granularity(Span.CHANNEL), symmetric=False)
    weight = quantized(spec, 32, 64)
    assert weight.zero_point is not None
    zero = weight.zero_point.clone()
    zero[3] = 0
    with pytest.raises(KernelError, match="cannot hold a zero point of 0"):
        GPTQ.pack(replace(weight, zero_point=zero))
    assert GPTQ_V2.pack(replace(weight, zero_point=zero))


def test_version_1_zero_points_that_wrapped_are_read_as_zero() -> None:
    spec = TensorSpec(granularity=Granularity(Span.CHANNEL), symmetric=False)
    packed = GPTQ.pack(_asymmetric(spec))
    packed["qzeros"] = torch.full_like(packed["qzeros"], -1)  # every stored value is 15
    zero = GPTQ.unpack(packed, spec, 32, 64).zero_point
    assert zero is not None
    assert zero.unique().tolist() == [0]


def _asymmetric(spec: TensorSpec) -> QuantizedWeight:
    weight = quantized(spec, 32, 64)
    assert weight.zero_point is not None
    return replace(weight, zero_point=weight.zero_point.clamp_min(1))


def test_a_symmetric_checkpoint_with_other_zero_points_is_refused() -> None:
    weight = quantized(TensorSpec(granularity=GROUP), 32, 64)
    with pytest.raises(KernelError, match="zero points are not all 8"):
        GPTQ_V2.unpack(GPTQ.pack(weight), weight.spec, 32, 64)


def test_a_tensor_of_wrong_type_is_named() -> None:
    weight = quantized(TensorSpec(granularity=GROUP), 32, 64)
    packed = GPTQ.pack(weight)
    packed["scales"] = packed["scales"].float()
    with pytest.raises(KernelError, match=r"scales .* must be torch.float16 .* found torch.float3"):
        GPTQ.unpack(packed, weight.spec, 32, 64)


def test_unpack_refuses_what_pack_refuses() -> None:
    spec = TensorSpec(granularity=Granularity(Span.TENSOR))
    with pytest.raises(KernelError, match="one scale per group or channel"):
        GPTQ.unpack({}, spec, 32, 64)


def test_float_types_are_refused() -> None:
    spec = TensorSpec(data_type="mx_fp", granularity=GROUP)
    assert GPTQ.refuses(spec, 32, 64) == "gptq holds int of 2 to 8 bits, not mx_fp4"
