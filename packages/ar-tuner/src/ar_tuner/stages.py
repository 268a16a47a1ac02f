"""Stages: what refines a whole quantized model, after its blocks are done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ar_tuner.parts import WeightRef

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_schemes import Scheme
    from ar_tuner.others import Inputs

    Parameter = Tensor | Callable[[], Tensor]


@dataclass(frozen=True)
class ModelTarget:
    """One quantized weight of a model.

    Attributes:
        layer: its name, that of the module.
        parameter: name of the parameter in the model.
        transposed: the parameter is stored as [I, O].
        scheme: what it is quantized to.
        weight: its codes and scales as they stand.
        original: the float weight [O, I] it came from.
        expert, rows: where in the parameter it is, if that holds several (`WeightRef`).
    """

    layer: str
    parameter: str
    transposed: bool
    scheme: Scheme
    weight: QuantizedWeight
    original: Tensor
    expert: int | None = None
    rows: tuple[int, int, int] | None = None

    @property
    def ref(self) -> WeightRef:
        """Where it is in the model."""
        return WeightRef(self.layer, self.parameter, self.transposed, self.expert, self.rows)

    def view(self, matrix: Tensor) -> Tensor:
        """Return a matrix as stored from one [O, I], and the other way round.

        A part of a parameter is [O, I] until it is put in its place.
        """
        return matrix.t() if self.transposed and self.ref.whole else matrix


@dataclass(frozen=True)
class StageSettings:
    """Numbers of a stage.

    Attributes:
        steps: optimizer steps.
        batch_size: rows per step.
        seed: of the order of the rows.
        max_logits: most logits that are held at a time; rows are taken in smaller parts above.
        max_saved: most bytes that a forward pass keeps for the backward pass; the same.
        flat: memory is short: codes stay, and blocks are computed again in the backward pass.
    """

    steps: int
    batch_size: int = 8
    seed: int = 42
    max_logits: int = 2**25
    max_saved: int = 2**33
    flat: bool = False


@dataclass(frozen=True)
class ModelTask:
    """A whole quantized model to refine.

    Attributes:
        logits: (replaced parameters by name, rows [B, T], quantized) to logits [B, T, V], with
            gradients to the replaced parameters: of the quantized model, activations included, or
            of the float model. With `settings.flat` a parameter may be a function that makes it,
            called whenever its block is computed.
        targets: every quantized weight.
        gains: float parameters that may move a little: the gains of norms, by name.
        rows: token ids [N, T] to learn from.
        held_out: token ids [M, T] of other documents, which decide whether the result is kept.
        settings: numbers of the stage.
        report: called with (step, steps, loss) now and then.
        stored: parameters of the model that hold several targets, by name, as they stand.
        save: called with tensors and the number of steps done, when a state is worth keeping.
        saved: the state that an interrupted stage kept last, and its number of steps.
        others: samples of one row that hold more than tokens (images), to learn from as well;
            `logits` takes one in the place of rows.
        held_others: the same, held out.
    """

    logits: Callable[[Mapping[str, Parameter], Tensor | Inputs, bool], Tensor]
    targets: tuple[ModelTarget, ...]
    gains: Mapping[str, Tensor]
    rows: Tensor
    held_out: Tensor
    settings: StageSettings
    stored: Mapping[str, Tensor] = field(default_factory=dict)
    report: Callable[[int, int, float], None] = lambda step, steps, loss: None
    save: Callable[[Mapping[str, Tensor], int], None] = lambda state, done: None
    saved: tuple[Mapping[str, Tensor], int] | None = None
    others: Sequence[Inputs] = ()
    held_others: Sequence[Inputs] = ()


@dataclass(frozen=True)
class ModelResult:
    """What became of a model.

    Attributes:
        weights: quantized weights by layer name; those that did not change may be missing.
        tensors: other parameters that changed, by name, in the model's type.
        loss_before, loss_after: on the held-out rows; None where nothing was measured.
    """

    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    loss_before: float | None = None
    loss_after: float | None = None


@runtime_checkable
class Stage(Protocol):
    """A way to refine a whole quantized model; registered like an algorithm."""

    @property
    def name(self) -> str:
        """Identifier, `distill`."""

    def refine(self, task: ModelTask) -> ModelResult:
        """Return better weights, or none. Must not change the model or global state."""
