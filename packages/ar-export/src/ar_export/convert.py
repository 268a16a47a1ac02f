"""Another format for the same codes, without tuning again: exact, or refused with the reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from ar_export.errors import ExportError
from ar_export.reader import open_checkpoint
from ar_export.registry import format as find_format
from ar_export.sink import ar_open_sink
from ar_kernels import QuantizedWeight
from ar_kernels.layouts.ragged import evened
from ar_schemes import LayerInfo, LayerPlan, PlanRow, Scheme, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from ar_export.formats.base import Format, LayerEntry, Readable
    from ar_schemes import TensorSpec

_HEADS = ("lm_head", "embed_out")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose blocks hold weights as [I, O]."""
_KEYS = ("quantization_config", "quantization")
_SHIFTED = "int_asym_float_zp"
_SCALES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class _Request:
    """What a sink is asked for; see `ar_tuner.sink.SinkRequest`."""

    format: str
    output: Path
    source: Path | None
    config: Mapping[str, Any]
    plan: LayerPlan
    blocks: tuple[str, ...]
    facts: Mapping[str, Any]
    max_shard_bytes: int
    side: Callable[[Path], None] | None
    overwrite: bool


def convert(
    source: Path,
    output: Path,
    format: str,  # noqa: A002 - the user's word
    *,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint in another format with the very same codes and scales; return its path.

    Raises:
        ExportError: layers that the format cannot hold exactly, all in one message, before
            anything is written.
    """
    found = open_checkpoint(source)
    if not found.quantized:
        msg = f"{source} holds no quantized layer: quantize it instead (`ar quantize`)"
        raise ExportError(msg)
    to = find_format(format)
    weights = {name: _exact(found, name, to, format) for name in found.quantized}
    bad = {name: made for name, made in weights.items() if isinstance(made, str)}
    if bad:
        lines = "\n".join(f"  {name}: {why}" for name, why in bad.items())
        msg = f"{len(bad)} layers cannot go to {format} exactly:\n{lines}"
        raise ExportError(msg)
    config = {k: v for k, v in found.config.items() if k not in _KEYS}
    plan = plan_of(found, {n: spec for n, spec in weights.items() if not isinstance(spec, str)})
    request = _Request(
        format=format,
        output=output,
        source=found.path,
        config=config,
        plan=plan,
        blocks=_block_lists(plan),
        facts={"converted_from": found.format},
        max_shard_bytes=max_shard_bytes,
        side=None,
        overwrite=overwrite,
    )
    sink = ar_open_sink(request)
    assert sink is not None
    try:
        for name in found.quantized:
            spec = plan[name].scheme.weight
            assert spec is not None
            sink.put(name, _as_spec(found.weight(name), spec))
        for key in found.names:
            layer, _, suffix = key.rpartition(".")
            if layer not in found.quantized or suffix == "bias":
                sink.put_tensor(key, found.tensor(key))
        return sink.commit()
    except BaseException:
        sink.abort()
        raise


def plan_of(found: Readable, schemes: Mapping[str, Scheme]) -> LayerPlan:
    """Return the plan that a checkpoint is the result of."""
    turned = found.config.get("model_type") in _CONV1D
    rows = []
    for key, fact in found.facts.items():
        layer, _, suffix = key.rpartition(".")
        if layer in found.quantized or suffix != "weight" or len(fact.shape) != 2:  # noqa: PLR2004
            continue
        rows.append(PlanRow(_layer(layer, fact.shape), Scheme(name="BF16"), "not quantized"))
    for name, entry in found.quantized.items():
        shape = (entry.rows, entry.columns)
        info = _layer(name, shape)
        info = replace(info, transposed=turned and info.block is not None)
        rows.append(PlanRow(info, schemes[name], "as in the source"))
    names = [row.scheme for row in rows if row.quantized]
    default = max(names, key=lambda one: sum(s.weight == one.weight for s in names))
    return LayerPlan(rows=tuple(rows), default=default)


def _layer(name: str, shape: tuple[int, ...]) -> LayerInfo:
    tail = name.rpartition(".")[2]
    if tail in _EMBEDDINGS:
        return LayerInfo(name, shape[0], shape[1], None, role="embedding")
    if tail in _HEADS:
        return LayerInfo(name, shape[0], shape[1], None, role="lm_head")
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    block = None if index is None else ".".join(parts[: index + 1])
    role: Literal["experts", "linear"] = "experts" if ".experts." in name else "linear"
    return LayerInfo(name, shape[0], shape[1], block, role=role)


def _block_lists(plan: LayerPlan) -> tuple[str, ...]:
    blocks = (r.layer.block for r in plan.quantized if r.layer.block is not None)
    return tuple(dict.fromkeys(b.rpartition(".")[0] for b in blocks))


def _exact(found: Readable, name: str, to: Format, spelling: str) -> Scheme | str:
    """Return the scheme a layer has in the new format, or why it cannot go there."""
    entry = found.quantized[name]
    wanted = _named(entry)
    why = to.refuses(spelling, wanted, entry.rows, entry.columns)
    if why is None:
        return wanted
    for spec in _respelled(entry.scheme):
        candidate = replace(wanted, weight=spec)
        if to.refuses(spelling, candidate, entry.rows, entry.columns) is None:
            lost = _lost(found.weight(name), spec)
            if lost is None:
                return replace(candidate, name=describe(candidate))
            return f"{lost}, which {to.name} would have to store"
    return why


def _named(entry: LayerEntry) -> Scheme:
    return replace(entry.scheme, name=entry.scheme.name or describe(entry.scheme), fixed=False)


def _respelled(given: Scheme) -> Iterator[TensorSpec]:
    """Yield specs that can stand for the same weight: another scale type, a float minimum."""
    spec = given.weight
    assert spec is not None
    if spec.data_type not in ("int", _SHIFTED):
        return
    kinds = [spec]
    if spec.data_type == "int" and not spec.symmetric:
        kinds.append(spec.with_(data_type=_SHIFTED))
    for kind in kinds:
        for dtype in (spec.scale_dtype, *_SCALES):
            yield kind.with_(scale_dtype=dtype)


def _lost(weight: QuantizedWeight, spec: TensorSpec) -> str | None:
    """Return what a spec cannot say of a weight, or None when it says all."""
    made = _as_spec(weight, spec)
    if not torch.equal(made.scale.float(), weight.scale.float()):
        return f"scales are no {spec.scale_dtype} numbers"
    if spec.data_type != _SHIFTED:
        return None
    minimum = _minimum(weight)
    if torch.equal(made.extra["minimum"].float(), minimum):
        return None
    return f"scale * zero point is no {spec.scale_dtype} number"


def _minimum(weight: QuantizedWeight) -> torch.Tensor:
    """Return the weight that code 0 stands for, float32."""
    if weight.zero_point is None:
        return weight.extra["minimum"].float()
    return -(weight.scale.float() * weight.zero_point.float())


def _as_spec(weight: QuantizedWeight, spec: TensorSpec) -> QuantizedWeight:
    """Return a weight with its scale, and its minimum where the spec has one, in stored types."""
    spec = evened(spec, *weight.shape[-2:])
    if weight.spec == spec:
        return weight
    dtype = getattr(torch, spec.scale_dtype)
    scale = weight.scale.to(dtype)
    if spec.data_type != _SHIFTED:
        return replace(weight, spec=spec, scale=scale)
    extra = {"minimum": _minimum(weight).to(dtype)}
    return QuantizedWeight(spec, weight.codes, scale, extra=extra)
