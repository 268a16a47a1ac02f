"""Rules on the config of compressed-tensors."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ar_export.formats.base import Readable

_CONFIG = "quantization_config"
_ARGS = {
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic"),
    *("actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
}
"""Fields of `QuantizationArgs` in all of 0.17 to 0.20; it forbids others."""
_SIZED = ("group", "tensor_group")


def compressed(found: Readable, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (what, where) that is wrong with the config of a checkpoint."""
    if config.get("quantization_status") != "compressed":
        what = "quantization_status is not compressed; Transformers would build float layers"
        yield what, _CONFIG
    groups: dict[str, Any] = config.get("config_groups") or {}
    forms = {group.get("format") or config.get("format") for group in groups.values()}
    if len(forms) > 1 and config.get("format") != "mixed-precision":
        yield "groups have several formats, so format must be mixed-precision", _CONFIG
    if (config.get("sparsity_config") or {}).get("targets"):
        yield "sparsity_config is no longer supported by vLLM", _CONFIG
    classes = Counter(t for g in groups.values() for t in g.get("targets") or () if _is_class(t))
    for name, count in classes.items():
        if count > 1:
            yield f"{count} groups target {name}; only one of them can have it", "config_groups"
    yield from _head(found, groups)
    for name, group in groups.items():
        for part in ("weights", "input_activations"):
            args = group.get(part)
            if isinstance(args, dict):
                form = str(group.get("format") or config.get("format"))
                yield from ((what, f"{name} {part}") for what in _arguments(args, part, form))
    yield from _zeros(found)


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target and target[:1].isupper()


def _head(found: Readable, groups: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    targets = {t for group in groups.values() for t in group.get("targets") or ()}
    for name in found.quantized:
        if name.rpartition(".")[2] == "lm_head" and name not in targets:
            yield "is quantized and needs a target of its own; vLLM's head is no Linear", name


def _arguments(args: Mapping[str, Any], part: str, form: str) -> Iterator[str]:
    unknown = sorted(args.keys() - _ARGS)
    if unknown:
        yield f"{', '.join(unknown)} unknown to compressed-tensors, which forbids it"
    strategy, size = args.get("strategy"), args.get("group_size")
    if strategy in _SIZED and not (isinstance(size, int) and size > 0):
        yield f"strategy {strategy} needs a group_size above 0, not {size!r}"
    if strategy not in (*_SIZED, None) and isinstance(size, int) and size > 0:
        yield f"group_size {size} contradicts strategy {strategy}"
    if strategy == "block" and not args.get("block_structure"):
        yield "strategy block needs a block_structure"
    if strategy == "token" and not args.get("dynamic"):
        yield "strategy token needs dynamic activations"
    if args.get("dynamic") == "local" and strategy != "tensor_group":
        yield "dynamic local needs strategy tensor_group"
    if args.get("actorder") in ("group", "dynamic", True):
        yield f"actorder {args['actorder']!r} is refused by vLLM"
    if part == "weights" and form == "mxfp8-quantized" and not _is_uint8(args):
        yield "MXFP8 without scale_dtype torch.uint8 is not recognised by vLLM"


def _is_uint8(args: Mapping[str, Any]) -> bool:
    return str(args.get("scale_dtype")).removeprefix("torch.") == "uint8"


def _zeros(found: Readable) -> Iterator[tuple[str, str]]:
    for name, entry in found.quantized.items():
        spec = entry.scheme.weight
        if spec is not None and spec.symmetric and f"{name}.weight_zero_point" in found.facts:
            yield "is symmetric and has zero points, for which vLLM has no parameter", name
