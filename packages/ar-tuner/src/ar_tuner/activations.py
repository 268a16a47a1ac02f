"""Activations quantized as the schemes say, while blocks are tuned and chained.

Layers are watched for the time of a call: no module is replaced, nothing stays behind.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ar_kernels.numerics.activation import static_scale
from ar_kernels.numerics.halves import fake_quant_alike
from ar_tuner.clipping import clipped
from ar_tuner.fused import fused_groups
from ar_tuner.watching import watching

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_schemes import Scheme, TensorSpec
    from ar_tuner.algorithms.base import BlockTask, Target
    from ar_tuner.parts import WeightRef

STATIC_GLOBAL = "nv_fp4_with_static_gs"
"""Activations with a global scale collected beforehand and block scales found at run time."""
STEP, GLOBAL = "input_scale", "input_global_scale"
_EXPERT = re.compile(r"(\bexperts\.)(\d+)(\.)")


def is_static(scheme: Scheme) -> bool:
    """Tell whether the range of a layer's activations is collected beforehand."""
    return scheme.activation is not None and _is_static(scheme.activation)


def _is_static(spec: TensorSpec) -> bool:
    return not spec.dynamic or spec.data_type == STATIC_GLOBAL


def with_range(weight: QuantizedWeight, scheme: Scheme, value: Tensor | None) -> QuantizedWeight:
    """Return the weight with the range of its activations, under the name formats store it by."""
    if value is None or scheme.activation is None:
        return weight
    name = GLOBAL if scheme.activation.data_type == STATIC_GLOBAL else STEP
    return replace(weight, extra={**weight.extra, name: value})


def static_ranges(weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """Return the ranges that quantized weights carry, by layer."""
    return {
        layer: weight.extra[name]
        for layer, weight in weights.items()
        for name in (STEP, GLOBAL)
        if name in weight.extra
    }


def collect_ranges(task: BlockTask) -> dict[str, Tensor]:
    """Return the range of the activations of each layer that has a static one, by layer name.

    The largest magnitude over all calibration rows, or a part of it (`is_searched`); members of a
    fused group share it. An expert that saw no token gets the largest of its siblings, any other
    layer that saw nothing the largest of the block.
    """
    static = [t for t in task.targets if is_static(t.scheme)]
    if not static or task.inputs is None:
        return {}
    peaks: dict[str, Tensor] = {}

    def watch(refs: Sequence[WeightRef], x: Tensor) -> None:
        if x.numel():
            peak = x.detach().float().abs().amax()
            for ref in refs:
                peaks[ref.layer] = torch.maximum(peaks.get(ref.layer, peak), peak)

    with watching(task.block, [t.ref for t in static], watch), torch.no_grad():
        for rows in task.inputs.chunks(task.inputs.rows, task.settings.batch_size):
            task.run({}, rows)
    if not peaks:
        return {}
    groups = fused_groups([t.ref.layer for t in static])
    searched = [t for t in static if t.ref.layer in peaks and is_searched(task, t)]
    if searched:
        whole = _for_all(peaks, groups)
        peaks = peaks | clipped(task, searched, whole, groups)
    peaks = _for_all(peaks, groups)
    out = {}
    for t in static:
        assert t.scheme.activation is not None
        out[t.ref.layer] = static_scale(peaks[t.ref.layer], t.scheme.activation).reshape(1)
    return out


def is_searched(task: BlockTask, target: Target) -> bool:
    """Tell whether a static range is searched.

    Unless settings say: of integers, which have coarse steps between zero and the largest value.
    Small floats have fine steps there, and little to gain (docs/log.md).
    """
    assert target.scheme.activation is not None
    asked = task.settings.clip_activations
    return target.scheme.activation.data_type == "int" if asked is None else asked


def _for_all(seen: Mapping[str, Tensor], groups: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Return the peak of every layer: its fused group's, its sibling experts', or the block's."""
    out: dict[str, Tensor] = {}
    for group in groups:
        siblings = {expert_kind(layer) for layer in group} - {None}
        found = [seen[layer] for layer in group if layer in seen]
        found = found or [p for layer, p in seen.items() if expert_kind(layer) in siblings]
        peak = torch.stack(found or list(seen.values())).amax()
        out |= dict.fromkeys(group, peak)
    return out


def expert_kind(layer: str) -> str | None:
    """Return the name of an expert's layer without its number, the same for all its siblings."""
    kind, count = _EXPERT.subn(r"\1*\3", layer)
    return kind if count else None


@contextlib.contextmanager
def quantized_activations(
    block: nn.Module, targets: Sequence[Target], ranges: Mapping[str, Tensor]
) -> Iterator[None]:
    """Quantize what the targets of a block are given, as long as the context lasts.

    Layers that are given the very same tensor (q, k, v; gate, up) share the work.
    """
    last: _Quantized | None = None

    specs = {t.ref.layer: t.scheme.activation for t in targets if t.scheme.activation is not None}

    def watch(refs: Sequence[WeightRef], x: Tensor) -> Tensor:
        nonlocal last
        # projections of one expert have one scheme, and share their range
        layer = refs[0].layer
        spec, static = specs[layer], ranges.get(layer)
        if last is None or not last.serves(x, spec, static):
            made = fake_quant_alike(x, spec, static=static)
            last = _Quantized(x, _version(x), spec, static, torch.is_grad_enabled(), made)
        return last.made

    with watching(block, [t.ref for t in targets if t.ref.layer in specs], watch):
        yield


@dataclass(frozen=True)
class _Quantized:
    """Activations that were quantized, and what they were before."""

    x: Tensor
    version: int
    spec: TensorSpec
    static: Tensor | None
    grad: bool
    made: Tensor

    def serves(self, x: Tensor, spec: TensorSpec, static: Tensor | None) -> bool:
        """Tell whether `x`, quantized so, is what was made."""
        same = x is self.x and _version(x) == self.version and spec == self.spec
        if not same or torch.is_grad_enabled() != self.grad:
            return False
        if static is None or self.static is None:
            return static is self.static
        return static is self.static or torch.equal(static, self.static)


def _version(x: Tensor) -> int:
    """Return a number that changes when a tensor is written into, where torch counts that."""
    return 0 if x.is_inference() else x._version  # noqa: SLF001 - torch has no public name for it
