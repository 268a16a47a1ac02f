"""The parts of a model that look at images, in blocks: layers of a tower, projectors, mergers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from ar_tuner.blocks import NON_TEXT, is_linear

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_OTHER = re.compile(
    r"(^|\.)(audio\w*|speech\w*|\w*_audio|talker|code2wav|token2wav|code_predictor|vqmodel|"
    r"generation_\w+|\w*audio_tower|\w*audio_projector)(\.|$)",
    re.IGNORECASE,
)
"""What listens, speaks or draws."""
_IMAGE = re.compile(r"(^|\.)(image_\w+|img_\w+)(\.|$)")
"""Further names of what looks at images, within the text decoder."""
_KEPT = (
    (
        re.compile(r"(^|\.)(\w*patch_embed\w*|\w*patchifier|\w*embeddings?|\w*position\w*)(\.|$)"),
        "first layer of the tower: small, and everything passes it",
    ),
    (
        re.compile(
            r"(^|\.)(vision_model|vision_tower|visual|img_processor)(\.\w+)*\.(head|pooler)(\.|$)"
        ),
        "pooling head: the language model does not use it",
    ),
)


def kept_part(name: str) -> str | None:
    """Return why a layer that looks at images stays in high precision, or None."""
    if _OTHER.search(name):
        return "listens, speaks or draws: only what looks at images is quantized with it"
    return next((reason for pattern, reason in _KEPT if pattern.search(name)), None)


def further_blocks(model: nn.Module, entry: Any, lists: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the modules outside of the text decoder that are tuned as blocks.

    The layers of towers one by one; what holds linear layers and no such layers (projectors,
    mergers) as one block.

    Args:
        model: the model, with weights or without.
        entry: the part of it whose forward is called.
        lists: paths of the lists of decoder blocks.
    """
    text = {path.rpartition(".")[0] for path in lists} - {""}
    heads = {id(m) for m in (entry.get_output_embeddings(), entry.get_input_embeddings())}

    def is_sight(name: str, module: nn.Module) -> bool:
        if id(module) in heads or kept_part(name) is not None:
            return False
        if any(name.startswith(f"{path}.") for path in lists):
            return False
        inside = any(name.startswith(f"{path}.") for path in text)
        return not inside or any(pattern.search(name) for pattern in (NON_TEXT, _IMAGE))

    found = [name for name, m in model.named_modules() if is_linear(m) and is_sight(name, m)]
    return tuple(_units(model, "", found))


def _units(module: nn.Module, name: str, layers: Sequence[str]) -> Iterator[str]:
    """Yield the blocks in a module that hold some of the named layers."""
    inside = [x for x in layers if not name or x == name or x.startswith(f"{name}.")]
    if not inside:
        return
    linears = (f"{name}.{n}".rstrip(".") for n, m in module.named_modules() if is_linear(m))
    holds_text = any(x not in layers and kept_part(x) is None for x in linears)
    if name and not holds_text and _runs(module) and not _is_stack(module):
        yield name
        return
    for child, part in module.named_children():
        yield from _units(part, f"{name}.{child}".removeprefix("."), inside)


def _runs(module: nn.Module) -> bool:
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _is_stack(module: nn.Module) -> bool:
    """Tell whether a module holds a list of layers of its own."""
    lists = (m for m in module.modules() if isinstance(m, nn.ModuleList))
    return any(
        len(m) and all(any(is_linear(x) for x in layer.modules()) for layer in m) for m in lists
    )
