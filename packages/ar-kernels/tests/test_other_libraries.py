"""Backends on kernels of other libraries.

auto-round-lib runs on any CPU: where it is installed the real one is tested, elsewhere, and for
GPTQModel always, stand-ins with the same functions and the documented arithmetic in float64.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from ar_kernels.backends import Need
from ar_kernels.backends.ark import ARK, ARK_XPU
from ar_kernels.backends.gptqmodel import ExLlama, Marlin
from ar_kernels.testing import BackendConformance
from ar_schemes import Granularity, Span, TensorSpec, scheme

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def spec(bits: int, group: int | None, *, symmetric: bool = True) -> TensorSpec:
    span = Granularity(Span.CHANNEL) if group is None else Granularity(Span.GROUP, (group,))
    return TensorSpec(bits=bits, granularity=span, symmetric=symmetric)


PLAIN = Need(spec(4, 32), 64, 128, "cpu", torch.float16)
REFUSED = (
    replace(PLAIN, device="cuda"),
    replace(PLAIN, spec=scheme("MXFP4").weight),
    replace(PLAIN, spec=TensorSpec(granularity=Granularity(Span.TILE, (8, 32)))),
    replace(PLAIN, dtype=torch.float64),
    replace(PLAIN, activation=TensorSpec(bits=8, granularity=Granularity(Span.TOKEN))),
)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: object) -> None:
    """Put a module of some functions, and its parents, where an import finds it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        made = ModuleType(".".join(parts[:i]))
        made.__path__ = []  # type: ignore[attr-defined]
        if made.__name__ not in sys.modules:
            monkeypatch.setitem(sys.modules, made.__name__, made)
        if i > 1:
            parent = sys.modules[".".join(parts[: i - 1])]
            monkeypatch.setattr(parent, parts[i - 1], sys.modules[made.__name__], raising=False)
    for key, value in functions.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


class FakeArk:
    """What auto_round_kernel does, with the weight itself as the block of bytes."""

    def repack_quantized_weight(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        group: int,
        compute: str,
        weight_type: str,
        scale_type: str,
        asymmetric: bool,
    ) -> Tensor:
        assert codes.dtype == zero.dtype == torch.int8
        assert all(t.is_contiguous() for t in (codes, scale, zero))
        assert scale.dtype == {"fp32": torch.float32, "fp16": torch.float16}[scale_type]
        assert scale.shape == zero.shape == (codes.shape[0] // group, codes.shape[1])
        assert isinstance(asymmetric, bool)
        peak = 2 ** (int(weight_type.removeprefix("int")) - 1)
        assert -peak <= int(codes.min()) <= int(codes.max()) < peak
        offset = zero.float() if asymmetric else torch.zeros_like(zero, dtype=torch.float32)
        wide = [t.repeat_interleave(group, 0) for t in (offset, scale.float())]
        return ((codes.float() - wide[0]) * wide[1]).view(torch.int8).flatten()

    def unpack_weight(
        self, block: Tensor, dtype: torch.dtype, n: int, k: int, *_: object
    ) -> Tensor:
        return block.view(torch.float32).view(k, n).t().to(dtype)

    def woqgemm(
        self, x: Tensor, block: Tensor, bias: Tensor, n: int, k: int, *how: object
    ) -> Tensor:
        assert x.ndim == 2
        assert x.dtype == bias.dtype
        out = x.double() @ self.unpack_weight(block, torch.float32, n, k, *how).t().double()
        return (out + bias.double() if bias.numel() else out).to(x.dtype)


@pytest.fixture
def ark(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("auto_round_kernel") is None:
        fake = FakeArk()
        names = ("repack_quantized_weight", "unpack_weight", "woqgemm")
        install(monkeypatch, "auto_round_kernel", **{n: getattr(fake, n) for n in names})


class TestArk(BackendConformance):
    subject = ARK
    specs = (
        spec(2, 16, symmetric=False),
        spec(3, 32),
        spec(4, 32, symmetric=False),
        spec(5, 16),
        spec(8, None, symmetric=False),
    )
    shapes = ((33, 64), (40, 192))
    refused = REFUSED

    @pytest.fixture(autouse=True)
    def _skip_where_it_cannot_run(self, ark: None) -> None:
        """Never skip: where the library is missing a stand-in is there."""


class TestArkXpu(BackendConformance):
    subject = replace(ARK_XPU, device="cpu")
    specs = (spec(4, 32), spec(8, None))
    dtypes = (torch.float16, torch.bfloat16)
    refused = (*REFUSED, replace(PLAIN, spec=spec(4, 32, symmetric=False)))

    @pytest.fixture(autouse=True)
    def _skip_where_it_cannot_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Always the stand-in: the real library has 8-bit activations on an XPU only."""
        fake = FakeArk()
        names = ("repack_quantized_weight", "unpack_weight", "woqgemm")
        install(monkeypatch, "auto_round_kernel", **{n: getattr(fake, n) for n in names})


def gptq_codes(words: Tensor, bits: int) -> Tensor:
    """Return the codes [K, N] of GPTQ's words [K * bits / 32, N]."""
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    fields = [(words >> (bits * j)) & (2**bits - 1) for j in range(32 // bits)]
    return torch.stack(fields, 1).flatten(0, 1)


def fake_marlin(monkeypatch: pytest.MonkeyPatch) -> None:
    types = SimpleNamespace(uint4b8=4, uint8b128=8)

    def repack(
        words: Tensor, perm: Tensor, size_k: int, size_n: int, num_bits: int, dtype: torch.dtype
    ) -> Tensor:
        assert perm.numel() == 0
        assert words.shape == (size_k * num_bits // 32, size_n)
        assert size_n % 64 == 0
        return words.flip(0).contiguous()  # an order of its own

    def permute(scale: Tensor, size_k: int, size_n: int, group_size: int) -> Tensor:
        assert scale.shape == (1 if group_size == -1 else size_k // group_size, size_n)
        return scale.flip(1).contiguous()

    def apply(
        input: Tensor,  # noqa: A002 - GPTQModel's name
        weight: Tensor,
        weight_scale: Tensor,
        weight_zp: Tensor,
        g_idx: Tensor,
        g_idx_sort_indices: Tensor,
        workspace: Tensor,
        wtype: int,
        output_size_per_partition: int,
        input_size_per_partition: int,
        is_k_full: bool,
        bias: Tensor | None = None,
    ) -> Tensor:
        assert input.dtype == weight_scale.dtype
        assert all(t.numel() == 0 for t in (weight_zp, g_idx, g_idx_sort_indices))
        assert workspace.dtype == torch.int32
        assert is_k_full
        codes = gptq_codes(weight.flip(0).contiguous(), wtype).double() - 2 ** (wtype - 1)
        scale = weight_scale.flip(1).double()
        dense = codes * scale.repeat_interleave(input_size_per_partition // scale.shape[0], 0)
        assert dense.shape == (input_size_per_partition, output_size_per_partition)
        return (input.double() @ dense).to(input.dtype)

    install(
        monkeypatch,
        "gptqmodel.utils.marlin",
        gptq_marlin_repack=repack,
        marlin_permute_scales=permute,
        marlin_make_workspace_new=lambda device: torch.zeros(128, dtype=torch.int32, device=device),
        apply_gptq_marlin_linear=apply,
    )
    install(monkeypatch, "gptqmodel.utils.marlin_scalar_type", scalar_types=types)


class TestMarlin(BackendConformance):
    subject = Marlin(device="cpu")
    specs = (spec(4, 32), spec(8, 128), spec(4, None), spec(4, 96))
    shapes = ((64, 384),)
    dtypes = (torch.float16, torch.bfloat16)
    refused = (
        *REFUSED,
        replace(PLAIN, spec=spec(4, 32, symmetric=False)),
        replace(PLAIN, spec=spec(3, 32)),
        replace(PLAIN, spec=spec(4, 16)),
        replace(PLAIN, rows=96),
    )

    @pytest.fixture(autouse=True)
    def _skip_where_it_cannot_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_marlin(monkeypatch)


def fake_exllama(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices: list[Callable[[Tensor], Tensor]] = []

    def make(
        q_weight: Tensor,
        q_perm: None,
        q_invperm: None,
        q_scale: None,
        q_scale_max: None,
        q_groups: None,
        gptq_qzeros: Tensor,
        gptq_scales: Tensor,
        gptq_g_idx: None,
        temp_dq: Tensor,
    ) -> int:
        codes = gptq_codes(q_weight, 4)
        assert gptq_scales.dtype == temp_dq.dtype == torch.float16
        assert temp_dq.numel() >= codes.numel()
        fields = [(gptq_qzeros >> (4 * j)) & 15 for j in range(8)]
        zero = torch.stack(fields, -1).flatten(1)
        assert zero.shape == gptq_scales.shape
        group = codes.shape[0] // zero.shape[0]
        wide = [t.double().repeat_interleave(group, 0) for t in (zero, gptq_scales)]
        dense = (codes.double() - wide[0]) * wide[1]
        q_weight.zero_()  # the kernel shuffles the words in place: nobody may need them any more
        matrices.append(lambda a: a.double() @ dense)
        return len(matrices) + 139_000_000_000_000

    def gemm(a: Tensor, handle: int, c: Tensor, force_cuda: bool) -> None:
        assert a.dtype == c.dtype == torch.float16
        assert not force_cuda
        c.copy_(matrices[handle - 139_000_000_000_001](a))

    install(
        monkeypatch,
        "gptqmodel.utils.exllamav2",
        exllamav2_make_q_matrix=make,
        exllamav2_gemm_half_q_half=gemm,
    )


class TestExLlama(BackendConformance):
    subject = ExLlama(device="cpu")
    specs = (spec(4, 32), spec(4, 64, symmetric=False), spec(4, None, symmetric=False))
    dtypes = (torch.float16,)
    refused = (*REFUSED, replace(PLAIN, dtype=torch.bfloat16), replace(PLAIN, spec=spec(3, 32)))

    @pytest.fixture(autouse=True)
    def _skip_where_it_cannot_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_exllama(monkeypatch)

    def test_layers_share_the_room_for_an_expanded_weight(self) -> None:
        packed = [packed for _, _, packed in self.cases() if packed.meta[0] == 32]
        assert len({p.buffers["space"].data_ptr() for p in packed}) == 1


@pytest.mark.parametrize(
    ("backend", "package"),
    [(ARK, "auto-round-lib"), (Marlin(), "gptqmodel")],
    ids=["ark", "marlin"],
)
def test_a_library_that_is_not_installed_is_named(backend: Marlin, package: str) -> None:
    if find_spec({"auto-round-lib": "auto_round_kernel"}.get(package, package)) is not None:
        pytest.skip(f"{package} is installed")
    assert backend.missing() == f"the package {package}"
