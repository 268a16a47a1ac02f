"""What all data types of float elements have in common: element = round(weight / step)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.numerics.base import Params
from ar_kernels.numerics.checks import require_finite
from ar_kernels.numerics.grouping import grouped, ungrouped
from ar_kernels.weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from ar_kernels.numerics.elements import Element
    from ar_schemes import TensorSpec


class FloatFakeQuant(torch.autograd.Function):
    """`step * round(clamp(w / step + offset))` on groups, straight-through."""

    @staticmethod
    def forward(
        ctx: Any, groups: Tensor, step: Tensor, offset: Tensor | None, element: Element
    ) -> Tensor:
        """Return the weight the codes stand for; groups [..., R, G, n], step [..., R, G, 1]."""
        steps = groups / step
        wanted = steps if offset is None else steps + offset
        values = element.round(wanted)
        if any(ctx.needs_input_grad):
            # steps and values serve the gradient of the step alone
            kept = (steps, values) if ctx.needs_input_grad[1] else (None, None)
            ctx.save_for_backward(*kept, wanted.abs() <= element.maximum, step)
            return values * step
        return values.mul_(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weight, step and offset; none where a code was clamped."""
        steps, values, inside, step = ctx.saved_tensors
        to_weight, to_step, to_offset, _ = ctx.needs_input_grad
        passed = grad * inside.to(grad.dtype)  # by the mask itself it takes four times as long
        step_grad = None
        if to_step:
            step_grad = (grad * values).sub_(passed * steps).sum(-1, keepdim=True)
        return passed if to_weight else None, step_grad, passed * step if to_offset else None, None


class FloatType(ABC):
    """Base of the data types of float elements."""

    name: str

    @abstractmethod
    def element(self, spec: TensorSpec) -> Element:
        """Return the element of a spec."""

    @abstractmethod
    def to_stored(self, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (scale, extra) as a `QuantizedWeight` holds them."""

    @abstractmethod
    def step(self, weight: QuantizedWeight) -> Tensor:
        """Return what multiplies the elements, float32, shape of the scale."""

    def shared(self, weights: Sequence[Tensor], spec: TensorSpec) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the parameters that members of a fused group have in common: none."""
        return {}

    def quantize(
        self, weight: Tensor, spec: TensorSpec, params: Params, *, offset: Tensor | None = None
    ) -> QuantizedWeight:
        """Return the codes for a weight; `offset` [..., O, I] is added before rounding.

        Raises:
            KernelError: the weight or a scale is not finite.
        """
        require_finite(weight, spec, params)
        element = self.element(spec)
        with torch.no_grad():
            steps = grouped(weight.float(), spec.granularity) / params.scale.unsqueeze(-1)
            if offset is not None:
                steps = steps + grouped(offset, spec.granularity)
            codes = element.encode(element.round(steps))
            scale, extra = self.to_stored(params)
        return QuantizedWeight(
            spec=spec,
            codes=ungrouped(codes, tuple(weight.shape), spec.granularity).contiguous(),
            scale=scale.detach(),
            extra={k: v.detach() for k, v in extra.items()},
        )

    def dequantize(self, weight: QuantizedWeight) -> Tensor:
        """Return the float32 weight: step * element."""
        spec = weight.spec
        codes = grouped(weight.codes, spec.granularity)
        values = self.element(spec).decode(codes) * self.step(weight).unsqueeze(-1)
        return ungrouped(values, weight.shape, spec.granularity)

    def fake_quant(
        self, weight: Tensor, spec: TensorSpec, params: Params, *, offset: Tensor | None = None
    ) -> Tensor:
        """Return quantize + dequantize, float32, straight-through gradients."""
        fake: Tensor = FloatFakeQuant.apply(
            grouped(weight.float(), spec.granularity),
            params.scale.unsqueeze(-1),
            None if offset is None else grouped(offset, spec.granularity),
            self.element(spec),
        )
        return ungrouped(fake, tuple(weight.shape), spec.granularity)

    def nearest(self, values: Tensor, spec: TensorSpec, params: Params) -> Tensor:
        """Return the representable values nearest to `values`; see `Columnwise`."""
        return self.element(spec).round(values / params.scale).mul_(params.scale)

    def params_of(self, weight: QuantizedWeight) -> Params:
        """Return the parameters a weight was quantized with; see `Columnwise`."""
        return Params(self.step(weight))


def peak(
    weight: Tensor, spec: TensorSpec, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    """Return the largest magnitude per group, float32, after the clip factors."""
    groups = grouped(weight.float(), spec.granularity)
    if low is None and high is None:
        return groups.abs().amax(-1)
    below, above = -groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    below = below if low is None else below * low
    above = above if high is None else above * high
    return torch.where(above >= below, above, below)


def searched(
    weight: Tensor,
    spec: TensorSpec,
    element: Element,
    importance: Tensor | None,
    candidates: Iterable[Tensor],
    step_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return, per group, the candidate of least weighted squared error; the first wins ties."""
    groups = grouped(weight.float(), spec.granularity)
    weights = None
    if importance is not None:
        weights = grouped(importance.float().expand(weight.shape), spec.granularity)
    best: Tensor | None = None
    best_error = torch.empty(())
    for candidate in candidates:
        step = step_of(candidate).unsqueeze(-1)
        error = element.round(groups / step).mul_(step).sub_(groups).square_()
        total = error.sum(-1) if weights is None else error.mul_(weights).sum(-1)
        if best is None:
            best, best_error = candidate, total
            continue
        better = total < best_error
        best = torch.where(better, candidate, best)
        best_error = torch.where(better, total, best_error)
    assert best is not None
    return best


def given(shared: Mapping[str, Tensor] | None, name: str) -> Tensor | None:
    """Return a parameter held in common, or None."""
    return None if shared is None else shared.get(name)
