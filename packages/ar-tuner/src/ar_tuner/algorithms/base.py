"""What an algorithm is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from ar_tuner.activations import quantized_activations
from ar_tuner.compiling import Forward, plain
from ar_tuner.walk import hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_schemes import Scheme
    from ar_tuner.blocks import WeightRef
    from ar_tuner.rows import RowBank


@dataclass(frozen=True)
class TuneSettings:
    """Numbers of the tuning loop.

    Attributes:
        iters: steps per block.
        batch_size: rows per step.
        lr: step of the rounding offsets at the start, in units of a quantization step; None
            means 1 / iters.
        minmax_lr: step of the clip factors; None means `lr`.
        seed: of the row order; every block derives its own stream from it.
        scale_init: `minmax` (SignRound as published) or `search` (a searched scale per group).
        keep: which iterate is returned: `last`, or `best` (least minibatch loss, as published).
        minmax_tuning: tune the clip factors too.
    """

    iters: int = 200
    batch_size: int = 8
    lr: float | None = None
    minmax_lr: float | None = None
    seed: int = 42
    scale_init: str = "search"
    keep: str = "last"
    minmax_tuning: bool = True


@dataclass(frozen=True)
class Target:
    """One weight to quantize: where it is, what it becomes."""

    ref: WeightRef
    scheme: Scheme


@dataclass(frozen=True)
class BlockTask:
    """One block to quantize.

    Attributes:
        block: the module with its float weights; never changed by an algorithm.
        name: its name in the model.
        targets: the weights to quantize.
        inputs: what the block is given (by the quantized blocks before it), by row; None for
            algorithms that need none.
        reference: float output rows [T, H] that the quantized block should give; empty likewise.
        settings: numbers of the loop.
        report: called with (step, steps, loss) now and then.
        shared: by layer, parameters that it must have in common with others.
        ranges: by layer, the range of its activations where the scheme fixes it beforehand.
        forward: runs the block with replaced weights.
    """

    block: nn.Module
    name: str
    targets: tuple[Target, ...]
    inputs: RowBank | None
    reference: Sequence[Tensor]
    settings: TuneSettings
    report: Callable[[int, int, float], None]
    shared: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    ranges: Mapping[str, Tensor] = field(default_factory=dict)
    forward: Forward = plain

    def weight(self, target: Target) -> Tensor:
        """Return a target's float weight as [O, I] (a view)."""
        stored = self.block.get_parameter(target.ref.parameter)
        return target.ref.view(stored.detach())

    def run(self, weights: Mapping[str, Tensor], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return (output, reference) [B, T, H] of the block for some rows.

        `weights` maps parameter names of the block to their replacements; with any of them,
        activations are quantized as the schemes say.
        """
        assert self.inputs is not None
        args, kwargs = self.inputs.take(rows)
        # compiled code would not see hooks that come and go
        hooked = not weights or any(t.scheme.activation is not None for t in self.targets)
        forward = plain if hooked else self.forward
        with quantized_activations(self.block, self.targets if weights else (), self.ranges):
            output = hidden(forward(self.block, weights, args, kwargs))
        return output, torch.stack([self.reference[r] for r in rows]).to(output.device)


@dataclass(frozen=True)
class BlockResult:
    """What became of a block: quantized weights by layer name, and mean squared errors.

    `loss_before` is the error with plain round-to-nearest, `loss_after` with these weights, both
    on the same rows; None for algorithms that look at no inputs.
    """

    weights: Mapping[str, QuantizedWeight]
    loss_before: float | None = None
    loss_after: float | None = None


@runtime_checkable
class Algorithm(Protocol):
    """A way to quantize a block."""

    @property
    def name(self) -> str:
        """Identifier, `signround`."""

    @property
    def needs_inputs(self) -> bool:
        """False when the weights alone are enough: then no calibration is done."""

    def quantize(self, task: BlockTask) -> BlockResult:
        """Return the quantized weights of a block. Must not change the block or global state."""


def as_parameter(target: Target, weight: Tensor, like: Any) -> Tensor:
    """Return a weight [O, I] as the block stores it: orientation and type of the parameter."""
    return target.ref.view(weight).to(like.dtype)
