"""Load a model with its blocks left on disk."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.hf.plain import plain_opening
from ar_tuner.errors import TunerError
from ar_tuner.residence import Streamed, hollow

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from ar_tuner.blocks import Block
    from ar_tuner.devices import Placement
    from ar_tuner.source import Source
    from ar_tuner.wiring import Piece, Wiring


@dataclass(frozen=True)
class Blueprint:
    """A model in a directory before its weights are read.

    Attributes:
        path: the directory.
        source: its tensors.
        model: the model, on the meta device.
        wiring: how it is made of the tensors.
    """

    path: Path
    source: Source
    model: nn.Module
    wiring: Wiring


def comers(model: nn.Module, blocks: Sequence[Block], wiring: Wiring) -> list[tuple[Piece, ...]]:
    """Return, for each block, the pieces that it alone needs: they can come and go with it.

    Parameters that several modules hold, and buffers, are not among them.
    """
    holders = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    covered = wiring.covered
    out = []
    for block in blocks:
        own = {
            name
            for key, parameter in block.module.named_parameters()
            if holders[id(parameter)] == 1 and (name := f"{block.name}.{key}") in wiring.plain
        }
        pieces = {covered[name].targets: covered[name] for name in own if name in covered}
        out.append(tuple(p for p in pieces.values() if set(p.targets) <= own))
    return out


def open_streamed(
    blueprint: Blueprint, blocks: Sequence[Block], placement: Placement, *, dtype: torch.dtype
) -> Streamed:
    """Return a model with its blocks left on disk, and what reads them.

    Args:
        blueprint: the model without weights.
        blocks: its blocks.
        placement: where they will compute.
        dtype: type of the floats.

    Raises:
        TunerError: the checkpoint lacks tensors that the architecture needs.
    """
    away = comers(blueprint.model, blocks, blueprint.wiring)
    model = load_without(blueprint, away, dtype=dtype)
    mine = [dataclasses.replace(b, module=model.get_submodule(b.name)) for b in blocks]
    return Streamed(model, mine, away, blueprint.source, placement=placement)


def load_without(
    blueprint: Blueprint, away: Sequence[Sequence[Piece]], *, dtype: torch.dtype
) -> nn.Module:
    """Return the model on the CPU, with the parameters of some pieces on the meta device.

    Transformers loads it, as it loads any model (types, ties, buffers that no file holds); the
    parameters left out are one number each for that time.

    Raises:
        TunerError: the checkpoint lacks tensors that the architecture needs.
    """
    path, source, meta, wiring = (
        blueprint.path,
        blueprint.source,
        blueprint.model,
        blueprint.wiring,
    )
    absent = {target for pieces in away for piece in pieces for target in piece.targets}
    state: dict[str, Any] = {}
    for target, piece in wiring.pieces.items():
        if target in absent:
            for name in piece.targets:
                shape = meta.get_parameter(name).shape
                state[name] = torch.zeros((), dtype=dtype).expand(shape)
        elif piece.convert is None and target in wiring.plain:
            state[target] = _Later(source, piece.sources[0])
        else:
            state |= {name: _Later(source, name) for name in piece.sources}
    model, report = plain_opening(type(meta))(
        None, config=meta.config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    check_whole(path, report)
    for name in absent:
        hollow(model, name)
    model.name_or_path = str(path)
    if (path / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def check_whole(path: Path, report: dict[str, Any]) -> None:
    """Refuse a checkpoint from which tensors are missing.

    Raises:
        TunerError: there are such.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        msg = (
            f"model {str(path)!r} lacks {len(missing)} tensors that its architecture needs "
            f"({', '.join(missing[:4])}); they would be random. Check that the checkpoint is whole."
        )
        raise TunerError(msg)


class _Later:
    """A tensor of a source that is read when Transformers asks for its values."""

    def __init__(self, source: Source, name: str) -> None:
        self._source = source
        self._name = name

    def __getitem__(self, key: Any) -> Tensor:
        ((_, tensor),) = self._source.read([self._name])
        return tensor[key]
