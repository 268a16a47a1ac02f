"""Rules on layers: fused ones agree, what stays in 16 bit is said, shapes fit kernels.

vLLM and SGLang join q, k, v, and gate, up, and the experts of a layer, into one matrix each, which
has one scheme (`inc.config_parser`, `gptq_utils`, `should_ignore_layer` in vLLM 0.33.0).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ar_export.findings import Finding
from ar_export.formats.packed import RAGGED
from ar_export.lint.skips import says_quantized
from ar_schemes import Span

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from ar_export.formats.base import LayerEntry, Readable

FUSED = (
    (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    (("gate_proj", "up_proj"), "gate_up_proj"),
    (("w1", "w3"), "w13"),
)
"""Members of the layers that engines fuse, and the name of the fused layer."""
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")
_ALIGN = 32
_EMBEDDINGS = ("wte", "wpe", "word_embeddings", "relative_attention_bias")
_WHOLE = ("weight_global_scale", "input_global_scale")


def layers(found: Readable) -> Iterator[Finding]:
    """Yield what is wrong with layers, one finding each."""
    for members in groups(found):
        yield from _unlike(found, members)
        yield from _unlike_scales(found, members)
        yield from _cut_tiles(found, members)
    yield from _experts(found)
    yield from _unsaid(found)
    yield from _shapes(found)


def groups(found: Readable) -> Iterator[tuple[str, ...]]:
    """Yield the stored members of every layer that engines fuse, where any is quantized."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in found.quantized)
    for parent in parents:
        for tails, _ in FUSED:
            names = [f"{parent}.{tail}" if parent else tail for tail in tails]
            there = [n for n in names if n in found.quantized or f"{n}.weight" in found.facts]
            if len(there) > 1 and any(n in found.quantized for n in there):
                yield tuple(there)


def _unlike(found: Readable, members: tuple[str, ...]) -> Iterator[Finding]:
    entries = [found.quantized.get(name) for name in members]
    if len({_kind(entry) for entry in entries}) > 1:
        parent, names = members[0].rpartition(".")[0], ", ".join(_tail(n) for n in members)
        what = f"{names} differ; vLLM and SGLang fuse them and will refuse"
        yield Finding("warning", what, parent)


def _kind(entry: LayerEntry | None) -> object:
    if entry is None:
        return None
    order = entry.layout.removesuffix(RAGGED)  # tiles over the edge of one of them are no matter
    return entry.scheme.weight, entry.scheme.activation, order


def _unlike_scales(found: Readable, members: tuple[str, ...]) -> Iterator[Finding]:
    """Yield tensor scales of NVFP4 that differ within a fused layer, which has one."""
    for suffix in _WHOLE:
        keys = [f"{name}.{suffix}" for name in members if f"{name}.{suffix}" in found.facts]
        values = {tuple(found.tensor(key).flatten().tolist()) for key in keys}
        if len(values) > 1:
            names = ", ".join(_tail(n) for n in members)
            what = f"{names} have unlike {suffix}; vLLM takes one of them for all"
            yield Finding("warning", what, members[0].rpartition(".")[0])


def _cut_tiles(found: Readable, members: tuple[str, ...]) -> Iterator[Finding]:
    """Yield members whose rows end inside a tile: in a fused layer the next would begin there."""
    for name in members[:-1]:
        entry = found.quantized.get(name)
        if entry is None or entry.scheme.weight is None:
            continue
        where = entry.scheme.weight.granularity
        if where.span is Span.TILE and entry.rows % where.size[0]:
            what = (
                f"{entry.rows} rows are no multiple of the tile's {where.size[0]}; "
                "vLLM refuses to fuse the layer"
            )
            yield Finding("warning", what, name)


def _experts(found: Readable) -> Iterator[Finding]:
    """Yield lists of experts that are not quantized alike."""
    kinds: dict[str, set[object]] = {}
    for name in (*found.quantized, *float_linears(found)):
        hit = _EXPERT.match(f"{name}.")
        if hit:
            kinds.setdefault(hit[1], set()).add(_kind(found.quantized.get(name)))
    for where, different in kinds.items():
        if len(different) > 1:
            yield Finding("warning", "experts differ; vLLM and SGLang fuse them all", where)


def float_linears(found: Readable) -> tuple[str, ...]:
    """Return the linear layers that are stored as floats."""
    return tuple(
        name
        for key, fact in found.facts.items()
        if key.endswith(".weight")
        and len(fact.shape) == 2  # noqa: PLR2004 - a matrix
        and _is_float(fact.dtype)
        and (name := key.removesuffix(".weight")) not in found.quantized
        and not ("embed" in _tail(name) or _tail(name) in _EMBEDDINGS)
    )


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _unsaid(found: Readable) -> Iterator[Finding]:
    """Yield float layers that the config lets engines take for quantized ones."""
    names = list(float_linears(found))
    if found.config.get("tie_word_embeddings") and "lm_head" not in names:
        names.append("lm_head")  # a module, though it has no tensor of its own
    for name, where in says_quantized(found, names).items():
        what = f"is stored as floats, but {where} does not say so; engines expect it packed"
        yield Finding("warning", what, name)


def _shapes(found: Readable) -> Iterator[Finding]:
    """Yield integer layers that no kernel of the engines takes."""
    for name, entry in found.quantized.items():
        spec = entry.scheme.weight
        if spec is None or spec.data_type != "int" or entry.scheme.activation is not None:
            continue
        if entry.rows % _ALIGN or entry.columns % _ALIGN:
            what = f"[{entry.rows}, {entry.columns}] is no multiple of {_ALIGN}; no kernel takes it"
            yield Finding("warning", what, name)


def _tail(name: str) -> str:
    return name.rpartition(".")[2]
