"""Marlin and ExLlamaV2 as GPTQModel builds them, where it is installed. NVIDIA GPUs.

GPTQModel compiles its kernels on first use, which takes minutes and a CUDA toolkit.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.backends import four_bits
from ar_kernels.backends.base import PackedWeight
from ar_kernels.backends.probing import capability, lacks, lacks_device, wrong_device
from ar_kernels.backends.support import Support

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels.backends.base import Need
    from ar_kernels.weight import QuantizedWeight

_STATUS = "contract-tested with stand-ins for GPTQModel's functions (7.x), never run on a GPU"


class Marlin:
    """Symmetric integers of 4 or 8 bits, half or bfloat16."""

    name = "marlin"
    priority = 105
    status = _STATUS
    keeps_codes = False

    def __init__(self, device: str = "cuda") -> None:
        """Take the device type; another than `cuda` where stand-ins are tested."""
        self.device = device
        self.support = Support(
            devices=(device,),
            dtypes=(torch.float16, torch.bfloat16),
            widths={"int": (4, 8)},
            spans=("group", "channel"),
            group_step=32,
            asymmetric=False,
        )

    def missing(self) -> str | None:
        """Return what this machine lacks for it, or None."""
        return lacks("gptqmodel") or lacks_device(self.device)

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        groups = tuple({need.columns, 32, 64, 128})
        why = wrong_device(self.device, need.device)
        why = why or four_bits.refuses(need, groups=groups, bits=(4, 8))
        if why is not None:
            return why
        if not need.spec.symmetric:
            return "multiplies symmetric integers only"
        if need.dtype not in (torch.float16, torch.bfloat16):
            return f"computes in float16 or bfloat16, not {need.dtype}"
        if need.rows % 64 or need.columns % 128:
            return "needs rows in multiples of 64 and columns in multiples of 128"
        found = capability(self.device)
        if found is not None and found < (8, 0):
            return f"needs compute capability 8.0 or newer, the device has {found[0]}.{found[1]}"
        return None

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return words and scales in Marlin's order, and the space its blocks agree in."""
        from gptqmodel.utils import marlin

        rows, columns, bits = need.rows, need.columns, need.spec.bits
        group = need.spec.granularity.region(rows, columns)[1]
        if group != columns:
            group = four_bits.split_group(need.spec, columns, (32, 64, 128)) or group
        here = weight.to(need.device)
        found = four_bits.parts(here, group)
        none = torch.empty(0, dtype=torch.int32, device=need.device)
        words = marlin.gptq_marlin_repack(
            gptq_words(found.codes, bits), none, columns, rows, bits, dtype=need.dtype
        )
        scale = marlin.marlin_permute_scales(
            found.scale.to(need.dtype).contiguous(),
            size_k=columns,
            size_n=rows,
            group_size=-1 if group == columns else group,
        )
        space = marlin.marlin_make_workspace_new(here.codes.device)
        buffers = {"words": words, "scale": scale, "none": none, "space": space}
        return PackedWeight(buffers, (rows, columns, bits))

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of the buffers of a packed weight with this `meta`, in order."""
        return ("words", "scale", "none", "space")

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x."""
        from gptqmodel.utils import marlin
        from gptqmodel.utils.marlin_scalar_type import scalar_types

        rows, columns, bits = packed.meta
        buffers = packed.buffers
        if not x.numel():
            return x.new_empty((*x.shape[:-1], rows))
        none = buffers["none"]
        out: Tensor = marlin.apply_gptq_marlin_linear(
            input=x.to(buffers["scale"].dtype).contiguous(),
            weight=buffers["words"],
            weight_scale=buffers["scale"],
            weight_zp=none,
            g_idx=none,
            g_idx_sort_indices=none,
            workspace=buffers["space"],
            wtype=scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128,  # noqa: PLR2004
            output_size_per_partition=rows,
            input_size_per_partition=columns,
            is_k_full=True,
        )
        # added here: Marlin wants a bias in an order of its own
        return (out if bias is None else out + bias.to(out.dtype)).to(x.dtype)


class ExLlama:
    """Integers of 4 bits, in half precision."""

    name = "exllama"
    priority = 60
    status = _STATUS
    keeps_codes = False

    def __init__(self, device: str = "cuda") -> None:
        """Take the device type; another than `cuda` where stand-ins are tested."""
        self.device = device
        self.support = Support(
            devices=(device,),
            dtypes=(torch.float16,),
            widths={"int": (4,)},
            spans=("group", "channel"),
            group_step=32,
        )

    def missing(self) -> str | None:
        """Return what this machine lacks for it, or None."""
        return lacks("gptqmodel") or lacks_device(self.device)

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        groups = tuple({need.columns, 32, 64, 128})
        why = wrong_device(self.device, need.device)
        why = why or four_bits.refuses(need, groups=groups, bits=(4,))
        if why is None and need.dtype != torch.float16:
            why = f"computes in float16, not {need.dtype}"
        if why is None and (need.rows % 32 or need.columns % 32):
            why = "needs rows and columns in multiples of 32"
        return why

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return the tensors ExLlama keeps pointers into; the last integer is its handle."""
        from gptqmodel.utils.exllamav2 import exllamav2_make_q_matrix

        rows, columns = need.rows, need.columns
        group = need.spec.granularity.region(rows, columns)[1]
        if group != columns:
            group = four_bits.split_group(need.spec, columns, (32, 64, 128)) or group
        found = four_bits.parts(weight.to(need.device), group)
        buffers = {
            "words": gptq_words(found.codes, 4),
            # as they are, not minus one: GPTQModel's own kernel reads the second GPTQ format
            "zero": four_bits.words(found.zero),
            "scale": found.scale.to(torch.float16).contiguous(),
            "space": _space(found.codes.device, 2 * rows * columns + 128),
        }
        handle = exllamav2_make_q_matrix(
            *(buffers["words"], None, None, None, None, None),
            *(buffers["zero"], buffers["scale"], None, buffers["space"]),
        )
        return PackedWeight(buffers, (rows, int(handle)))

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of the buffers of a packed weight with this `meta`, in order."""
        return ("words", "zero", "scale", "space")

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x."""
        from gptqmodel.utils.exllamav2 import exllamav2_gemm_half_q_half

        rows, handle = packed.meta
        flat = x.reshape(-1, x.shape[-1]).to(torch.float16).contiguous()
        out = flat.new_empty(flat.shape[0], rows)
        if flat.shape[0]:
            exllamav2_gemm_half_q_half(flat, handle, out, False)
        out = out.reshape(*x.shape[:-1], rows)
        return (out if bias is None else out + bias.to(out.dtype)).to(x.dtype)


def gptq_words(codes: Tensor, bits: int) -> Tensor:
    """Return codes [O, I] as GPTQ stores them: int32 [I * bits / 32, O]."""
    bytes_ = four_bits.nibbles(codes) if bits == 4 else codes.contiguous()  # noqa: PLR2004
    return bytes_.view(torch.int32).t().contiguous()


_SPACES: weakref.WeakValueDictionary[Any, torch.Tensor] = weakref.WeakValueDictionary()
"""Room for one expanded weight per device and size, shared by the layers that are alive."""


def _space(device: torch.device, size: int) -> torch.Tensor:
    rounded = 1 << (size - 1).bit_length()
    found = _SPACES.get((device, rounded))
    if found is None:
        found = torch.empty(rounded // 2, dtype=torch.float16, device=device)
        _SPACES[device, rounded] = found
    return found
