"""Quantized activations times quantized weights in torch's own `scaled_mm`.

FP8 with scales per tensor, row or block, MXFP8, and NVFP4 in four bits on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from torch.nn.functional import ScalingType

from ar_kernels.backends.base import PackedWeight
from ar_kernels.backends.probing import capability, lacks_device, wrong_device
from ar_kernels.backends.reference import decode_meta, encode_meta
from ar_kernels.backends.scaled_recipes import (
    RECIPES,
    SWIZZLE,
    Recipe,
    pairs,
    quantized_input,
    recipe_of,
    swizzled,
    unpaired,
    unswizzled,
)
from ar_kernels.backends.support import Support
from ar_kernels.weight import KernelError, QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels.backends.base import Need
    from ar_schemes import TensorSpec

_RANGES = ("input_scale", "input_global_scale")
_BLOCK = 128


@dataclass(frozen=True)
class ScaledMm:
    """Multiplies codes with codes; results are bfloat16.

    Attributes:
        device: torch device type; another one where a stand-in for the operator is tested.
    """

    device: str = "cuda"
    name: str = "cuda_scaled_mm"
    priority: int = 110
    status: str = "contract-tested with a stand-in for the operator, never run on a GPU"
    keeps_codes: bool = True

    @property
    def support(self) -> Support:
        """What it supports, as data; which pairs, `RECIPES` says."""
        widths: dict[str, tuple[int, ...]] = {}
        for recipe in RECIPES:
            widths |= dict.fromkeys(recipe.types, (recipe.bits,))
        return Support(
            devices=(self.device,),
            dtypes=(torch.bfloat16,),
            widths=widths,
            asymmetric=False,
            activations=tuple(widths),
        )

    def missing(self) -> str | None:
        """Return what this machine lacks for it, or None."""
        return lacks_device(self.device)

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        if need.device != self.device:
            return wrong_device(self.device, need.device)
        if need.activation is None:
            return "multiplies quantized activations only"
        recipe = recipe_of(need.spec, need.activation)
        if recipe is None:
            return f"torch has no product of {need.spec} weights and {need.activation} activations"
        if need.dtype != torch.bfloat16:
            return f"gives bfloat16 results, the layer computes in {need.dtype}"
        if need.rows % recipe.multiple or need.columns % recipe.multiple:
            return f"rows and columns must be multiples of {recipe.multiple}"
        return _unfit(recipe, self.device)

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return codes and scales as the operator takes them, and a static range if there is one.

        Raises:
            KernelError: activations are static and the weight brings no range for them.
        """
        assert need.activation is not None
        recipe = recipe_of(need.spec, need.activation)
        assert recipe is not None
        here = weight.to(need.device)
        buffers = {"codes": pairs(here.codes) if recipe.bits == 4 else here.codes}  # noqa: PLR2004
        buffers["scale"] = _ordered(here.scale, recipe, need.rows)
        if recipe.name == "nv":
            buffers["whole"] = here.extra["global_scale"]
        if not need.activation.dynamic:
            buffers["input"] = _range(here)
        names = encode_meta(need.activation, tuple(buffers))
        return PackedWeight(buffers, (RECIPES.index(recipe), need.rows, *names))

    def unpack(self, packed: PackedWeight, need: Need) -> QuantizedWeight:
        """Return the weight; the exact inverse of `pack`, ranges of activations left out."""
        recipe, buffers = RECIPES[packed.meta[0]], packed.buffers
        codes = buffers["codes"]
        shape = need.spec.granularity.scale_shape(need.rows, need.columns)
        return QuantizedWeight(
            spec=need.spec,
            codes=unpaired(codes) if recipe.bits == 4 else codes,  # noqa: PLR2004
            scale=_unordered(buffers["scale"], recipe, shape, need.spec),
            extra={"global_scale": buffers["whole"]} if "whole" in buffers else {},
        )

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:
        """Return the names of the buffers of a packed weight with this `meta`, in order."""
        return decode_meta(tuple(meta[2:]))[1]

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I], quantized, times the weight transposed, plus bias: [..., O]."""
        recipe, rows = RECIPES[packed.meta[0]], packed.meta[1]
        flat = x.reshape(-1, x.shape[-1])
        if not flat.shape[0]:
            return x.new_empty((*x.shape[:-1], rows))
        activation = decode_meta(packed.meta[2:])[0]
        found = _product(flat, activation, recipe, packed.buffers).reshape(*x.shape[:-1], rows)
        # added here: the operator takes a bias with some recipes only
        return (found if bias is None else found + bias.to(found.dtype)).to(x.dtype)


def _product(
    x: Tensor, activation: TensorSpec, recipe: Recipe, buffers: dict[str, Tensor]
) -> Tensor:
    """Return [M, O] in bfloat16."""
    a, scale, whole = quantized_input(x, activation, buffers.get("input"))
    b, other = buffers["codes"], buffers["scale"]
    kinds = recipe.kinds
    if recipe.name == "tensor":
        scales = scale.reshape(1), other
    elif recipe.name == "row":
        scales = scale.expand(x.shape[0], 1).contiguous(), other
    elif recipe.name == "block":
        # scales of the activations lie column by column; strides are checked even for one row
        scales = scale.t().flatten().view(scale.shape[1], -1).t(), other.t()
    else:
        scales = swizzled(scale), other
    if whole is None:
        swizzle = SWIZZLE if recipe.name == "mx" else None
        return functional.scaled_mm(
            a, b.view(torch.float8_e4m3fn).t(), scales[0], kinds[0], scales[1], kinds[1],
            swizzle_a=swizzle, swizzle_b=swizzle, output_dtype=torch.bfloat16,
        )  # fmt: skip
    # checkpoints hold what divides, the operator takes what multiplies
    wholes = whole.reciprocal().reshape(1), buffers["whole"].reciprocal().reshape(1)
    two = [SWIZZLE, type(SWIZZLE).NO_SWIZZLE]
    return functional.scaled_mm(
        a.view(torch.float4_e2m1fn_x2), b.view(torch.float4_e2m1fn_x2).t(),
        [scales[0], wholes[0]], [kinds[0], ScalingType.TensorWise],
        [scales[1], wholes[1]], [kinds[1], ScalingType.TensorWise],
        swizzle_a=two, swizzle_b=two, output_dtype=torch.bfloat16,
    )  # fmt: skip


def _ordered(scale: Tensor, recipe: Recipe, rows: int) -> Tensor:
    """Return a weight's scale as the operator takes it."""
    if recipe.name == "tensor":
        return scale.float().reshape(1)
    if recipe.name == "row":
        return scale.float().reshape(1, -1).expand(1, rows).contiguous()
    if recipe.name == "block":
        # [O / 128, I / 128] with rows of a multiple of four
        return functional.pad(scale.float(), (0, -scale.shape[1] % 4))
    return swizzled(scale)


def _unordered(scale: Tensor, recipe: Recipe, shape: tuple[int, int], spec: TensorSpec) -> Tensor:
    """Return the inverse of `_ordered`."""
    if recipe.name in ("mx", "nv"):
        return unswizzled(scale, *shape)
    whole = scale[:, : shape[1]] if recipe.name == "block" else scale.reshape(-1)[: shape[0]]
    return whole.reshape(shape).contiguous().to(getattr(torch, spec.scale_dtype))


def _range(weight: QuantizedWeight) -> Tensor:
    found = next((weight.extra[n] for n in _RANGES if n in weight.extra), None)
    if found is None:
        msg = "activations are static, but the weight holds no range for them"
        raise KernelError(msg)
    return found.float().reshape(1)


def _unfit(recipe: Recipe, device: str) -> str | None:
    """Return why the GPU in use cannot multiply so, or None."""
    found = capability(device)
    if found is None:
        return None
    if found < recipe.oldest or (recipe.newest is not None and found > recipe.newest):
        only = "or newer" if recipe.newest is None else "exactly"
        need = ".".join(map(str, recipe.oldest))
        have = ".".join(map(str, found))
        return f"{recipe.name} scales need compute capability {need} {only}, the device has {have}"
    return None


CUDA_SCALED_MM = ScaledMm()
