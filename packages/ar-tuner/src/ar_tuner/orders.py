"""Checks of the order in which calibration samples pass the blocks of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_tuner.blocks import NON_TEXT
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ar_tuner.pipeline import Job
    from ar_tuner.walk import Frame


def check_left(job: Job, frames: Sequence[Frame], left: Mapping[int, int]) -> None:
    """Refuse samples that come back to a block that is finished."""
    calls = (frame.call for frame in frames)
    back = next((c.index for c in calls if c is not None and left[c.index] <= 0), None)
    if back is not None:
        msg = (
            f"the block {job.blocks[back].name} is called more often for some calibration samples "
            "than for others, so they cannot be mixed. Give samples of as many images each."
        )
        raise TunerError(msg)


def check_ordered(job: Job, orders: Sequence[list[int]]) -> None:
    """Refuse samples that pass blocks in another order than the richest of them does."""
    for order in orders[:-1]:
        rest = iter(orders[-1])
        stray = next((index for index in order if index not in rest), None)
        if stray is not None:
            msg = (
                f"some calibration samples pass the block {job.blocks[stray].name} in another "
                "order than others. Use calibration 'text' or 'image' instead of a mix."
            )
            raise TunerError(msg)


def uncalled(job: Job, order: Iterable[int]) -> list[int]:
    """Return the blocks that the plan quantizes a layer of and that are not called."""
    called = set(order)
    return [i for i, b in enumerate(job.blocks) if i not in called and job.targets(b)]


def check_called(job: Job, order: list[int]) -> None:
    """Refuse a decoder block, or a head, that no calibration sample comes by.

    What looks at images may hold parts that the model has no use for; they are not refused.
    """
    missed = [job.blocks[i].name for i in uncalled(job, order)]
    missed = [name for name in missed if not NON_TEXT.search(name)]
    if missed:
        msg = (
            f"{len(missed)} blocks are never run on text and cannot be tuned: "
            f"{', '.join(missed[:8])}. Leave them out with ignore_layers, or use recipe 'rtn'."
        )
        raise TunerError(msg)
    head = len(job.discovery.blocks)
    if job.head is not None and (order[-1] != head or order.count(head) > 1):
        msg = (
            f"the output head {job.head.name} is not run once, after all blocks, so it cannot be "
            "tuned with them. Leave it in 16 bits (quant_lm_head off), or use recipe 'rtn'."
        )
        raise TunerError(msg)
