"""GGUF's K types: groups of 16 or 32 whose scales (and minima) are integers of a super group.

A super group is 256 elements of a row. `int_sym_dq` (Q3_K, Q6_K): weight = super * scale * code,
codes and scales signed. `int_asym_dq` (Q2_K, Q4_K, Q5_K): weight = super * scale * code -
super_minimum * minimum, all unsigned. Everything is rounded exactly as it is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels.numerics.affine import AffineFakeQuant, affine_nearest, divisor
from ar_kernels.numerics.base import Params
from ar_kernels.numerics.checks import require_finite
from ar_kernels.numerics.grouping import expand, grouped, ungrouped
from ar_kernels.numerics.k_search import affine_fit, symmetric_fit
from ar_kernels.numerics.rounding import round_ste, to_float16
from ar_kernels.weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_schemes import TensorSpec

_FACTORS = (1.0, 0.94, 0.96, 0.98, 1.02, 1.04, 1.06)
"""Of a super scale, around the one that just holds the largest scale."""
_REFITS = 2


@dataclass(frozen=True)
class KQuant:
    """Data types `int_sym_dq` and `int_asym_dq`."""

    name: str
    symmetric: bool

    def refuses(self, spec: TensorSpec) -> str | None:
        """Return why a spec cannot be computed, or None."""
        if spec.super_group is None:
            return f"{self.name} needs super_group_size and super_bits"
        if not 2 <= spec.bits <= 8 or not 2 <= spec.super_group.bits <= 8:
            return f"{self.name} has codes and scales of 2 to 8 bits"
        if spec.symmetric is not self.symmetric:
            return f"{self.name} is {'symmetric' if self.symmetric else 'asymmetric'}"
        if spec.granularity.span != "group":
            return f"{self.name} has one scale per group, not per {spec.granularity}"
        return None

    def shared(self, weights: Sequence[Tensor], spec: TensorSpec) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the parameters that members of a fused group have in common: none."""
        return {}

    def parameters(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        low: Tensor | None = None,
        high: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> Params:
        """Return two-level parameters from the smallest and largest value of each group."""
        groups = grouped(weight.float(), spec.granularity)
        smallest, largest = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        smallest = smallest if low is None else smallest * low
        largest = largest if high is None else largest * high
        if not self.symmetric:
            return _two_levels((largest - smallest) / (2**spec.bits - 1), -smallest, spec)
        side = torch.where(-smallest >= largest, smallest, largest)
        return _two_levels(side / -(2 ** (spec.bits - 1)), None, spec)

    def rescale(self, params: Params, spec: TensorSpec, factor: Tensor) -> Params:
        """Return parameters with every scale times `factor`, in steps of its super group."""
        whole = params.extra["super_scale"]
        inner = _inner(params.scale * factor, whole, spec, signed=self.symmetric)
        scale = _spread(whole, spec) * inner
        return Params(scale, extra={**params.extra, "inner": inner})

    def quantize(
        self, weight: Tensor, spec: TensorSpec, params: Params, *, offset: Tensor | None = None
    ) -> QuantizedWeight:
        """Return the codes for a weight; `offset` [..., O, I] is added before rounding.

        Raises:
            KernelError: the weight or a scale is not finite.
        """
        require_finite(weight, spec, params)
        with torch.no_grad():
            groups = grouped(weight.float(), spec.granularity)
            shift = None if offset is None else grouped(offset, spec.granularity)
            codes = _codes(groups, params, spec, shift)
            if self.symmetric:
                codes = codes + 2 ** (spec.bits - 1)
        extra = {"super_scale": params.extra["super_scale"].detach().half()}
        if not self.symmetric:
            extra |= {
                "minimum": params.extra["inner_minimum"].detach().to(torch.uint8),
                "super_minimum": params.extra["super_minimum"].detach().half(),
            }
        inner = params.extra["inner"].detach()
        return QuantizedWeight(
            spec=spec,
            codes=ungrouped(
                codes.to(torch.uint8), tuple(weight.shape), spec.granularity
            ).contiguous(),
            scale=inner.to(torch.int8 if self.symmetric else torch.uint8),
            extra=extra,
        )

    def dequantize(self, weight: QuantizedWeight) -> Tensor:
        """Return the float32 weight, computed in the order that GGUF readers compute in."""
        spec, shape = weight.spec, weight.shape
        scale = _spread(weight.extra["super_scale"].float(), spec) * weight.scale.float()
        scale = expand(scale, shape, spec.granularity)
        if self.symmetric:
            return (weight.codes.float() - 2 ** (spec.bits - 1)) * scale
        whole = _spread(weight.extra["super_minimum"].float(), spec)
        minimum = expand(whole * weight.extra["minimum"].float(), shape, spec.granularity)
        return weight.codes.float() * scale - minimum

    def fake_quant(
        self, weight: Tensor, spec: TensorSpec, params: Params, *, offset: Tensor | None = None
    ) -> Tensor:
        """Return quantize + dequantize, float32, straight-through gradients."""
        minimum = params.extra.get("minimum")
        peak = 2 ** (spec.bits - 1)
        fake: Tensor = AffineFakeQuant.apply(
            grouped(weight.float(), spec.granularity),
            params.scale.unsqueeze(-1),
            None if minimum is None else minimum.unsqueeze(-1),
            None if offset is None else grouped(offset, spec.granularity),
            -peak if self.symmetric else 0,
            peak - 1 if self.symmetric else 2 * peak - 1,
        )
        return ungrouped(fake, tuple(weight.shape), spec.granularity)

    def nearest(self, values: Tensor, spec: TensorSpec, params: Params) -> Tensor:
        """Return the representable values nearest to `values`; see `Columnwise`."""
        peak = 2 ** (spec.bits - 1)
        bounds = (-peak, peak - 1) if self.symmetric else (0, 2 * peak - 1)
        return affine_nearest(values, params, *bounds)

    def params_of(self, weight: QuantizedWeight) -> Params:
        """Return the parameters a weight was quantized with; see `Columnwise`."""
        spec, whole = weight.spec, weight.extra["super_scale"].float()
        extra = {"inner": weight.scale.float(), "super_scale": whole}
        if not self.symmetric:
            below, inner = weight.extra["super_minimum"].float(), weight.extra["minimum"].float()
            minimum = -(_spread(below, spec) * inner)
            extra |= {"inner_minimum": inner, "super_minimum": below, "minimum": minimum}
        return Params(_spread(whole, spec) * extra["inner"], extra=extra)

    def search(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> Params:
        """Return two-level parameters of low weighted squared error."""
        groups = grouped(weight.float(), spec.granularity)
        weights = torch.ones_like(groups)
        if importance is not None:
            weights = grouped(importance.float().expand(weight.shape), spec.granularity)
        if self.symmetric:
            scale, minimum = symmetric_fit(groups, weights, 2 ** (spec.bits - 1)), None
        else:
            scale, lowest = affine_fit(groups, weights, 2**spec.bits - 1, signed=False)
            minimum = -lowest
        best = self.parameters(weight, spec)
        error = _error(groups, weights, best, spec)
        for factor in _FACTORS:
            best, error = _better(
                best, error, _two_levels(scale, minimum, spec, factor), groups, weights, spec
            )
        for _ in range(_REFITS):
            best, error = _better(
                best, error, _refitted(best, groups, weights, spec), groups, weights, spec
            )
        return best


def _two_levels(
    scale: Tensor, minimum: Tensor | None, spec: TensorSpec, factor: float = 1.0
) -> Params:
    """Return parameters whose scales and minima are rounded to their super groups' levels."""
    assert spec.super_group is not None
    signed = minimum is None
    levels = 2 ** (spec.super_group.bits - 1) if signed else 2**spec.super_group.bits - 1
    many = _by_super(scale, spec)
    if signed:
        low, high = many.amin(-1), many.amax(-1)
        largest = torch.where(-low >= high, low, high)
        whole = _half(largest * factor / -levels)
    else:
        whole = _half(many.amax(-1) * factor / levels)
    inner = _inner(scale, whole, spec, signed=signed)
    extra = {"inner": inner, "super_scale": whole}
    if minimum is not None:
        below = _half(_by_super(minimum, spec).amax(-1) / levels)
        inner_minimum = _inner(minimum, below, spec, signed=False)
        extra |= {
            "inner_minimum": inner_minimum,
            "super_minimum": below,
            "minimum": -(_spread(below, spec) * inner_minimum),
        }
    return Params(_spread(whole, spec) * inner, extra=extra)


def _refitted(params: Params, groups: Tensor, weights: Tensor, spec: TensorSpec) -> Params:
    """Return parameters whose super scales are least-squares fits for the codes as they are."""
    codes = _codes(groups, params, spec, None)
    a = _flat(codes * params.extra["inner"].unsqueeze(-1), spec)
    x, w = _flat(groups, spec), _flat(weights, spec)
    if "inner_minimum" not in params.extra:
        whole = (w * a * x).sum(-1) / (w * a * a).sum(-1).clamp_min(1e-30)
        whole = _half(whole)
        scale = _spread(whole, spec) * params.extra["inner"]
        return Params(scale, extra={**params.extra, "super_scale": whole})
    b = _flat(params.extra["inner_minimum"].unsqueeze(-1).expand(groups.shape), spec)
    aa, bb, ab = (w * a * a).sum(-1), (w * b * b).sum(-1), (w * a * b).sum(-1)
    ax, bx = (w * a * x).sum(-1), (w * b * x).sum(-1)
    det = (aa * bb - ab * ab).clamp_min(1e-30)
    whole = _half(((bb * ax - ab * bx) / det).clamp_min(0))
    below = _half(((ab * ax - aa * bx) / det).clamp_min(0))
    return Params(
        _spread(whole, spec) * params.extra["inner"],
        extra={
            **params.extra,
            "super_scale": whole,
            "super_minimum": below,
            "minimum": -(_spread(below, spec) * params.extra["inner_minimum"]),
        },
    )


def _better(
    best: Params, error: Tensor, other: Params, groups: Tensor, weights: Tensor, spec: TensorSpec
) -> tuple[Params, Tensor]:
    """Return, super group by super group, the parameters of less error, and that error."""
    theirs = _error(groups, weights, other, spec)
    better = theirs < error
    per_group = _spread(better, spec)

    def pick(mine: Tensor, new: Tensor) -> Tensor:
        where = better if mine.shape == better.shape else per_group
        return torch.where(where, new, mine)

    extra = {name: pick(best.extra[name], other.extra[name]) for name in best.extra}
    return Params(pick(best.scale, other.scale), extra=extra), torch.where(better, theirs, error)


def _error(groups: Tensor, weights: Tensor, params: Params, spec: TensorSpec) -> Tensor:
    minimum = params.extra.get("minimum")
    values = _codes(groups, params, spec, None) * params.scale.unsqueeze(-1)
    if minimum is not None:
        values = values + minimum.unsqueeze(-1)
    error: Tensor = _by_super(((values - groups).square() * weights).sum(-1), spec).sum(-1)
    return torch.where(error.isfinite(), error, torch.inf)


def _codes(groups: Tensor, params: Params, spec: TensorSpec, offset: Tensor | None) -> Tensor:
    """Return the codes, signed where there is no minimum."""
    minimum = params.extra.get("minimum")
    steps = groups if minimum is None else groups - minimum.unsqueeze(-1)
    steps = steps / divisor(params.scale).unsqueeze(-1)
    rounded = (steps if offset is None else steps + offset).round()
    peak = 2 ** (spec.bits - 1)
    return rounded.clamp(-peak, peak - 1) if minimum is None else rounded.clamp(0, 2 * peak - 1)


def _inner(values: Tensor, whole: Tensor, spec: TensorSpec, *, signed: bool) -> Tensor:
    assert spec.super_group is not None
    levels = 2**spec.super_group.bits
    steps = round_ste(values / divisor(_spread(whole, spec)))
    return steps.clamp(-levels // 2, levels // 2 - 1) if signed else steps.clamp(0, levels - 1)


def _half(x: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max
    return to_float16(x.clamp(-limit, limit))


def _by_super(values: Tensor, spec: TensorSpec) -> Tensor:
    """Return [..., G] as [..., S, g], or raise where super groups do not divide."""
    assert spec.super_group is not None
    return values.unflatten(-1, (-1, spec.super_group.size))


def _spread(whole: Tensor, spec: TensorSpec) -> Tensor:
    """Return one value per super group [..., S] as one per group [..., G]."""
    assert spec.super_group is not None
    return whole.repeat_interleave(spec.super_group.size, dim=-1)


def _flat(elements: Tensor, spec: TensorSpec) -> Tensor:
    """Return [..., G, n] as [..., S, g * n]."""
    assert spec.super_group is not None
    return elements.unflatten(-2, (-1, spec.super_group.size)).flatten(-2)
