"""Which norm of a block feeds which layers: found by looking at tensors, never at names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from ar_tuner.algorithms.base import BlockTask, Target


@dataclass(frozen=True)
class Fed:
    """A norm whose output goes into some layers and nowhere else that a hook can see.

    Attributes:
        norm: name of the module in the block.
        targets: the layers.
        parameters: names of the norm's own parameters [I] in the block, the gain first.
    """

    norm: str
    targets: tuple[Target, ...]
    parameters: tuple[str, ...]


@dataclass
class Seen:
    """The calls of one forward; tensors are kept, so equal addresses mean equal contents.

    Attributes:
        given: what modules without parts were given, in order.
        made: what norms made, in order.
    """

    given: list[tuple[nn.Module, Tensor]]
    made: list[tuple[nn.Module, Tensor]]

    def normed(self, given: Tensor) -> bool:
        """Tell whether a norm made what something was given."""
        return any(_same(given, made) for _, made in self.made)


def norms_of(task: BlockTask) -> list[Fed]:
    """Return the norms of a block that feed layers to quantize, and those layers, in order.

    A norm is left out if it is called twice, if anything but layers to quantize is given what it
    makes, or if one of those is called with anything else too. What no module is given (a tensor
    that code of the block uses itself) is not seen here: folding is proved afterwards.
    """
    modules = {id(m): name for name, m in task.block.named_modules()}
    whole = [t for t in task.targets if t.ref.whole]  # experts are given tokens one by one
    targets = {id(task.block.get_submodule(t.ref.module)): t for t in whole}
    seen = watched(task)
    out = []
    for module, tensor in seen.made:
        takers = [m for m, given in seen.given if _same(given, tensor)]
        alone = sum(m is module for m, _ in seen.made) == 1
        once = all(sum(m is t for m, _ in seen.given) == 1 for t in takers)
        if not takers or not alone or not once or any(id(t) not in targets for t in takers):
            continue
        name = modules[id(module)]
        own = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
        own.sort(key=lambda key: not key.endswith(".weight"))
        out.append(Fed(name, tuple(targets[id(t)] for t in takers), tuple(own)))
    return out


def watched(task: BlockTask) -> Seen:
    """Return the calls of a forward of a few rows."""
    assert task.inputs is not None
    seen = Seen([], [])

    def given(module: nn.Module, args: tuple[object, ...]) -> None:
        seen.given.extend((module, a) for a in args if isinstance(a, Tensor))

    def made(module: nn.Module, args: object, output: object) -> None:  # noqa: ARG001
        if isinstance(output, Tensor):
            seen.made.append((module, output))

    handles = [m.register_forward_pre_hook(given) for m in _leaves(task.block)]
    handles += [m.register_forward_hook(made) for m in _leaves(task.block) if _is_norm(m)]
    try:
        with torch.no_grad():
            task.run({}, few(task))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def few(task: BlockTask) -> Sequence[int]:
    """Return a row or few, for trials."""
    assert task.inputs is not None
    return task.inputs.chunks(1, task.settings.batch_size)[0]


def _leaves(block: nn.Module) -> Iterator[nn.Module]:
    return (m for m in block.modules() if next(m.children(), None) is None)


def _is_norm(module: nn.Module) -> bool:
    """Tell whether a module has nothing but a gain for each channel, and perhaps a bias."""
    own = dict(module.named_parameters())
    gain = own.get("weight")
    return (
        gain is not None
        and gain.ndim == 1
        and set(own) <= {"weight", "bias"}
        and all(p.shape == gain.shape for p in own.values())
    )


def _same(a: Tensor, b: Tensor) -> bool:
    # views of another shape too: some blocks flatten rows before their experts
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
