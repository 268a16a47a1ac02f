"""Steps of a family's check that run the model: discovery, the exact walk, gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.blocks import is_linear, weights_of
from ar_tuner.errors import TunerError
from ar_tuner.reach import unreached
from ar_tuner.walk import execute, suspended, trace_calls

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from ar_schemes import LayerPlan
    from ar_tuner.adapters import ModelAdapter
    from ar_tuner.blocks import Discovery

    Batch = Mapping[str, object]

CLOSE = 1e-4
"""Largest difference of logits, relative to their largest magnitude: sums in another order."""
_NARROW = 32
"""Bare parameters narrower than this are no matrices worth quantizing."""
_SMALL = ("norm", "conv", "embed", "bias", "pos_emb", "rotary", "a_log", "token_type", "scale")
"""Words in the names of parameters that are no matrices of products."""


def logits_of(model: nn.Module, adapter: ModelAdapter, batch: Batch) -> Tensor:
    """Return what a model predicts: logits, or the first floats of its output."""
    with torch.no_grad():
        return _logits(adapter.entry(model)(**batch))


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest magnitude of the second.

    Raises:
        TunerError: other shapes, or numbers that are not finite.
    """
    if one.shape != other.shape or not (torch.isfinite(one).all() and torch.isfinite(other).all()):
        msg = f"outputs {list(one.shape)} and {list(other.shape)} differ in shape or are not finite"
        raise TunerError(msg)
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-9))


def check_called(
    model: nn.Module, adapter: ModelAdapter, found: Discovery, batches: Sequence[Batch]
) -> tuple[int, ...]:
    """Return the blocks that a batch calls, in order; together the batches have to call all.

    Raises:
        TunerError: blocks that hold weights and are never called.
    """
    modules = [block.module for block in found.blocks]
    orders = [trace_calls(adapter.entry(model), modules, batch) for batch in batches]
    missed = set(range(len(modules))) - {i for order in orders for i in order}
    if missed:
        msg = f"blocks never called: {[found.blocks[i].name for i in sorted(missed)]}"
        raise TunerError(msg)
    return tuple(orders[0])


def silent_weights(found: Discovery, plan: LayerPlan) -> list[str]:
    """Return the matrices in blocks that no row of the plan stands for."""
    planned = {row.layer.name for row in plan.rows}
    out: list[str] = []
    for block in found.blocks:
        fused = {ref.parameter for ref in block.experts.parts if ref.layer in planned}
        kept = {f"{info.name}" for _, info in block.experts.kept if info.name in planned}
        for name, parameter in block.module.named_parameters():
            holder = block.module.get_submodule(name.rpartition(".")[0])
            full = f"{block.name}.{name}"
            layer = full.removesuffix(".weight")
            listed = name in fused or bool({full, layer} & (kept | planned)) or _is_kept(full, kept)
            matrix = parameter.ndim > 1 and min(parameter.shape[-2:]) >= _NARROW
            if matrix and not listed and (is_linear(holder) or _counts(full, holder)):
                out.append(full)
    return out


def check_walk(
    model: nn.Module, adapter: ModelAdapter, found: Discovery, batches: Sequence[Batch]
) -> float:
    """Return how far the walk's logits are from those of the plain forward.

    Every block is changed (its matrices rounded) while all batches stand before it, as tuning
    does; the walk must then give what the changed model gives. The model gets its weights back.

    Raises:
        TunerError: it is further away than sums in another order would be.
    """
    modules = [block.module for block in found.blocks]
    floats = {name: p.clone() for name, p in model.named_parameters()}
    changed: set[int] = set()
    with suspended(adapter.entry(model), modules, batches) as frames:
        while waiting := [f for f in frames if f.call is not None]:
            first = min(f.call.index for f in waiting if f.call is not None)
            if first not in changed:
                changed.add(first)
                _round(modules[first])
            for frame in waiting:
                if frame.call is not None and frame.call.index == first:
                    frame.resume(execute(modules[first], frame.call))
        walked = [_logits(frame.output) for frame in frames]
    plain = [logits_of(model, adapter, batch) for batch in batches]
    for name, parameter in model.named_parameters():
        parameter.data = floats[name]
    worst = max(difference(w, p) for w, p in zip(walked, plain, strict=True))
    before = [logits_of(model, adapter, batch) for batch in batches]
    moved = max(difference(b, p) for b, p in zip(before, plain, strict=True))
    if worst > CLOSE:
        msg = f"the walk's logits differ by {worst:.2g} from the plain forward's"
        raise TunerError(msg)
    if moved <= CLOSE:
        msg = f"rounding every block changed the logits by {moved:.2g} only: nothing was walked"
        raise TunerError(msg)
    return worst


def dead_layers(
    model: nn.Module,
    adapter: ModelAdapter,
    found: Discovery,
    plan: LayerPlan,
    batches: Sequence[Batch],
) -> dict[str, list[str]]:
    """Return, by block, the layers that would be quantized and that no gradient reaches."""
    modules = [block.module for block in found.blocks]
    left = {
        block.name: weights_of(
            block, [row.layer.name for row in plan.of_block(block.name) if row.quantized]
        )
        for block in found.blocks
    }
    for batch in batches:
        with suspended(adapter.entry(model), modules, [batch]) as (frame,):
            while frame.call is not None:
                call = frame.call
                block = found.blocks[call.index]
                if left[block.name]:
                    dead = unreached(block.module, left[block.name], call.args, call.kwargs)
                    left[block.name] = list(dead)
                frame.resume(execute(block.module, call))
    return {name: [ref.layer for ref in refs] for name, refs in left.items() if refs}


def _is_kept(full: str, kept: set[str]) -> bool:
    return any(full.startswith(f"{name}.") for name in kept)


def _counts(full: str, holder: nn.Module) -> bool:
    name = f"{full} {type(holder).__name__}".lower()
    return not any(word in name for word in _SMALL)


def _round(block: nn.Module) -> None:
    for parameter in block.parameters():
        if parameter.ndim > 1:
            step = parameter.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 3
            parameter.data = (parameter / step).round() * step


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", None)
    if found is None:
        found = output[0]
    assert isinstance(found, torch.Tensor)
    return found.float()
