"""SignRound: rounding offsets and clip factors, tuned by signed gradients against the block output.

Source: "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
(arXiv 2309.05516), section 3; scale initialisation after SignRoundV2 (arXiv 2512.04746).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels import data_type
from ar_tuner.algorithms.base import BlockResult, BlockTask, Target, TuneSettings, as_parameter
from ar_tuner.algorithms.importance import input_energy
from ar_tuner.algorithms.rtn import nearest_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_kernels.numerics import Params

JUDGED_ROWS = 32
"""Rows on which the error before and after tuning is reported."""
REPORTS = 10
"""How often the loop reports its loss."""


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


class SignRound:
    """Algorithm `signround`."""

    name = "signround"
    needs_inputs = True

    def quantize(self, task: BlockTask) -> BlockResult:
        """Return the tuned weights of a block."""
        assert task.inputs is not None
        plain = nearest_of(task)
        before = block_error(task, plain)
        if task.settings.iters == 0:
            return BlockResult(plain, before, before)
        tunables = start(task)
        tune(task, tunables)
        tuned = {t.target.ref.layer: t.quantize() for t in tunables}
        after = block_error(task, tuned)
        if after > before:  # wide types have nothing to gain and may drift
            return BlockResult(plain, before, before)
        return BlockResult(tuned, before, after)


def start(task: BlockTask) -> list[Tunables]:
    """Return the tunables at their starting point: no offset, no clipping."""
    energy = {}
    if task.settings.scale_init == "search":
        energy = input_energy(task)
    out = []
    for target in task.targets:
        spec = target.scheme.weight
        assert spec is not None
        weight = task.weight(target).float().contiguous()
        base = None
        if task.settings.scale_init == "search":
            kind = data_type(spec.data_type)
            base = kind.search(
                weight,
                spec,
                importance=energy.get(target.ref.layer),
                shared=task.shared.get(target.ref.layer),
            )
        shape = spec.granularity.scale_shape(*weight.shape[-2:])
        ones = torch.ones(shape, device=weight.device)
        out.append(
            Tunables(
                target=target,
                weight=weight,
                offset=torch.zeros_like(weight).requires_grad_(),
                low=ones.clone().requires_grad_(base is None and task.settings.minmax_tuning),
                high=ones.clone().requires_grad_(task.settings.minmax_tuning),
                base=base,
                shared=task.shared.get(target.ref.layer),
            )
        )
    return out


def tune(task: BlockTask, tunables: list[Tunables]) -> None:
    """Move the tunables by signed gradients, learning rate falling linearly to zero."""
    settings = task.settings
    assert task.inputs is not None
    lr = settings.lr if settings.lr is not None else 1.0 / settings.iters
    minmax_lr = settings.minmax_lr if settings.minmax_lr is not None else lr
    draw = task.inputs.minibatches(settings.batch_size, generator_for(settings, task.name))
    best = _Best(enabled=settings.keep == "best")
    for step in range(settings.iters):
        rows = draw()
        loss = _backward(task, tunables, rows)
        if best.enabled:
            best.offer(float(loss), tunables)
        left = 1.0 - step / settings.iters
        with torch.no_grad():
            for t in tunables:
                _step(t.offset, lr * left)
                upper = 2.0 if t.base is not None else 1.0
                for factor in (t.low, t.high):
                    if factor.requires_grad:
                        _step(factor, minmax_lr * left)
                        factor.clamp_(0.0, upper)
        if (step + 1) % max(1, settings.iters // REPORTS) == 0:
            task.report(step + 1, settings.iters, float(loss))
    best.restore(tunables)


def _backward(task: BlockTask, tunables: list[Tunables], rows: list[int]) -> Tensor:
    with torch.enable_grad():
        weights = {
            t.target.ref.parameter: as_parameter(
                t.target, t.fake_quant(), task.block.get_parameter(t.target.ref.parameter)
            )
            for t in tunables
        }
        output, reference = task.run(weights, rows)
        loss = (output.float() - reference.float()).square().mean()
        # only the sign of the gradient is used; the factor keeps small ones from vanishing
        (loss * 1000.0).backward()
    return loss.detach()


def _step(value: Tensor, size: float) -> None:
    if value.grad is not None:
        value.sub_(value.grad.sign_(), alpha=size)
        value.grad = None


class _Best:
    """The iterate of the least minibatch loss, as the published method keeps it."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._loss = float("inf")
        self._saved: list[tuple[Tensor, Tensor, Tensor]] = []

    def offer(self, loss: float, tunables: list[Tunables]) -> None:
        """Keep a copy if the loss is the least so far."""
        if loss < self._loss:
            self._loss = loss
            self._saved = [
                (t.offset.detach().clone(), t.low.detach().clone(), t.high.detach().clone())
                for t in tunables
            ]

    def restore(self, tunables: list[Tunables]) -> None:
        """Put the best copy back."""
        with torch.no_grad():
            for t, (offset, low, high) in zip(tunables, self._saved, strict=False):
                t.offset.copy_(offset)
                t.low.copy_(low)
                t.high.copy_(high)


def generator_for(settings: TuneSettings, name: str) -> torch.Generator:
    """Return the random stream of a block: a function of the seed and the block's name only."""
    digest = hashlib.sha256(f"{settings.seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def block_error(task: BlockTask, weights: Mapping[str, QuantizedWeight]) -> float:
    """Return the mean squared error of the block's output with quantized weights."""
    replaced = {
        t.ref.parameter: as_parameter(
            t, weights[t.ref.layer].dequantize(), task.block.get_parameter(t.ref.parameter)
        )
        for t in task.targets
    }
    assert task.inputs is not None
    total, count = 0.0, 0
    with torch.no_grad():
        for rows in task.inputs.chunks(JUDGED_ROWS, task.settings.batch_size):
            output, reference = task.run(replaced, rows)
            total += float((output.float() - reference.float()).square().mean()) * len(rows)
            count += len(rows)
    return total / count
