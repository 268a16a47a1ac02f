"""Which blocks are in memory, and where: `Residence`, for the walk and for whoever comes after it.

A block comes (`enter`) when its turn does and goes (`leave`) when the walk has passed it. `settle`
says that its weights are final: from then on the block comes back with those.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ar_tuner.carry import moved, to
from ar_tuner.devices import CPU
from ar_tuner.errors import TunerError
from ar_tuner.wiring import read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from ar_tuner.blocks import Block
    from ar_tuner.devices import Placement
    from ar_tuner.source import Source
    from ar_tuner.wiring import Piece

    Finals = Callable[[], Mapping[str, Tensor] | None]


class Residence(Protocol):
    """Brings blocks into memory and lets them go. Entering twice, or leaving twice, is harmless.

    `keep`: settled blocks stay in memory.
    """

    keep: bool

    @property
    def placement(self) -> Placement:
        """Where blocks compute, and where the rest is."""

    def enter(self, index: int) -> None:
        """Bring a block's weights to its device: the float ones, or the final ones once settled."""

    def settle(self, index: int, finals: Finals) -> None:
        """Take note that a block's weights are final.

        `finals` gives the parameters that are not those of the source, by name in the block.
        """

    def leave(self, index: int) -> None:
        """Let a block go."""

    def whole(self) -> None:
        """Bring everything into memory for good, settled blocks with their final weights."""


class Kept:
    """Blocks of a model that is in memory: they go to their device and come back from it."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], placement: Placement) -> None:
        self.placement = placement
        self.keep = True
        self._model = model
        self._blocks = [b.module for b in blocks]
        self._origin = next(model.parameters()).device
        send(outside(model, self._blocks), placement.home)

    def enter(self, index: int) -> None:
        """Bring a block to its device."""
        send(self._blocks[index].modules(), self.placement.blocks[index])

    def settle(self, index: int, finals: Finals) -> None:
        """Do nothing: the final weights are in the block."""

    def leave(self, index: int) -> None:
        """Bring a block back to where it was."""
        if self.placement.blocks[index] is not None:
            send(self._blocks[index].modules(), self._origin)

    def whole(self) -> None:
        """Bring everything back to where it was."""
        if self.placement.home is not None:
            send(self._model.modules(), self._origin)


class Streamed:
    """Blocks that are read from a checkpoint when their turn comes and leave memory after it.

    Args:
        model: the model; the parameters in `pieces` are on the meta device.
        blocks: its blocks.
        pieces: what each block is read from.
        source: the checkpoint.
        placement: where blocks compute.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        pieces: Sequence[Sequence[Piece]],
        source: Source,
        *,
        placement: Placement,
    ) -> None:
        self.placement = placement
        self.keep = False
        self.model = model
        self.inside: set[int] = set()
        self._blocks = blocks
        self._pieces = pieces
        self._source = source
        self._settled: dict[int, Finals] = {}
        send(outside(model, [b.module for b in blocks]), placement.home)

    def enter(self, index: int) -> None:
        """Read a block's weights to its device.

        Raises:
            TunerError: the source no longer gives what it gave at the beginning.
        """
        block, device = self._blocks[index], self.placement.blocks[index]
        if index not in self.inside:
            final = self._final(index)
            wanted = [p for p in self._pieces[index] if not set(p.targets) <= final.keys()]
            for name, tensor in read(wanted, self._source, self._dtype):
                self._put(name, to(device)(tensor))
            for name, tensor in final.items():
                self._put(name, to(device)(tensor))
            self.inside.add(index)
            lost = [n for n, p in block.module.named_parameters() if p.is_meta]
            if lost:
                msg = f"block {block.name} could not be read whole: {', '.join(lost[:4])} missing"
                raise TunerError(msg)
        send(block.module.modules(), device)

    def settle(self, index: int, finals: Finals) -> None:
        """Take note that a block's weights are final, and where they can be had from."""
        self._settled[index] = finals

    def leave(self, index: int) -> None:
        """Let go of a block's weights; of a settled one's only if they are not to be kept."""
        if self.keep and index in self._settled:
            send(self._blocks[index].module.modules(), CPU)
            return
        for piece in self._pieces[index] if index in self.inside else ():
            for name in piece.targets:
                hollow(self.model, name)
        self.inside.discard(index)

    def whole(self) -> None:
        """Read every block that is not in memory, and keep them all from now on."""
        for index in range(len(self._blocks)):
            if index not in self.inside:
                self.enter(index)
            self._settled.setdefault(index, dict)  # not to leave again
        self.keep = True
        send(self.model.modules(), CPU)

    def _final(self, index: int) -> dict[str, Tensor]:
        """Return the final parameters of a settled block, of those that come and go."""
        finals = self._settled[index]() if index in self._settled else None
        name = self._blocks[index].name
        mine = {target for piece in self._pieces[index] for target in piece.targets}
        return {k: v for n, v in (finals or {}).items() if (k := f"{name}.{n}") in mine}

    def _dtype(self, name: str) -> torch.dtype:
        return self.model.get_parameter(name).dtype

    def _put(self, name: str, tensor: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        setattr(
            self.model.get_submodule(module),
            leaf,
            nn.Parameter(tensor.contiguous(), requires_grad=False),
        )


def hollow(model: nn.Module, name: str) -> None:
    """Replace a parameter by one of its shape and type that holds no data."""
    module, _, leaf = name.rpartition(".")
    empty = torch.empty_like(model.get_parameter(name), device="meta")
    setattr(model.get_submodule(module), leaf, nn.Parameter(empty, requires_grad=False))


def outside(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules of a model that lie in none of its blocks."""
    inner = {id(module) for block in blocks for module in block.modules()}
    return [module for module in model.modules() if id(module) not in inner]


def send(modules: Iterable[nn.Module], device: torch.device | None) -> None:
    """Move parameters and buffers of modules, not of their children; tied ones stay tied.

    What is on the meta device stays there.
    """
    if device is None:
        return
    sent: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device != device and not parameter.is_meta:
                if id(parameter) not in sent:
                    value = parameter.detach().to(device)
                    sent[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                setattr(module, name, sent[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device != device and not buffer.is_meta:
                setattr(module, name, buffer.to(device))


@contextlib.contextmanager
def on_call(residence: Residence, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let the model be called although its blocks are away: each comes for its own call only."""
    placement = residence.placement
    handles = []

    def bring(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
            residence.enter(index)
            return moved((args, kwargs), to(placement.blocks[index]))

        return hook

    def release(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
            residence.leave(index)
            return moved(output, to(placement.home))

        return hook

    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(bring(index), with_kwargs=True))
            handles.append(block.register_forward_hook(release(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()
