"""Find the decoder blocks of a model and the weights in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ar_schemes import LayerInfo
from ar_tuner.errors import TunerError
from ar_tuner.experts import Experts, find_experts, holds_experts, own_wiring
from ar_tuner.parts import WeightRef

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ar_tuner.adapters import ModelAdapter
    from ar_tuner.wiring import Wiring

NON_TEXT = re.compile(
    r"(^|\.)(vision|visual|image|vit|audio|speech|vqmodel|vision_\w+|\w*_tower|\w*projector|"
    r"connector|talker|code2wav|token2wav|code_predictor|perceiver\w*|qformer|resampler|sam_\w*|"
    r"embed_vision|embed_audio)(\.|$)",
    re.IGNORECASE,
)
COMPARABLE = 0.25
"""A further list of layers counts as blocks from this share of the largest list's weights."""
COVERAGE = 0.6
"""Least share of the decoder's weights that must lie in the blocks found."""


@dataclass(frozen=True)
class Block:
    """One decoder block: the unit of tuning."""

    name: str
    module: nn.Module
    experts: Experts = Experts()


@dataclass(frozen=True)
class Discovery:
    """The blocks of a model in registration order, and the lists that hold them."""

    lists: tuple[str, ...]
    blocks: tuple[Block, ...]


def find_blocks(
    model: nn.Module,
    adapter: ModelAdapter,
    *,
    paths: tuple[str, ...] | None = None,
    wiring: Wiring | None = None,
) -> Discovery:
    """Return the decoder blocks by the generic rule, or those at the paths given.

    In the text decoder, the outermost module lists whose children all hold weights; lists of
    blocks that support gradient checkpointing and of the configured length are preferred.

    Args:
        model: the model, with weights or without.
        adapter: what is known of it beyond the generic rule.
        paths: lists of blocks, by name.
        wiring: how the model is made of a checkpoint, which names its experts; None: of the one
            it would be saved in.

    Raises:
        TunerError: nothing that looks like blocks, or a path that is no list of modules.
    """
    chosen = paths or adapter.block_lists(model) or _discover(model, adapter)
    blocks = []
    for path in chosen:
        try:
            holder = model.get_submodule(path)
        except AttributeError as error:
            raise TunerError(_no_list(model, path)) from error
        if not isinstance(holder, nn.ModuleList):
            raise TunerError(_no_list(model, path))
        blocks += [Block(f"{path}.{i}", m) for i, m in enumerate(holder) if m is not None]
    return Discovery(lists=tuple(chosen), blocks=tuple(_with_experts(model, blocks, wiring)))


def _with_experts(model: nn.Module, blocks: list[Block], wiring: Wiring | None) -> list[Block]:
    if not any(holds_experts(block.module) for block in blocks):
        return blocks
    known = own_wiring(model) if wiring is None else wiring
    return [Block(b.name, b.module, find_experts(b.module, b.name, known)) for b in blocks]


def layers_of(model: nn.Module, discovery: Discovery, adapter: ModelAdapter) -> Iterator[LayerInfo]:
    """Yield what a plan needs of every linear layer, every embedding and every fused expert."""
    owner = {b.name: b for b in discovery.blocks}
    entry = adapter.entry(model)
    head = _output_head(entry)
    embedding = _input_embedding(entry)
    for name, module in model.named_modules():
        block = next((b for b in owner if name.startswith(f"{b}.")), None)
        if isinstance(module, nn.Embedding) and module is embedding:
            rows, columns = module.weight.shape
            yield LayerInfo(name, rows, columns, None, role="embedding")
        elif is_linear(module):
            rows, columns = linear_shape(module)
            weight = weight_of(module)
            if module is head:
                tied = embedding is not None and weight is embedding.weight
                tied = tied or (weight.is_meta and _says_tied(model))
                yield LayerInfo(name, rows, columns, None, role="lm_head", tied=tied)
                continue
            router = adapter.is_router(name, module)
            keep = adapter.keep(name, module) if block is not None else None
            role = "router" if router else "experts" if ".experts." in name else "linear"
            turned = not isinstance(module, nn.Linear)
            yield LayerInfo(name, rows, columns, block, role=role, keep=keep, transposed=turned)  # type: ignore[arg-type]
        elif block is not None:
            inside = name.removeprefix(f"{block}.")
            yield from owner[block].experts.of(inside, owner[block].module, block)


def weights_of(block: Block, layers: list[str]) -> list[WeightRef]:
    """Return the weights of a block that belong to the named layers."""
    out = []
    wanted = set(layers)
    for name, module in block.module.named_modules():
        full = f"{block.name}.{name}"
        if full in wanted and is_linear(module):
            transposed = not isinstance(module, nn.Linear)
            out.append(WeightRef(full, f"{name}.weight", transposed))
    return out + [ref for ref in block.experts.parts if ref.layer in wanted]


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module multiplies by a 2-D weight: nn.Linear or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer or an embedding, as stored."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (O, I) of a linear layer."""
    first, second = weight_of(module).shape
    return (first, second) if isinstance(module, nn.Linear) else (second, first)


def _discover(model: nn.Module, adapter: ModelAdapter) -> tuple[str, ...]:
    entry = adapter.entry(model)
    decoder = _decoder(entry)
    base = next((n for n, m in model.named_modules() if m is decoder), "")
    found = []
    for path, holder in _outermost_lists(decoder):
        children = [c for c in holder if c is not None]
        if not children or NON_TEXT.search(path) or not all(_has_weights(c) for c in children):
            continue
        found.append((f"{base}.{path}".strip("."), holder, _numel(holder)))
    if not found:
        msg = (
            f"no list of decoder blocks found in {type(model).__name__}. Name it with blocks=... "
            "(a path such as 'model.layers')."
        )
        raise TunerError(msg)
    marked = [f for f in found if all(_is_checkpointing(c) for c in f[1])] or found
    length = getattr(_text_config(model), "num_hidden_layers", None)
    top = max([f for f in marked if len(f[1]) == length] or marked, key=lambda f: f[2])
    chosen = [f for f in marked if f is top or f[2] >= COMPARABLE * top[2]]
    inside = sum(f[2] for f in chosen)
    outside = sum(f[2] for f in found if f not in chosen)
    if inside < COVERAGE * (inside + outside):
        listing = ", ".join(f"{f[0]} ({f[2]} weights)" for f in found)
        msg = (
            f"cannot tell which lists hold the decoder blocks: {listing}. "
            "Name them with to_quant_block_names."
        )
        raise TunerError(msg)
    return tuple(f[0] for f in chosen)


def _decoder(entry: nn.Module) -> nn.Module:
    getter = getattr(entry, "get_decoder", None)
    decoder = getter() if callable(getter) else None
    if isinstance(decoder, nn.Module) and any(
        isinstance(m, nn.ModuleList) and len(m) for m in decoder.modules()
    ):
        return decoder
    for attribute in ("base_model", "model"):
        inner = getattr(entry, attribute, None)
        if isinstance(inner, nn.Module):
            return inner
    return entry


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList):
            yield path, child
        else:
            yield from _outermost_lists(child, path)


def _has_weights(module: nn.Module) -> bool:
    return any(is_linear(m) for m in module.modules()) or any(
        p.ndim == 3 for p in module.parameters()
    )


def _is_checkpointing(module: nn.Module) -> bool:
    return any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _text_config(model: nn.Module) -> object:
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    return getter(decoder=True) if callable(getter) else config


def _says_tied(model: nn.Module) -> bool:
    return bool(getattr(_text_config(model), "tie_word_embeddings", False)) or bool(
        getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    )


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def _input_embedding(model: nn.Module) -> nn.Embedding | None:
    getter = getattr(model, "get_input_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Embedding) else None


def _no_list(model: nn.Module, path: str) -> str:
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return f"blocks {path!r} is no list of modules. Lists in this model: {', '.join(lists)}."
