from __future__ import annotations

import pytest
import torch

from ar_kernels import equal, layout
from ar_kernels.layouts.base import optional_of
from ar_kernels.layouts.nibbles import pack_nibbles, unpack_nibbles
from ar_kernels.testing.layouts import LayoutConformance
from ar_kernels.testing.samples import quantized
from ar_kernels.weight import KernelError
from ar_schemes import Granularity, Span, scheme

INT4 = scheme("W4A16").with_overrides({"group_size": 32}).weight
INTS = tuple(
    INT4.with_(bits=bits, symmetric=sym, granularity=where)
    for bits in (2, 3, 4, 5, 8)
    for sym in (True, False)
    for where in (INT4.granularity, Granularity(Span.CHANNEL))
)


def spec_of(name: str):
    return scheme(name).weight


class TestAwq(LayoutConformance):
    subject = layout("awq")
    specs = tuple(s for s in INTS if s.bits == 4)
    refused = ((INTS[0], 32, 64), (INT4, 33, 64), (INT4.with_(scale_dtype="bfloat16"), 32, 64))


class TestCtPack(LayoutConformance):
    subject = layout("ct_pack")
    specs = (*INTS, INT4.with_(scale_dtype="bfloat16"))
    shapes = ((32, 64), (40, 96))
    refused = ((spec_of("MXFP4"), 32, 64),)


class TestCtInt(LayoutConformance):
    subject = layout("ct_int")
    specs = (*(s for s in INTS if s.bits >= 4), INT4.with_(scale_dtype="float32"))
    refused = ((spec_of("MXFP4"), 32, 64),)


MLX_BITS = (2, 3, 4, 5, 6, 8)
MLX_SPECS = tuple(
    INT4.with_(bits=bits, scale_dtype=dtype, data_type=kind, symmetric=kind == "int")
    for bits in MLX_BITS
    for kind, dtype in (("int", "bfloat16"), ("int_asym_float_zp", "float16"))
)


class TestMlx(LayoutConformance):
    subject = layout("mlx")
    specs = (*MLX_SPECS, scheme("W4A16").weight)
    shapes = ((32, 128), (5, 256))
    refused = (
        (INT4.with_(bits=7), 32, 64),
        (INT4.with_(symmetric=False), 32, 64),
        (INT4.with_(granularity=Granularity(Span.CHANNEL)), 32, 64),
        (spec_of("MXFP4"), 32, 64),
    )


class _Floats(LayoutConformance):
    shapes = ((128, 128), (256, 384))


class TestCtFloat(_Floats):
    subject = layout("ct_float")
    specs = tuple(spec_of(n) for n in ("FPW8A16", "FP8_STATIC", "FP8_BLOCK"))
    refused = ((spec_of("MXFP8"), 128, 128),)


class TestCtNvFp4(_Floats):
    subject = layout("ct_nvfp4")
    specs = (spec_of("NVFP4"),)
    refused = ((spec_of("MXFP4"), 128, 128),)


class TestCtMxFp4(_Floats):
    subject = layout("ct_mxfp4")
    specs = (spec_of("MXFP4"),)


class TestCtMxFp8(_Floats):
    subject = layout("ct_mxfp8")
    specs = (spec_of("MXFP8"),)


class TestFp8Block(_Floats):
    subject = layout("fp8_block")
    specs = (spec_of("FP8_BLOCK"),)


class TestFp8Static(_Floats):
    subject = layout("fp8_static")
    specs = (spec_of("FP8_STATIC"), spec_of("FP8_STATIC").with_(scale_dtype="bfloat16"))


class TestMxInt(_Floats):
    subject = layout("mx_int")
    specs = (spec_of("MXINT4"),)


class TestNvFp4E5M3(_Floats):
    subject = layout("nvfp4_e5m3")
    specs = (spec_of("NVFP4_E5M3"),)


def test_the_published_word_of_awq() -> None:
    weight = quantized(INT4, 32, 32)
    weight.codes.copy_(torch.arange(8, dtype=torch.uint8).repeat(4)[:, None])
    assert (layout("awq").pack(weight)["qweight"] == 0x75316420).all()
    zeros = layout("awq").pack(weight)["qzeros"]
    assert (zeros.view(torch.uint8) == 0x88).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_compressed_tensors_reads_what_we_pack(bits, sym) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    spec = INT4.with_(bits=bits, symmetric=sym)
    weight = quantized(spec, 40, 96)
    packed = layout("ct_pack").pack(weight)
    codes = helpers.unpack_from_int32(packed["weight_packed"], bits, torch.Size([40, 96]))
    assert torch.equal(codes.short() + 2 ** (bits - 1), weight.codes.short())
    if not sym:
        zero = helpers.unpack_from_int32(
            packed["weight_zero_point"], bits, torch.Size([40, 3]), packed_dim=0
        )
        assert torch.equal(zero.short() + 2 ** (bits - 1), weight.zero_point.short())


def test_the_published_bytes_of_fp4() -> None:
    codes = torch.tensor([1, 15, 2, 4, 8, 6, 6, 2], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [0xF1, 0x42, 0x68, 0x26]
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


def test_mx_int_is_stored_as_sign_and_magnitude() -> None:
    weight = quantized(spec_of("MXINT4"), 1, 32)
    weight.codes[0, :4] = torch.tensor([8, 9, 7, 1], dtype=torch.uint8)
    assert layout("mx_int").pack(weight)["weight_packed"][0, :2].tolist() == [0x10, 0xF9]


@pytest.mark.parametrize(
    ("name", "key", "which"),
    [
        ("ct_float", "input_scale", "FP8_STATIC"),
        ("fp8_static", "input_scale", "FP8_STATIC"),
        ("ct_nvfp4", "input_global_scale", "NVFP4"),
    ],
)
def test_ranges_of_activations_are_kept_where_there_are_any(name, key, which) -> None:
    import dataclasses

    found = layout(name)
    assert set(optional_of(found)) == {key}
    bare = quantized(spec_of(which), 32, 64)
    weight = dataclasses.replace(bare, extra={**bare.extra, key: torch.tensor([0.25])})
    packed = found.pack(weight)
    assert packed[key].tolist() == [0.25]
    assert equal(found.unpack(packed, weight.spec, 32, 64), weight)
    assert equal(found.unpack(found.pack(bare), bare.spec, 32, 64), bare)
    assert optional_of(layout("gptq")) == {}


def test_mlx_means_scale_times_code_plus_bias() -> None:
    for spec in MLX_SPECS:
        weight = quantized(spec, 5, 64)
        packed = layout("mlx").pack(weight)
        scales, biases = (packed[k].float().repeat_interleave(32, 1) for k in ("scales", "biases"))
        assert torch.equal(weight.codes.float() * scales + biases, weight.dequantize()), spec


def test_biases_that_contradict_symmetry_are_refused() -> None:
    packed = layout("mlx").pack(quantized(INT4, 32, 64))
    packed["biases"] = packed["biases"] + 1
    with pytest.raises(KernelError, match="read it as asymmetric"):
        layout("mlx").unpack(packed, INT4, 32, 64)


def test_biases_that_overflow_are_refused() -> None:
    import dataclasses

    weight = quantized(INT4, 32, 64)
    weight = dataclasses.replace(weight, scale=torch.full_like(weight.scale, 60000.0))
    with pytest.raises(KernelError, match="overflow torch.float16 as biases"):
        layout("mlx").pack(weight)


def test_signed_codes_beyond_their_width_are_refused() -> None:
    weight = quantized(INT4, 32, 64)
    packed = layout("ct_int").pack(weight)
    packed["weight"][3, 5] = 9
    with pytest.raises(KernelError, match="exceed 4 bits"):
        layout("ct_int").unpack(packed, INT4, 32, 64)


def test_a_shape_that_says_otherwise_is_refused() -> None:
    packed = layout("ct_pack").pack(quantized(INT4, 32, 64))
    packed["weight_shape"] = torch.tensor([64, 32])
    with pytest.raises(KernelError, match="weight_shape says"):
        layout("ct_pack").unpack(packed, INT4, 32, 64)
