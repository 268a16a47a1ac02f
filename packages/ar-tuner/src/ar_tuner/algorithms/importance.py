"""How much each input channel of each layer matters: the mean square of what flows through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from ar_tuner.algorithms.base import BlockTask

ROWS = 32
"""Rows that are looked at; the mean square settles long before."""


def input_energy(task: BlockTask) -> dict[str, Tensor]:
    """Return the mean square of each layer's input channels, float32 [I], by layer name."""
    assert task.inputs is not None
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001
            x = args[0].detach().float().reshape(-1, args[0].shape[-1])
            sums[layer] = sums.get(layer, 0.0) + x.square().sum(0)
            counts[layer] = counts.get(layer, 0) + x.shape[0]

        return hook

    for target in task.targets:
        module = task.block.get_submodule(target.ref.parameter.rpartition(".")[0])
        handles.append(module.register_forward_pre_hook(watch(target.ref.layer)))
    try:
        with torch.no_grad():
            for rows in task.inputs.chunks(ROWS, task.settings.batch_size):
                task.run({}, rows)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: total / max(1, counts[layer]) for layer, total in sums.items()}
