"""Backends on other people's 4-bit operators, against stand-ins on the CPU.

A stand-in has the name, the arguments and the documented arithmetic of the operator, in float64.
It shows that we hand over what the operator takes (order of bits, zero points, shapes, types); it
cannot show that the operator itself is right.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from ar_kernels.backends import Need, xpu_ipex
from ar_kernels.backends.cuda_tinygemm import TinyGemm
from ar_kernels.backends.hpu import Hpu
from ar_kernels.backends.probing import version
from ar_kernels.backends.xpu_ipex import XpuIpex
from ar_kernels.backends.xpu_onednn import XpuOneDnn
from ar_kernels.testing import BackendConformance
from ar_schemes import Granularity, Span, TensorSpec, scheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def spec(bits: int, group: int | None, *, symmetric: bool = True) -> TensorSpec:
    span = Granularity(Span.CHANNEL) if group is None else Granularity(Span.GROUP, (group,))
    return TensorSpec(bits=bits, granularity=span, symmetric=symmetric)


SPECS = (
    spec(4, 32),
    spec(4, 64, symmetric=False),
    spec(3, 32, symmetric=False),
    spec(2, None),
)
PLAIN = Need(SPECS[0], 32, 64, "cpu", torch.bfloat16)
REFUSED = (
    replace(PLAIN, device="cuda"),
    replace(PLAIN, spec=spec(8, 32)),
    replace(PLAIN, spec=scheme("MXFP4").weight),
    replace(PLAIN, spec=TensorSpec(granularity=Granularity(Span.TILE, (8, 32)))),
    replace(PLAIN, dtype=torch.float64),
    replace(PLAIN, activation=TensorSpec(bits=8, granularity=Granularity(Span.TOKEN))),
)


def signed(words: Tensor) -> Tensor:
    """Return int32 words [.., n] as their eight 4-bit fields, lowest first: [.., 8 * n]."""
    assert words.dtype == torch.int32
    fields = [(words >> (4 * j)) & 15 for j in range(8)]
    return torch.stack(fields, -1).flatten(-2)


def grouped(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """Return the weight [K, N] of codes [K, N], float64."""
    wide = [t.double().repeat_interleave(group, 0) for t in (scale, zero)]
    assert wide[0].shape == codes.shape
    return (codes.double() - wide[1]) * wide[0]


@pytest.fixture
def aten() -> Iterator[torch.library.Library]:
    library = torch.library.Library("aten", "IMPL")  # noqa: TOR901 - a stand-in, torn down below
    yield library
    library._destroy()


def tinygemm_pack(codes: Tensor, tiles: int) -> Tensor:
    """Stand in for the packing of CUDA: 4-D, a tile of 8 rows and 16 * tiles columns a block."""
    assert codes.dtype == torch.uint8
    rows, columns = codes.shape[0], codes.shape[1] * 2
    assert rows % 8 == 0
    assert tiles in (2, 4, 8)
    assert columns % (16 * tiles) == 0
    plain = torch.stack([codes >> 4, codes & 15], -1).reshape(rows, columns)
    blocks = plain.view(rows // 8, 8, columns // (16 * tiles), 16 * tiles).transpose(1, 2)
    eight = blocks.reshape(rows // 8, columns // (16 * tiles), 32, tiles // 2, 8).int()
    out = torch.zeros(eight.shape[:-1], dtype=torch.int32)
    for j in range(8):
        out |= eight[..., j] << (4 * j)
    return out


def tinygemm(x: Tensor, words: Tensor, group: int, pairs: Tensor) -> Tensor:
    assert x.dtype == pairs.dtype == torch.bfloat16
    assert x.ndim == 2
    assert x.is_contiguous()
    assert group in (32, 64, 128, 256)
    blocks = signed(words).reshape(words.shape[0], words.shape[1], 8, -1).transpose(1, 2)
    codes = blocks.reshape(words.shape[0] * 8, -1)
    assert pairs.shape == (codes.shape[1] // group, codes.shape[0], 2)
    scale, offset = (pairs[..., i].double().repeat_interleave(group, 0) for i in (0, 1))
    return (x.double() @ ((codes.t().double() - 8) * scale + offset)).to(x.dtype)


class TestTinyGemm(BackendConformance):
    subject = TinyGemm(device="cpu")
    specs = SPECS
    dtypes = (torch.bfloat16,)
    refused = (*REFUSED, replace(PLAIN, dtype=torch.float16), replace(PLAIN, rows=12))

    @pytest.fixture(autouse=True)
    def _stand_in(self, aten: torch.library.Library) -> None:
        aten.impl("_convert_weight_to_int4pack", tinygemm_pack, "CPU")
        aten.impl("_weight_int4pack_mm", tinygemm, "CPU")

    def test_groups_it_does_not_know_are_split(self) -> None:
        need = replace(PLAIN, spec=spec(4, 96), columns=192)
        assert self.subject.refuses(need) is None
        assert "no multiple of 32" in str(
            self.subject.refuses(replace(need, spec=spec(4, 16), columns=64))
        )


def onednn_pack(codes: Tensor, tiles: int) -> Tensor:
    """Stand in for the packing of XPU: eight codes an int32, the first in the low bits."""
    assert codes.dtype == torch.uint8
    assert tiles == 8
    return codes.contiguous().view(torch.int32)


def onednn(x: Tensor, words: Tensor, group: int, scale: Tensor, zero: Tensor) -> Tensor:
    assert x.dtype == scale.dtype
    assert x.ndim == 2
    assert x.is_contiguous()
    assert group % 32 == 0
    assert zero.dtype == torch.int8
    assert zero.shape == scale.shape
    return (x.double() @ grouped(signed(words).t(), scale, zero, group)).to(x.dtype)


class TestXpuOneDnn(BackendConformance):
    subject = XpuOneDnn(device="cpu")
    specs = SPECS
    refused = (*REFUSED, replace(PLAIN, spec=spec(4, 16)))
    tolerance = {**BackendConformance.tolerance, torch.float32: 1e-5}

    @pytest.fixture(autouse=True)
    def _stand_in(self, aten: torch.library.Library) -> None:
        aten.impl("_convert_weight_to_int4pack", onednn_pack, "CPU")
        aten.impl("_weight_int4pack_mm_with_scales_and_zeros", onednn, "CPU")

    def test_a_scale_that_bfloat16_rounds_is_kept_beside(self) -> None:
        need, weight, packed = next(self.cases())
        assert need.dtype == torch.float32
        assert set(packed.buffers) == {"words", "zero", "scale"}
        rounded = self.subject.pack(weight, replace(need, dtype=torch.bfloat16))
        assert set(rounded.buffers) == {"words", "zero", "scale", "stored_scale"}


def convert_from_uint4(
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    dtype: torch.dtype,
    g_idx: Tensor | None = None,
) -> Tensor:
    """Stand in for Gaudi's expansion: words [K, N / 8] hold eight neighbours along N."""
    assert g_idx is None
    assert zero is not None
    codes, group = signed(words), words.shape[0] // scale.shape[0]
    assert scale.dtype == dtype
    assert zero.shape == (scale.shape[0], words.shape[1])
    return grouped(codes, scale, signed(zero), group).to(dtype)


class TestHpu(BackendConformance):
    subject = Hpu(device="cpu")
    specs = (*SPECS, spec(4, 16))
    dtypes = (torch.bfloat16,)
    refused = (*REFUSED, replace(PLAIN, dtype=torch.float16))

    @pytest.fixture(autouse=True)
    def _skip_where_it_cannot_run(self) -> Iterator[None]:  # type: ignore[override]
        library = torch.library.Library("hpu", "DEF")  # noqa: TOR901
        library.define(
            "convert_from_uint4(Tensor input, Tensor scale, Tensor? zero_point, "
            "ScalarType out_dtype, Tensor? g_idx=None) -> Tensor"
        )
        library.impl("convert_from_uint4", convert_from_uint4, "CPU")
        yield
        library._destroy()

    def test_without_the_package_it_says_what_is_missing(self) -> None:
        assert "habana_frameworks" in str(Hpu().missing())


def mm_int4(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, group: int, g_idx: Tensor | None
) -> Tensor:
    """Stand in for the extension's product: words [K / 8, N], column by column."""
    assert g_idx is None
    assert words.stride(0) == 1
    assert zero.dtype == torch.int8
    assert zero.tolist() == [8]
    assert x.dtype == scale.dtype
    codes = signed(words.t()).t()
    zeros = torch.full(scale.shape, 8)
    return (x.double() @ grouped(codes, scale, zeros, group)).to(x.dtype)


class TestXpuIpex(BackendConformance):
    subject = XpuIpex(device="cpu")
    specs = (spec(4, 32), spec(4, None))
    dtypes = (torch.float16, torch.bfloat16)
    refused = (*REFUSED, replace(PLAIN, spec=spec(4, 32, symmetric=False)))

    @pytest.fixture(autouse=True)
    def _skip_where_it_cannot_run(self) -> Iterator[None]:  # type: ignore[override]
        library = torch.library.Library("torch_ipex", "DEF")  # noqa: TOR901
        library.define(
            "mm_int4(Tensor x, Tensor w, Tensor s, Tensor z, int group, Tensor? g_idx) -> Tensor"
        )
        library.impl("mm_int4", mm_int4, "CPU")
        yield
        library._destroy()


@pytest.mark.parametrize(
    ("installed", "torch_version", "reason"),
    [
        (None, "2.8.0", "the package intel-extension-for-pytorch"),
        ((2, 8, 0), "2.13.0+cpu", "torch 2.8 with"),
        ((2, 7, 0), "2.8.0", "torch 2.8 with"),
        ((2, 8, 10), "2.8.0+xpu", None),
    ],
)
def test_the_legacy_extension_is_used_only_with_the_torch_it_was_built_for(
    installed: tuple[int, ...] | None,
    torch_version: str,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(xpu_ipex, "version", lambda _: installed)
    monkeypatch.setattr(torch, "__version__", torch_version)
    found = XpuIpex(device="cpu").missing()
    assert found is None if reason is None else reason in str(found)


def test_versions_are_read_without_importing() -> None:
    assert version("no-such-package-at-all") is None
    found = version("torch")
    assert found is not None
    assert found[:2] == tuple(int(n) for n in torch.__version__.split(".")[:2])
