"""What each option would leave of a weight: rounded to nearest with searched scales."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ar_kernels import data_type
from ar_tuner.activations import is_static
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.algorithms.rtn import nearest
from ar_tuner.blocks import is_linear, weight_of, weights_of
from ar_tuner.fused import fused_groups, shared_values
from ar_tuner.parts import WeightRef
from ar_tuner.watching import watching

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_kernels.numerics import Params
    from ar_schemes import Scheme, TensorSpec
    from ar_tuner.blocks import Block


@dataclass
class Inputs:
    """What flows into the layers of a block: by layer, sum of squares [I], rows, largest value."""

    squares: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, Tensor] = field(default_factory=dict)

    def energy(self, layer: str) -> Tensor | None:
        """Return the mean square of a layer's input channels, None where it saw nothing."""
        if not self.rows.get(layer):
            return None
        return self.squares[layer] / self.rows[layer]

    @contextlib.contextmanager
    def gathered(self, block: nn.Module, refs: Sequence[WeightRef]) -> Iterator[None]:
        """Take note of what the layers are given, as long as the context lasts."""

        def watch(shared: Sequence[WeightRef], given: Tensor) -> None:
            x = given.detach().float().reshape(-1, given.shape[-1])
            if not x.numel():
                return
            squares, peak = x.square().sum(0), x.abs().amax()
            for layer in (ref.layer for ref in shared):
                self.squares[layer] = self.squares.get(layer, 0.0) + squares
                self.rows[layer] = self.rows.get(layer, 0) + x.shape[0]
                self.peaks[layer] = torch.maximum(self.peaks.get(layer, peak), peak)

        with watching(block, refs, watch):
            yield


@dataclass(frozen=True)
class Maker:
    """How candidates are made and kept.

    Attributes:
        compiled: compile the search for scales.
        as_codes: keep codes, a quarter of the memory, and dequantize whenever they are needed.
    """

    compiled: bool = False
    as_codes: bool = True

    def of_block(
        self, block: Block, open_to: Mapping[str, Mapping[str, Scheme]], inputs: Inputs
    ) -> dict[tuple[str, str], Candidate]:
        """Return the candidates of a block's layers, by (layer, option).

        `open_to`: schemes by option name, by layer; those that quantize nothing make none.
        """
        refs = {ref.layer: ref for ref in weights_of(block, list(open_to))}
        options = dict.fromkeys(o for named in open_to.values() for o in named)
        out: dict[tuple[str, str], Candidate] = {}
        for option in options:
            targets = tuple(
                Target(refs[layer], named[option])
                for layer, named in open_to.items()
                if option in named and named[option].weight is not None
            )
            task = _task(block, targets)
            shared = shared_values(task)
            for target in targets:
                layer = target.ref.layer
                weight = task.weight(target).float()
                made = self._searched(weight, target, inputs.energy(layer), shared.get(layer))
                out[layer, option] = self.kept(target, made)
        return out

    def outside(self, module: nn.Module, name: str, which: Scheme) -> Candidate:
        """Return the candidate of a layer outside the blocks: an embedding is not tuned."""
        target = Target(WeightRef(name, "weight", transposed=False), which)
        weight = weight_of(module).detach()
        if not is_linear(module):
            return self.kept(target, nearest(target, weight))
        return self.kept(target, self._searched(weight.float(), target, None, None))

    def kept(self, target: Target, made: QuantizedWeight) -> Candidate:
        """Return a candidate in the form that is kept."""
        return Candidate(target, made if self.as_codes else made.dequantize())

    def _searched(
        self,
        weight: Tensor,
        target: Target,
        importance: Tensor | None,
        shared: Mapping[str, Tensor] | None,
    ) -> QuantizedWeight:
        spec = target.scheme.weight
        assert spec is not None
        kind = data_type(spec.data_type)
        find = torch.compile(kind.search) if self.compiled else kind.search
        with torch.no_grad():
            params: Params = find(weight, spec, importance=importance, shared=shared)
            return kind.quantize(weight, spec, params)


@dataclass(frozen=True)
class Candidate:
    """One layer under one option: the weight it would have, as codes or as floats."""

    target: Target
    kept: QuantizedWeight | Tensor

    def weight(self) -> Tensor:
        """Return the weight, float32 [..., O, I]."""
        return self.kept if isinstance(self.kept, torch.Tensor) else self.kept.dequantize()

    @property
    def activation(self) -> TensorSpec | None:
        """How the layer's input would be represented."""
        return self.target.scheme.activation


def ranges_of(open_to: Mapping[str, Scheme], inputs: Inputs) -> dict[str, Tensor]:
    """Return the static range of each layer's input under one scheme each, by layer.

    Members of a fused group share the largest; a layer that saw nothing gets that of all.
    """
    from ar_kernels.numerics.activation import static_scale

    static = [layer for layer, which in open_to.items() if is_static(which)]
    if not static or not inputs.peaks:
        return {}
    most = torch.stack(list(inputs.peaks.values())).amax()
    out = {}
    for group in fused_groups(static):
        seen = [inputs.peaks[layer] for layer in group if layer in inputs.peaks]
        peak = torch.stack(seen).amax() if seen else most
        for layer in group:
            spec = open_to[layer].activation
            assert spec is not None
            out[layer] = static_scale(peak, spec).reshape(1)
    return out


def _task(block: Block, targets: tuple[Target, ...]) -> BlockTask:
    return BlockTask(
        block=block.module,
        name=block.name,
        targets=targets,
        inputs=None,
        reference=(),
        settings=TuneSettings(),
        report=lambda step, steps, loss: None,
    )
