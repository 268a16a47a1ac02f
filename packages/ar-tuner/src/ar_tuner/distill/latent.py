"""A quantized weight that can move: what lies behind its codes, and a factor per scale.

The latent weight is a float weight that rounds to the codes. It starts between the codes and the
original weight, a margin away from every border, so that a code changes only where the gradient
pushes one way for many steps. (Latents left where signed gradients put them lie on the borders:
the first steps then flip codes at random. Held-out KL at 3 bits after 25 steps: .047 without the
margin, .0351 with it, from .0359.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ar_kernels import data_type
from ar_kernels.native import tuning
from ar_kernels.numerics.columns import params_of
from ar_kernels.numerics.elements import FloatElement
from ar_kernels.numerics.floats import FloatType
from ar_kernels.numerics.grouping import expand
from ar_tuner.distill.moments import Moments
from ar_tuner.distill.moving import StoredLeaf, compiled

if TYPE_CHECKING:
    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_kernels.numerics import Params
    from ar_tuner.stages import ModelTarget

MARGIN = 0.04
"""Least distance from a border at the start, in quantization steps."""
COARSE = 7
"""Codes move up to this many bits; rounding wider ones better gains nothing."""
_SHRINKS = 3
_NEARLY = 0.9
"""Share of the margin that is tried: the whole one would lie on the border itself."""


@dataclass(frozen=True)
class Latent(StoredLeaf):
    """One weight in motion.

    Attributes:
        target: which weight.
        params: scales and whatever else it was quantized with.
        value: latent weight, float32 [O, I].
        unit: quantization step at each element, float32 [O, I]; None when codes stay.
        factor: of the scales, float32, their shape; None when they stay.
        value_moments, factor_moments: of the gradients.
    """

    target: ModelTarget
    params: Params
    value: Tensor
    unit: Tensor | None
    factor: Tensor | None
    value_moments: Moments | None
    factor_moments: Moments | None

    @classmethod
    def of(cls, target: ModelTarget, *, codes: bool = True, scales: bool = True) -> Latent | None:
        """Return a weight as it stands; `codes` and `scales` say what may move.

        None where the data type cannot tell the parameters of a quantized weight.
        """
        weight = target.weight
        params = params_of(weight, kind=data_type(weight.spec.data_type))
        if params is None:
            return None
        codes = codes and weight.spec.bits <= COARSE
        # powers of two cannot move a little; scales of two levels are searched as a whole
        scales = scales and weight.spec.scale_dtype != "e8m0" and weight.spec.super_group is None
        unit = _spacing(weight) if codes else None
        value = weight.dequantize()
        if unit is not None:
            value = _behind(target, params, value, unit)
        factor = torch.ones_like(params.scale) if scales else None
        return cls(
            target,
            params,
            value,
            unit,
            factor,
            Moments.like(value) if codes else None,
            None if factor is None else Moments.like(factor),
        )

    def stored(self, like: Tensor) -> Tensor:
        """Return the weight as the model's parameter: rounded, its orientation and type."""
        with torch.no_grad():
            if self._compiled(like):
                growth, params = self._growth()
                return self.target.view(
                    tuning.make(self._latent(growth, params), like.dtype)
                ).contiguous()
            return self.target.view(self._rounded()).to(like.dtype).contiguous()

    def quantize(self) -> QuantizedWeight:
        """Return codes and scales as they stand, ranges of activations included."""
        before = self.target.weight
        with torch.no_grad():
            value, params = self._pair()
            made = data_type(before.spec.data_type).quantize(value, before.spec, params)
        kept = {k: v for k, v in before.extra.items() if k not in made.extra}
        return replace(made, extra={**made.extra, **kept})

    def step(self, grad: Tensor, step: int, *, codes: float, scales: float) -> None:
        """Move against the gradient of the stored parameter.

        Args:
            grad: of the parameter as `stored` returned it.
            step: number of the step, from 0.
            codes: step size of the latent weight, in quantization steps.
            scales: step size of the factors.
        """
        leaves = [] if self.unit is None else [self.value]
        leaves += [] if self.factor is None else [self.factor]
        if not leaves:
            return
        if self._compiled(grad):
            self._step_compiled(grad, step, codes=codes, scales=scales)
            return
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.enable_grad():
            rounded = self._rounded()
        grads = torch.autograd.grad(rounded, leaves, self.target.view(grad).float())
        for leaf in leaves:
            leaf.requires_grad_(False)  # noqa: FBT003
        for leaf, found in zip(leaves, grads, strict=True):
            if leaf is self.value:
                assert self.unit is not None
                assert self.value_moments is not None
                self.value_moments.move(leaf, found, step, self.unit * codes)
            else:
                assert self.factor_moments is not None
                self.factor_moments.move(leaf, found, step, scales)

    def _step_compiled(self, grad: Tensor, step: int, *, codes: float, scales: float) -> None:
        adam = None
        if self.value_moments is not None:
            adam = self.value_moments.adam(step, codes, self.unit)
        if self.factor is None:
            growth, params = self._growth()
            tuning.move(self._latent(growth, params), self.target.view(grad), adam)
            return
        assert self.factor_moments is not None
        self.factor.requires_grad_()
        with torch.enable_grad():
            growth, params = self._growth()
        assert growth is not None
        latent = self._latent(growth.detach(), replace(params, scale=params.scale.detach()))
        elements, steps, values = tuning.move(latent, self.target.view(grad), adam)
        outputs, grads = (params.scale, growth), (elements.sub_(steps), values)
        (found,) = torch.autograd.grad(outputs, self.factor, grads)
        self.factor.requires_grad_(False)  # noqa: FBT003
        self.factor_moments.move(self.factor, found, step, scales)

    def _compiled(self, other: Tensor) -> bool:
        """Tell whether the compiled kernels move this weight; `other`: its gradient, or like it."""
        kind = data_type(self.target.weight.spec.data_type)
        return (
            isinstance(kind, FloatType)
            and type(kind).fake_quant is FloatType.fake_quant
            and isinstance(kind.element(self.target.weight.spec), FloatElement)
            and "minimum" not in self.params.extra
            and (self.unit is None or self.unit.is_contiguous())
            and compiled(self.value, self.params.scale, other)
        )

    def _latent(self, growth: Tensor | None, params: Params) -> tuning.Latent:
        spec = self.target.weight.spec
        kind = data_type(spec.data_type)
        assert isinstance(kind, FloatType)
        element = kind.element(spec)
        assert isinstance(element, FloatElement)
        growth = None if growth is None else growth.contiguous()
        scale = params.scale.contiguous()
        return tuning.Latent(self.value, scale, growth, None, tuning.constants(element))

    def _growth(self) -> tuple[Tensor | None, Params]:
        """Return by what share groups of the value grow, if any, and the parameters."""
        if self.factor is None:
            return None, self.params
        spec = self.target.weight.spec
        params = data_type(spec.data_type).rescale(self.params, spec, self.factor)
        # by what the stored scale grew: a scale of 8 bits moves in leaps that codes must follow
        ratio = params.scale / torch.where(self.params.scale == 0, 1.0, self.params.scale)
        return ratio - 1.0, params

    def _pair(self) -> tuple[Tensor, Params]:
        """Return latent weight and parameters; a factor moves both, so that codes stay."""
        share, params = self._growth()
        if share is None:
            return self.value, params
        spec = self.target.weight.spec
        shape = tuple(self.value.shape)
        growth = expand(share, shape, spec.granularity)
        minimum = self.params.extra.get("minimum")  # where it is not 0 that stays in place
        if minimum is None:
            return self.value + self.value * growth, params
        floor = expand(minimum, shape, spec.granularity)
        return self.value + (self.value - floor) * growth, params

    def _rounded(self) -> Tensor:
        value, params = self._pair()
        spec = self.target.weight.spec
        return data_type(spec.data_type).fake_quant(value, spec, params)


def _spacing(weight: QuantizedWeight) -> Tensor:
    """Return the distance of each value to a neighbour: the code with the last bit changed."""
    other = replace(weight, codes=weight.codes ^ 1)
    return (other.dequantize() - weight.dequantize()).abs()


def _behind(target: ModelTarget, params: Params, value: Tensor, unit: Tensor) -> Tensor:
    """Return a weight that rounds to `value`, as near the original as margins allow."""
    spec = target.weight.spec
    kind = data_type(spec.data_type)
    reach = (0.5 - MARGIN) * unit
    shift = (target.original.float() - value).clamp(-reach, reach)
    room = _NEARLY * MARGIN * unit
    for left in reversed(range(_SHRINKS + 1)):
        # floats have a nearer neighbour on one side of a power of two
        wrong = kind.fake_quant(value + shift + shift.sign() * room, spec, params) != value
        if not wrong.any():
            break
        shift = torch.where(wrong, shift * (0.5 if left else 0.0), shift)
    return value + shift
