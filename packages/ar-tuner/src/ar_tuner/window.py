"""Windows: several consecutive blocks that are tuned as one.

Blocks of a window are chained by their hidden state: what one gives, the next is given, and
nothing else that a later block is given depends on it. That is checked on one row before work,
with a forward whose blocks' outputs are changed: models that compute between their blocks, or pass
more than one state on, are refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ar_tuner.errors import TunerError
from ar_tuner.rows import leaves_of
from ar_tuner.walk import Call, execute, hidden, suspended

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_tuner.algorithms.base import Target
    from ar_tuner.walk import Frame

Place = tuple[bool, int | str]
"""Where a call holds the hidden state: (is a keyword, position or name)."""


@dataclass(frozen=True)
class Passage:
    """The way of one frame through a window.

    Attributes:
        calls: what each block was given.
        output: what the last block gave.
        places: where each block but the first was given the hidden state.
    """

    calls: tuple[Call, ...]
    output: object
    places: tuple[Place, ...]


class Window(nn.Module):
    """Consecutive blocks as one module; its arguments are (args, kwargs) of each block."""

    def __init__(self, blocks: Sequence[nn.Module], places: Sequence[Place]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self._places = tuple(places)

    def forward(self, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> object:
        """Return what the last block gives, each block being given what the one before gives."""
        args, kwargs = calls[0]
        out = self.blocks[0](*args, **kwargs)
        rest = zip(list(self.blocks)[1:], calls[1:], self._places, strict=True)
        for block, (later_args, later_kwargs), place in rest:
            args, kwargs = _with_state(later_args, later_kwargs, place, hidden(out))
            out = block(*args, **kwargs)
        return out


def windows(order: Sequence[int], lists: Sequence[str], size: int) -> list[tuple[int, ...]]:
    """Return the calls of one forward in windows of up to `size` blocks.

    Args:
        order: block indices as one forward calls them.
        lists: by block index, the list of blocks it belongs to; windows stay within one.
        size: largest number of blocks.
    """
    out: list[tuple[int, ...]] = []
    for index in order:
        last = out[-1] if out else ()
        joins = (
            0 < len(last) < size
            and index == last[-1] + 1
            and lists[index] == lists[last[-1]]
            and order.count(index) == order.count(last[0]) == 1
        )
        if joins:
            out[-1] = (*last, index)
        else:
            out.append((index,))
    return out


def follow(modules: Sequence[nn.Module], window: Sequence[int], frame: Frame) -> Passage:
    """Lead a frame through a window with the weights the blocks have, up to its last block.

    The frame is left standing before the last block, whose output is not handed to it yet.
    """
    calls: list[Call] = []
    places: list[Place] = []
    output: object = None
    for index in window:
        if calls:
            frame.resume(output)
        call = frame.call
        if call is None or call.index != index:
            raise TunerError(_not_chained(index))
        if calls:
            places.append(_place(call, hidden(output), index))
        calls.append(_without_state(call, places[-1]) if calls else call)
        output = execute(modules[index], call)
    return Passage(tuple(calls), output, tuple(places))


def joint_call(passage: Passage, first: Call) -> Call:
    """Return the call of a `Window`, its first block being given `first`."""
    calls = (first, *passage.calls[1:])
    return Call(first.index, tuple((c.args, c.kwargs) for c in calls), {})


def shifted(targets: Mapping[int, Sequence[Target]]) -> tuple[Target, ...]:
    """Return the targets of blocks as parameters of the window that holds them, in order."""
    out = []
    for position, group in enumerate(targets.values()):
        for target in group:
            name = f"blocks.{position}.{target.ref.parameter}"
            ref = dataclasses.replace(target.ref, parameter=name)
            out.append(dataclasses.replace(target, ref=ref))
    return tuple(out)


def check_chained(
    entry: nn.Module,
    modules: Sequence[nn.Module],
    joined: Sequence[tuple[int, ...]],
    batch: Mapping[str, object],
) -> None:
    """Refuse windows whose blocks are not chained by their hidden state alone.

    Raises:
        TunerError: the model computes between them, or a later block is given more of an earlier
            one than its hidden state.
    """
    inner = {index for window in joined for index in window[1:]}
    if not inner:
        return
    with suspended(entry, modules, [batch, batch]) as (plain, shaken):
        before: tuple[object, object] = (None, None)
        while plain.call is not None and shaken.call is not None:
            calls = plain.call, shaken.call
            if calls[0].index in inner:
                _same_but_state(calls, before)
            plain_out, shaken_out = (execute(modules[c.index], c) for c in calls)
            before = (plain_out, _shaken(shaken_out))
            plain.resume(before[0])
            shaken.resume(before[1])


def _same_but_state(calls: tuple[Call, Call], outputs: tuple[object, object]) -> None:
    index = calls[0].index
    places = [_place(c, hidden(o), index) for c, o in zip(calls, outputs, strict=True)]
    mine, theirs = (
        dict(leaves_of(_pair(_without_state(c, p)))) for c, p in zip(calls, places, strict=True)
    )
    if mine.keys() != theirs.keys() or any(not torch.equal(mine[k], theirs[k]) for k in mine):
        raise TunerError(_not_chained(index))


def _place(call: Call, state: Tensor, index: int) -> Place:
    for position, value in enumerate(call.args):
        if value is state:
            return False, position
    for name, value in call.kwargs.items():
        if value is state:
            return True, name
    raise TunerError(_not_chained(index))


def _without_state(call: Call, place: Place) -> Call:
    args, kwargs = _with_state(call.args, call.kwargs, place, None)
    return Call(call.index, args, kwargs)


def _with_state(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], place: Place, state: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    named, key = place
    if named:
        return args, {**kwargs, str(key): state}
    return tuple(state if i == key else a for i, a in enumerate(args)), dict(kwargs)


def _pair(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return call.args, call.kwargs


def _shaken(output: object) -> object:
    changed = hidden(output) * 1.25
    if isinstance(output, (tuple, list)):
        return type(output)([changed, *output[1:]])
    return changed


def _not_chained(index: int) -> str:
    return (
        f"nblocks above 1 cannot be used with this model: block {index} is not given just what the "
        "block before it gives (the model computes between them, or passes more on). Use nblocks 1."
    )
