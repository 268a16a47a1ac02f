"""Open the model of a directory: first without its weights, then with them coming and going."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_tuner.blocks import find_blocks
from ar_tuner.loading import (
    float_type,
    is_quantized,
    load_meta,
    load_model,
    open_source,
    read_config,
)
from ar_tuner.residence import Kept
from ar_tuner.source import Turned
from ar_tuner.streaming import Blueprint, open_streamed
from ar_tuner.wiring import turned, wire

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from ar_tuner.adapters import ModelAdapter
    from ar_tuner.blocks import Block
    from ar_tuner.devices import Placement
    from ar_tuner.residence import Residence
    from ar_tuner.settings import Settings


def make_blueprint(path: Path, *, trust_remote_code: bool) -> Blueprint:
    """Return the model of a directory without its weights, and how they will be read.

    Raises:
        TunerError: it is quantized in a way that no installed package reads.
    """
    source = open_source(path)
    model = load_meta(path, trust_remote_code=trust_remote_code)
    wiring = wire(model, source.names)
    odd = turned(model, wiring) & source.dequantized
    return Blueprint(path, Turned(source, odd) if odd else source, model, wiring)


def open_directory(
    found: Blueprint,
    blocks: Sequence[Block],
    placement: Placement,
    settings: Settings,
    adapter: ModelAdapter,
) -> tuple[nn.Module, Residence]:
    """Return the model, with its blocks in memory or not, and what brings them there.

    Args:
        found: the model without weights.
        blocks: its blocks.
        placement: where they will compute.
        settings: of the run.
        adapter: what finds the blocks of the model once it has weights.

    Raises:
        TunerError: tensors are missing from the checkpoint, or an unknown type of floats.
    """
    low = settings.low_cpu_mem_usage
    if low or is_quantized(read_config(found.path)):
        dtype = float_type(settings.model_dtype, found.model.config, found.source)
        streamed = open_streamed(found, blocks, placement, dtype=dtype)
        if not low:
            streamed.whole()
        return streamed.model, streamed
    model, _ = load_model(
        found.path, dtype=settings.model_dtype, trust_remote_code=settings.trust_remote_code
    )
    mine = find_blocks(model, adapter, paths=settings.block_paths, wiring=found.wiring).blocks
    return model, Kept(model, mine, placement)
