"""Rules on the keys of a `quantization_config`, by method.

Each is a check that a reader makes (vLLM 0.33.0, SGLang 0.5.23, GPTQModel 7.7.0, Transformers
5.23.0, compressed-tensors 0.17 to 0.20), or a place where two of them disagree.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ar_export.findings import Finding
from ar_export.lint.compressed import compressed
from ar_export.lint.layers import FUSED, float_linears

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from ar_export.formats.base import Readable

_CONFIG = "quantization_config"
_FULL = ("bits", "group_size", "sym", "data_type")
_REGEX = re.compile(r"[*+?^$()\[\]{}|\\]")
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")
_FLOAT_BITS = 16
_MX8 = {"act_bits": 8, "act_data_type": "mx_fp", "act_group_size": 32, "act_sym": True}


def keys(found: Readable) -> Iterator[Finding]:
    """Yield what is wrong with the config of a checkpoint."""
    config = found.quantization_config
    assert config is not None
    rules = _RULES[str(config["quant_method"])]
    yield from (Finding("warning", what, where) for what, where in rules(found, config))


def _absent(config: Mapping[str, Any], needed: Collection[str]) -> Iterator[tuple[str, str]]:
    missing = [key for key in needed if key not in config]
    if missing:
        yield f"{', '.join(missing)} missing; readers have no default for it", _CONFIG


def _other(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield keys with a value that vLLM asserts to be another."""
    for key, value in wanted.items():
        if config.get(key, value) != value:
            yield f"{key} is {config[key]!r}; vLLM asserts {value!r}", _CONFIG


def _auto_round(found: Readable, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _absent(config, ("bits", "group_size", "sym", "packing_format"))
    yield from _auto_round_activations(config)
    extra = config.get("extra_config") or {}
    for key in extra:
        if _REGEX.search(key) and not (key.startswith((".*", "^"))):
            what = "is a pattern without .* before it; SGLang matches the whole name"
            yield what, f"extra_config {key!r}"
    blocks = _listed(config.get("block_name_to_quantize"))
    for name in found.quantized:
        outside = blocks and not any(name.startswith(f"{b}.") for b in blocks)
        lacking = [k for k in _FULL if k not in extra.get(name, {})]
        if outside and lacking:
            what = f"lies outside the blocks; extra_config must give its {', '.join(lacking)}"
            yield what, name
    for name in float_linears(found):
        if name not in extra and any(name.startswith(b) for b in blocks if b):
            inside = any(name == b or name.startswith(f"{b}.") for b in blocks)
            if not inside:
                yield "begins like a block's name; vLLM takes it for one of its layers", name
    yield from _containers(extra)


def _auto_round_activations(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield activation keys that vLLM rejects: of MXFP8, FP8 in tiles, and 16-bit activations."""
    kind, bits = config.get("data_type", "int"), config.get("bits")
    act = [key for key in config if key.startswith("act_")]
    if int(config.get("act_bits") or _FLOAT_BITS) >= _FLOAT_BITS and act:
        yield f"{', '.join(act)} with activations in 16 bit; readers take them for W4A4", _CONFIG
    if kind == "mx_fp" and bits == 8:  # noqa: PLR2004
        yield from _absent(config, ("act_bits", "act_data_type", "act_group_size"))
        yield from _other(config, {**_MX8, "act_dynamic": True})
    size = config.get("group_size")
    if kind == "fp" and isinstance(size, list):
        yield from _absent(config, ("act_group_size", "activation_scheme", "fmt"))
        wanted = {"act_bits": 8, "act_group_size": size[0], "act_data_type": "fp"}
        wanted |= {"activation_scheme": "dynamic", "fmt": "e4m3", "act_dynamic": True}
        yield from _other(config, wanted)


def _containers(extra: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield lists of experts without a key of their own: vLLM asks for the fused layer's name."""
    lists: dict[str, list[Any]] = {}
    for key, value in extra.items():
        hit = _EXPERT.match(key)
        if hit:
            lists.setdefault(hit[1], []).append(value)
    for name, values in lists.items():
        if name not in extra and all(value == values[0] for value in values):
            yield "experts have keys, their list has none; vLLM looks for the list", name


def _gptq(found: Readable, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _absent(config, ("bits", "group_size", "sym", "desc_act"))
    if config.get("desc_act") and config.get("group_size") != -1:
        yield "desc_act is true; vLLM takes it only with one group per channel", _CONFIG
    version = config.get("checkpoint_format", config.get("format", "gptq"))
    if not config.get("sym", True) and version != "gptq_v2":
        yield "asymmetric weights as version 1; GPTQModel reads them as gptq_v2 only", _CONFIG
    if "meta" in config:
        yield "meta makes Transformers refuse to read it with auto-round", _CONFIG
    if config.get("dataset") not in (None, "wikitext2", "c4", "c4-new"):
        yield f"dataset {config['dataset']!r} is none that Transformers allows", _CONFIG
    if config.get("modules_in_block_to_quantize"):
        yield "modules_in_block_to_quantize makes Transformers ask for optimum", _CONFIG
    yield from _head(found, config)
    dynamic = config.get("dynamic") or {}
    for key in dynamic:
        body = key[2:] if key[:2] in ("+:", "-:") else key
        if not body.startswith((".*", "^")) and body not in found.quantized:
            yield "is matched from the start of the name; begin it with .*", f"dynamic {key!r}"
    yield from _fused_patterns(found, dynamic)


def _fused_patterns(found: Readable, dynamic: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield layers that a rule means while it misses the fused layer, whose name vLLM asks."""
    for tails, fused in FUSED:
        for name in found.quantized:
            parent, _, tail = name.rpartition(".")
            if tail == tails[0] and _rule(name, dynamic) != _rule(f"{parent}.{fused}", dynamic):
                yield f"is meant by a rule that does not mean {fused}, which vLLM asks for", name
    for name in (*found.quantized, *float_linears(found)):
        hit = _EXPERT.match(name)
        if hit and _kind(_rule(name, dynamic)) != _kind(_rule(hit[1], dynamic)):
            yield "is meant by a rule that does not mean the list, which vLLM asks for", name


def _kind(rule: str | None) -> str:
    return "" if rule is None else rule[:2]


def _rule(name: str, dynamic: Mapping[str, Any]) -> str | None:
    bodies = {key: key[2:] if key[:2] in ("+:", "-:") else key for key in dynamic}
    return next((key for key, body in bodies.items() if re.match(body, name)), None)


def _head(found: Readable, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    there = any(name.rpartition(".")[2] == "lm_head" for name in found.quantized)
    if config.get("lm_head") and not there:  # the other way round it cannot even be opened
        yield "lm_head is true, but the head is not quantized", _CONFIG


def _awq(found: Readable, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _absent(config, ("bits", "group_size", "zero_point", "version"))
    yield from _head(found, config)
    skips = _listed(config.get("modules_to_not_convert"))
    for skip in skips:
        meant = next((name for name in found.quantized if skip in name), None)
        if meant is not None:
            what = f"is part of the name {meant}; vLLM and SGLang would skip that layer too"
            yield what, f"modules_to_not_convert {skip!r}"
    lists = dict.fromkeys(hit[1] for n in float_linears(found) if (hit := _EXPERT.match(n)))
    for name in lists:
        if not any(skip in name for skip in skips):
            yield "experts are listed, their list is not; vLLM looks for the list", name


def _fp8(found: Readable, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:  # noqa: ARG001
    yield from _absent(config, ("activation_scheme", "weight_block_size"))
    if config.get("activation_scheme", "dynamic") != "dynamic":
        yield "weight_block_size needs activation_scheme dynamic", _CONFIG


def _listed(value: object) -> list[str]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [str(part) for part in value] if isinstance(value, (list, tuple)) else []


_RULES: dict[str, Callable[[Readable, Mapping[str, Any]], Iterator[tuple[str, str]]]] = {
    "auto-round": _auto_round,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": compressed,
    "fp8": _fp8,
}
