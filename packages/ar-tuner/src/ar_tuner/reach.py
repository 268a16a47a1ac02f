"""Which layers of a block bear on its output, as far as gradients can tell.

Some never run on the calibration data (cross-attention without an image, experts for images), some
decide without a gradient (indexers). Nothing can be tuned there, which a user should know.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.rows import rebuilt
from ar_tuner.walk import hidden, trace_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from ar_tuner.parts import WeightRef
    from ar_tuner.pipeline import Job
    from ar_tuner.walk import Call

_NAMED = 6
_EXPERT = re.compile(r"\.experts\.\d+\.")


def unreached(
    block: nn.Module, refs: Sequence[WeightRef], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[WeightRef, ...]:
    """Return the layers that no finite gradient of the block's output reaches, or only zeros.

    Experts in one parameter count as one: it is the list of them that is called.

    Args:
        block: the block.
        refs: its layers.
        args: what it is given, in containers that it may change.
        kwargs: likewise.
    """
    called = {ref.module for ref in refs}
    felt = _felt_by_outputs(block, called, args, kwargs)
    # layers whose weight the model takes instead of calling them
    others = {ref.parameter for ref in refs if ref.module not in felt}
    felt_too = _felt_by_weights(block, others, args, kwargs) if others else set()
    return tuple(r for r in refs if r.module not in felt and r.parameter not in felt_too)


def unreached_by(job: Job, example: Mapping[str, object]) -> list[str]:
    """Return the layers that the plan quantizes and that a sample gives no gradient.

    Of blocks that are not called all; of experts those of which no sibling has one either.

    Args:
        job: the walk to come; its blocks are brought into memory one by one.
        example: arguments of the model's forward.
    """
    reached: dict[str, bool] = {}
    for block in job.discovery.blocks:
        for target in job.targets(block):
            reached.setdefault(_EXPERT.sub(".experts.*.", target.ref.layer), False)

    def visit(call: Call) -> object:
        job.enter(call.index)
        if call.index < len(job.discovery.blocks):
            block = job.blocks[call.index]
            refs = [t.ref for t in job.targets(block)]

            def felt(*args: object, **kwargs: object) -> None:
                missed = unreached(block.module, refs, args, kwargs)
                found = {r.layer for r in refs} - {r.layer for r in missed}
                reached.update(dict.fromkeys((_EXPERT.sub(".experts.*.", x) for x in found), True))

            job.route(call.index).run(felt, call.args, call.kwargs)
        return job.visit(call)

    modules = [block.module for block in job.blocks]
    trace_calls(job.adapter.entry(job.model), modules, example, run=visit)
    return [layer for layer, is_reached in reached.items() if not is_reached]


def remark(name: str, refs: Sequence[WeightRef]) -> str:
    """Return what a user should know of layers that a block's output does not depend on."""
    tails = list(dict.fromkeys(ref.parameter.removesuffix(".weight") for ref in refs))
    more = f" and {len(tails) - _NAMED} more" if len(tails) > _NAMED else ""
    return (
        f"{name}: the calibration data does not reach {', '.join(tails[:_NAMED])}{more} "
        f"({len(refs)} layers); they are rounded by their weights alone"
    )


def _felt_by_outputs(
    block: nn.Module, modules: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> set[str]:
    """Return the modules on whose outputs the block's output depends."""
    shifts: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., Tensor | None]:
        def add(module: nn.Module, given: Any, output: Any) -> Tensor | None:  # noqa: ARG001
            if not isinstance(output, torch.Tensor) or not output.is_floating_point():
                return None
            shift = torch.zeros_like(output, requires_grad=True)
            shifts.setdefault(name, []).append(shift)
            return output + shift

        return add

    with _hooks(block, {name: hook(name) for name in modules}), torch.enable_grad():
        loss = _loss(block(*_apart(args), **_apart(kwargs)))
    every = [(name, shift) for name, found in shifts.items() for shift in found]
    grads = _gradients(loss, [shift for _, shift in every])
    return {name for (name, _), grad in zip(every, grads, strict=True) if _is_felt(grad)}


def _felt_by_weights(
    block: nn.Module, names: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> set[str]:
    """Return the parameters on which the block's output depends."""
    moving: Mapping[str, Tensor] = {
        name: block.get_parameter(name).detach().clone().requires_grad_() for name in names
    }
    with torch.enable_grad():
        output = torch.func.functional_call(block, dict(moving), _apart(args), _apart(kwargs))
        grads = _gradients(_loss(output), list(moving.values()))
    return {name for name, grad in zip(moving, grads, strict=True) if _is_felt(grad)}


def _loss(output: object) -> Tensor:
    return hidden(output).float().square().mean()


def _gradients(loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor | None]:
    if not leaves or not loss.requires_grad:
        return [None] * len(leaves)
    found: Sequence[Tensor | None] = torch.autograd.grad(loss, leaves, allow_unused=True)
    return found


def _is_felt(grad: Tensor | None) -> bool:
    return grad is not None and bool(torch.isfinite(grad).all()) and bool(grad.abs().max() > 0)


@contextlib.contextmanager
def _hooks(block: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, hook in hooks.items():
            stack.callback(block.get_submodule(name).register_forward_hook(hook).remove)
        yield


def _apart(tree: Any) -> Any:
    """Return arguments in new containers: a block may write into those of its caller."""
    return rebuilt(tree, (), lambda _, tensor: tensor.detach())
