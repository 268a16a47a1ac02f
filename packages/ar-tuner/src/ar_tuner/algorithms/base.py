"""What an algorithm is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from ar_tuner.activations import quantized_activations
from ar_tuner.compiling import Forward, plain
from ar_tuner.recipes import auto_lr
from ar_tuner.walk import hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_schemes import Scheme
    from ar_tuner.folding import Folding
    from ar_tuner.parts import WeightRef
    from ar_tuner.rows import RowBank


@dataclass(frozen=True)
class TuneSettings:
    """Numbers of the tuning loop.

    Attributes:
        iters: steps per block.
        batch_size: rows per forward.
        accumulate: forwards per step.
        lr: step of the rounding offsets at the start, in units of a quantization step; None:
            what fits `iters` and the bits of each layer (`recipes.auto_lr`).
        minmax_lr: step of the clip factors; None: as the offsets.
        lr_scheduler: how steps shrink: `linear`, `cosine` or `constant`.
        optimizer: `sign` (the published method) or `adam`.
        momentum: share of the earlier gradients in a signed step.
        seed: of the row order; every block derives its own stream from it.
        scale_init: `minmax` (SignRound as published) or `search` (a searched scale per group).
        loss: `mse`, or `suppressed` (without outliers, where few bits make any).
        frozen_super_scales: scales of two levels (GGUF K types) stay as searched.
        keep: which iterate is returned: `last`, or `best`: of least minibatch loss as published,
            or with `validation_rows` of least error on those.
        validation_rows: rows that are not tuned on, for choosing the iterate.
        patience: stop after so many steps without a better iterate; 0: never.
        minmax_tuning: tune the clip factors too.
        search_wide: rounding to nearest with searched scales searches 8-bit integers too.
        block_steps: steps that a finished block's codes and scales take on its own error.
        clip_activations: static ranges of activations are searched, not the largest seen; None:
            those of integers.
    """

    iters: int = 200
    batch_size: int = 8
    accumulate: int = 1
    lr: float | None = None
    minmax_lr: float | None = None
    lr_scheduler: str = "linear"
    optimizer: str = "sign"
    momentum: float = 0.0
    seed: int = 42
    scale_init: str = "search"
    loss: str = "mse"
    frozen_super_scales: bool = False
    keep: str = "last"
    validation_rows: int = 0
    patience: int = 0
    minmax_tuning: bool = True
    search_wide: bool = False
    block_steps: int = 0
    clip_activations: bool | None = None

    def offset_step(self, bits: int) -> float:
        """Return the first step of the rounding offsets of a layer with codes of some width."""
        return self.lr if self.lr is not None else auto_lr(self.iters, bits)

    def minmax_step(self, bits: int) -> float:
        """Return the first step of the clip factors of such a layer."""
        return self.minmax_lr if self.minmax_lr is not None else self.offset_step(bits)


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
        inputs: what the block is given (by the quantized blocks before it, or by the float ones
            for algorithms with `float_inputs`), by row; None for algorithms that need none.
        reference: float output rows [T, H] that the quantized block should give; empty likewise.
        settings: numbers of the loop.
        report: called with (step, steps, loss) now and then.
        shared: by layer, parameters that it must have in common with others.
        ranges: by layer, the range of its activations where the scheme fixes it beforehand.
        energy: by layer, the mean square [I] of its float inputs over all rows, for algorithms
            with `float_inputs`; a layer that no token reached is missing.
        tail: what the model does to the output head's logits (a soft cap, a factor).
        note: called with something a user should know.
        float_inputs: what the block is given in the float model, by row; None where that is
            `inputs` too.
        forward: runs the block with replaced weights.
        token_weights: by row, how much an error of each token's output counts [T], 1 in the mean;
            None: every token counts alike.
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
    energy: Mapping[str, Tensor] = field(default_factory=dict)
    tail: Callable[[Tensor], Tensor] = lambda logits: logits
    note: Callable[[str], None] = lambda text: None
    float_inputs: RowBank | None = None
    forward: Forward = plain
    token_weights: Sequence[Tensor] | None = None

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
        reference = torch.stack([self.reference[r] for r in rows]).to(output.device)
        return output, reference.reshape(output.shape)  # a row may be a whole output of any shape


_FACTS = ("loss_before", "loss_after", "relative")


@dataclass(frozen=True)
class BlockResult:
    """What became of a block: quantized weights by layer name, and errors.

    `loss_before` is the error with plain round-to-nearest, `loss_after` with these weights, both
    on the same rows: mean squared errors of the output, KL divergences in nats for the output
    head; None for algorithms that look at no inputs. `relative` is `loss_after` over the mean
    square of the reference output, as the walk measures it. `diverged`: the loop left the finite
    numbers and its result was thrown away. `folding`: what was done to the float block beforehand
    (by the walk, not by an algorithm); its gains belong to the result.
    """

    weights: Mapping[str, QuantizedWeight]
    loss_before: float | None = None
    loss_after: float | None = None
    relative: float | None = None
    diverged: bool = False
    folding: Folding | None = None

    def facts(self) -> dict[str, Any]:
        """Return all but the weights as plain values, for the journal of a run."""
        return {name: getattr(self, name) for name in _FACTS}

    @classmethod
    def restored(
        cls, weights: Mapping[str, QuantizedWeight], facts: Mapping[str, Any]
    ) -> BlockResult:
        """Return the result with these weights and `facts()`."""
        before, after, relative = (facts.get(name) for name in _FACTS)
        return cls(weights, before, after, relative)


@runtime_checkable
class Algorithm(Protocol):
    """A way to quantize a block.

    Two members are optional. `float_inputs = True`: blocks are given what the float blocks before
    them give, and `BlockTask.energy`. `quantize_head(task) -> BlockResult`: quantizes the output
    head, given a task whose inputs and reference are the hidden states before it, of the
    quantized and of the float model; without it the head is rounded to nearest.
    """

    @property
    def name(self) -> str:
        """Identifier, `signround`."""

    @property
    def needs_inputs(self) -> bool:
        """False when the weights alone are enough: then no calibration is done."""

    def quantize(self, task: BlockTask) -> BlockResult:
        """Return the quantized weights of a block. Must not change the block or global state."""
