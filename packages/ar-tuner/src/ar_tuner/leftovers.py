"""What the walk does not reach: layers outside the blocks, tensors that stay, names in files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_tuner.algorithms.base import Target
from ar_tuner.algorithms.rtn import nearest
from ar_tuner.blocks import WeightRef, is_linear, weight_of
from ar_tuner.errors import TunerError
from ar_tuner.events import Note
from ar_tuner.pipeline import Job, install

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_tuner.api import AutoRound, Prepared


def unreached(prepared: Prepared, job: Job) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield quantized layers that the walk does not reach (the embedding), rounded to nearest."""
    walked = None if job.head is None else job.head.name
    for row in prepared.plan.of_block(None):
        if row.quantized and row.layer.name != walked:
            module = prepared.model.get_submodule(row.layer.name)
            ref = WeightRef(row.layer.name, "weight", transposed=False)
            if not is_linear(module) and row.layer.role != "embedding":
                msg = f"{row.layer.name}: only linear layers and embeddings can be quantized here"
                raise TunerError(msg)
            yield row.layer.name, nearest(Target(ref, row.scheme), weight_of(module))


def install_outside(model: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Put a dequantized weight in the place of the float one."""
    module = model.get_submodule(name)
    install(module, {"weight": weight.dequantize().to(weight_of(module).dtype)})


def source_names(request: AutoRound, prepared: Prepared) -> dict[str, str]:
    """Return the names of the model's tensors in the source checkpoint.

    Raises:
        TunerError: quantized layers have no tensor of their own there.
    """
    if request.source is None:
        return {k: k for k in prepared.model.state_dict()}
    found = request.blueprint().wiring.names
    lost = [r.layer.name for r in prepared.plan.quantized if f"{r.layer.name}.weight" not in found]
    if lost:
        msg = (
            f"{len(lost)} layers have no tensor of their own in {request.source}, so their "
            f"quantized weights could not be named: {', '.join(lost[:6])}"
        )
        raise TunerError(msg)
    return found


def untouched(
    request: AutoRound, prepared: Prepared, written: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that stay as they are, one at a time; a tied head is left out."""
    tied = {f"{r.layer.name}.weight" for r in prepared.plan.rows if r.layer.tied}
    if request.source is not None:
        source = request.blueprint().source
        yield from source.read(k for k in source.names if k not in written and k not in tied)
        return
    for key, tensor in prepared.model.state_dict().items():
        if key not in written and key not in tied:
            yield key, tensor.detach().cpu()


def keep_choice(request: AutoRound, directory: Path) -> None:
    """Write what an `AutoScheme` chose into a directory, and say so; do nothing without one."""
    if request.chooser is not None:
        request.save_plan(directory / "plan.json")
        request.save_front(directory / "front.json")
        text = f"chosen: {directory / 'plan.json'} (for layer_config), the others: front.json"
        request.emit(Note("info", text))
