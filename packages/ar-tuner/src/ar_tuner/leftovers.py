"""What the walk does not reach: layers outside the blocks, tensors that stay, names in files."""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING

from ar_tuner.algorithms.base import Target
from ar_tuner.algorithms.rtn import nearest
from ar_tuner.blocks import is_linear, weight_of
from ar_tuner.errors import TunerError
from ar_tuner.events import Note
from ar_tuner.experts import as_in_files
from ar_tuner.parts import WeightRef
from ar_tuner.pipeline import Job, install
from ar_tuner.renaming import plan_in_files
from ar_tuner.source import stored_weight
from ar_tuner.wiring import read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerPlan
    from ar_tuner.api import AutoRound, Prepared
    from ar_tuner.settings import Settings
    from ar_tuner.wiring import Piece


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
    parts = {f"{r.layer}.weight": f"{r.layer}.weight" for r in _parts(prepared)}
    found = request.wiring(prepared.model).names | parts
    if request.source is None:
        return found
    found |= {name: name for piece in _cut(request, prepared) for name in piece.targets}
    lost = [r.layer.name for r in prepared.plan.quantized if f"{r.layer.name}.weight" not in found]
    if lost:
        msg = (
            f"{len(lost)} layers have no tensor of their own in {request.source}, so their "
            f"quantized weights could not be named: {', '.join(lost[:6])}"
        )
        raise TunerError(msg)
    return found


def staying(plan: LayerPlan, settings: Settings) -> Iterator[Note]:
    """Yield what to tell of the layers that are not quantized anew."""
    heads = (row for row in plan.rows if row.layer.role == "lm_head" and row.layer.tied)
    for row in heads if settings.quant_lm_head else ():
        text = (
            f"quant_lm_head: {row.layer.name} {row.reason}. Give it a weight of its own in the "
            "source (tie_word_embeddings false), or let ar-kernels pack it as the model is opened "
            "(head_bits)"
        )
        yield Note("warning", text)
    for row in plan.fallbacks:
        yield Note("info", f"{row.layer.name} stays in 16 bit: {row.reason}")
    for name, count in Counter(row.written.name for row in plan.kept).items():
        yield Note("info", f"{count} layers stay {name}, as the source stores them")
    if settings.keep_source and not plan.kept:
        text = "keep_source: the source stores no layer quantized that is not quantized anew"
        yield Note("warning", text)


def kept(request: AutoRound, prepared: Prepared) -> dict[str, Callable[[], QuantizedWeight]]:
    """Return what reads the layers that stay as the source stores them, by name in the files."""
    if request.source is None or not prepared.plan.kept:
        return {}
    found = request.blueprint()
    rows = plan_in_files(prepared.plan, found.wiring, found.source).kept
    names = [row.layer.name for row in rows]
    return {n: functools.partial(stored_weight, found.source, f"{n}.weight") for n in names}


def untouched(
    request: AutoRound, prepared: Prepared, written: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that stay as they are, one at a time; a tied head is left out."""
    tied = {f"{r.layer.name}.weight" for r in prepared.plan.rows if r.layer.tied}
    apart = _taken_apart(prepared)
    if request.source is not None:
        found = request.blueprint()
        pieces = found.wiring.covered
        # of experts that are single in the files, too, `written` has the names
        fused = (pieces[name].sources for name in apart)
        stacks = {key for names in fused if not written.intersection(names) for key in names}
        gone = written | tied | stacks
        cut = _cut(request, prepared)
        gone |= {piece.sources[0] for piece in cut}
        yield from found.source.read(k for k in found.source.names if k not in gone)
        for name, tensor in read(cut, found.source, lambda _: found.source.dtype):
            if name not in written:
                yield name, tensor
        return
    state = {k: t.detach() for k, t in prepared.model.state_dict().items() if k not in apart}
    for key, tensor in as_in_files(prepared.model, state).items():
        if key not in written and key not in tied:
            yield key, tensor.cpu()


def _cut(request: AutoRound, prepared: Prepared) -> list[Piece]:
    """Return the tensors of the source that the model cuts into several, some of them quantized.

    Their parts are written one by one, under the names that the model has for them: Transformers
    takes those as they are.
    """
    planned = {f"{r.layer.name}.weight" for r in prepared.plan.quantized}
    return [
        piece
        for piece in request.blueprint().wiring.pieces.values()
        if len(piece.sources) == 1 and len(piece.targets) > 1 and planned & set(piece.targets)
    ]


def _parts(prepared: Prepared) -> list[WeightRef]:
    """Return the parts of parameters that the plan quantizes."""
    planned = {r.layer.name for r in prepared.plan.quantized}
    blocks = prepared.discovery.blocks
    return [ref for b in blocks for ref in b.experts.parts if ref.layer in planned]


def _taken_apart(prepared: Prepared) -> set[str]:
    """Return the parameters of the model whose parts are written one by one."""
    planned = {ref.layer for ref in _parts(prepared)}
    return {
        f"{block.name}.{ref.parameter}"
        for block in prepared.discovery.blocks
        for ref in block.experts.parts
        if ref.layer in planned
    }


def keep_choice(request: AutoRound, directory: Path) -> None:
    """Write what an `AutoScheme` chose into a directory, and say so; do nothing without one."""
    if request.chooser is not None:
        request.save_plan(directory / "plan.json")
        request.save_front(directory / "front.json")
        text = f"chosen: {directory / 'plan.json'} (for layer_config), the others: front.json"
        request.emit(Note("info", text))
