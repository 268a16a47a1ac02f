"""What the loop moves for one weight, and where it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels import data_type
from ar_tuner.algorithms.importance import filled, input_energy
from ar_tuner.algorithms.optimizers import Knob

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_kernels.numerics import Params
    from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings


@dataclass(frozen=True)
class Tunables:
    """What the loop moves for one weight.

    `offset` [O, I] is added before rounding; `low` and `high` (shape of the scale) are clip
    factors of the smallest and largest value, or, where `base` holds searched parameters, `high`
    alone multiplies their scale. `shared` are parameters held in common with other layers.
    """

    target: Target
    weight: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor
    base: Params | None
    shared: Mapping[str, Tensor] | None = None

    def params(self) -> Params:
        """Return the parameters that the clip factors stand for, differentiable."""
        spec = self.target.scheme.weight
        assert spec is not None
        kind = data_type(spec.data_type)
        if self.base is None:
            return kind.parameters(
                self.weight, spec, low=self.low, high=self.high, shared=self.shared
            )
        if not self.high.requires_grad:
            return self.base
        return kind.rescale(self.base, spec, self.high)

    def fake_quant(self) -> Tensor:
        """Return the weight as quantized now, float32 [O, I], differentiable."""
        spec = self.target.scheme.weight
        assert spec is not None
        kind = data_type(spec.data_type)
        return kind.fake_quant(self.weight, spec, self.params(), offset=self.offset)

    def quantize(self) -> QuantizedWeight:
        """Return the codes as they stand."""
        spec = self.target.scheme.weight
        assert spec is not None
        with torch.no_grad():
            kind = data_type(spec.data_type)
            return kind.quantize(self.weight, spec, self.params(), offset=self.offset)

    def knobs(self, settings: TuneSettings) -> list[Knob]:
        """Return the tensors to move, with the first step that fits the width of the codes."""
        spec = self.target.scheme.weight
        assert spec is not None
        upper = 2.0 if self.base is not None else 1.0
        size = settings.minmax_step(spec.bits)
        factors = [Knob(f, size, upper) for f in (self.low, self.high) if f.requires_grad]
        return [Knob(self.offset, settings.offset_step(spec.bits)), *factors]

    def is_finite(self) -> bool:
        """Tell whether nothing has become NaN or infinite."""
        return all(bool(t.isfinite().all()) for t in (self.offset, self.low, self.high))


def start(task: BlockTask) -> list[Tunables]:
    """Return the tunables at their starting point: no offset, no clipping."""
    settings = task.settings
    energy = input_energy(task) if settings.scale_init == "search" else {}
    return [
        at_start(
            target,
            task.weight(target).float().contiguous(),
            settings,
            energy=energy.get(target.ref.layer),
            shared=task.shared.get(target.ref.layer),
        )
        for target in task.targets
    ]


def at_start(
    target: Target,
    weight: Tensor,
    settings: TuneSettings,
    *,
    energy: Tensor | None,
    shared: Mapping[str, Tensor] | None,
) -> Tunables:
    """Return the tunables of one weight [O, I] at their starting point."""
    spec = target.scheme.weight
    assert spec is not None
    base = None
    if settings.scale_init == "search":
        base = searched(target, weight, energy, shared=shared)
    frozen = base is not None and settings.frozen_super_scales and spec.super_group is not None
    tuned = settings.minmax_tuning and not frozen
    ones = torch.ones(spec.granularity.scale_shape(*weight.shape[-2:]), device=weight.device)
    return Tunables(
        target=target,
        weight=weight,
        offset=torch.zeros_like(weight, dtype=torch.float32).requires_grad_(),
        low=ones.clone().requires_grad_(base is None and tuned),
        high=ones.clone().requires_grad_(tuned),
        base=base,
        shared=shared,
    )


def searched(
    target: Target,
    weight: Tensor,
    energy: Tensor | None,
    *,
    shared: Mapping[str, Tensor] | None = None,
) -> Params:
    """Return the parameters of least error, weighted by what flows through each input channel."""
    spec = target.scheme.weight
    assert spec is not None
    importance = filled(energy, weight, spec)
    kind = data_type(spec.data_type)
    return kind.search(weight, spec, importance=importance, shared=shared)


def knobs_of(tunables: Sequence[Tunables], settings: TuneSettings) -> list[Knob]:
    """Return everything the loop moves."""
    return [knob for t in tunables for knob in t.knobs(settings)]
