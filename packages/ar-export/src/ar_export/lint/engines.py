"""Which engine has a way to run a checkpoint's scheme in its format.

From the sources of vLLM 0.33.0 (`inc`, `auto_gptq`, `auto_awq`, `compressed_tensors`, `fp8`) and
SGLang 0.5.23 (`auto_round`, `gptq`, `awq`, `compressed_tensors`, `fp8`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_export.findings import Finding
from ar_kernels.hf.compressed import E5M3
from ar_schemes import Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ar_export.formats.base import LayerEntry, Readable
    from ar_schemes import TensorSpec

_GPTQ, _AWQ = "auto_round:auto_gptq", "auto_round:auto_awq"
_FLOATS, _TILES = "auto_round:llm_compressor", "auto_round:fp8"
_MARLIN = ((4, True), (8, True))
_ELSEWHERE = "write llm_compressor"


def notes(found: Readable) -> Iterator[Finding]:
    """Yield a note for each engine that cannot run some layer, with the first reason."""
    config = found.quantization_config
    assert config is not None
    for engine, rules in _ENGINES.items():
        rule = rules.get(str(config.get("quant_method")))
        if rule is None:
            continue
        for name, entry in found.quantized.items():
            why = rule(config, entry)
            if why is not None:
                yield Finding("note", f"{engine} does not run this: {why}", name)
                break


def _spec(entry: LayerEntry) -> TensorSpec:
    assert entry.scheme.weight is not None
    return entry.scheme.weight


def _vllm_auto_round(config: Mapping[str, Any], entry: LayerEntry) -> str | None:
    packing, spec = str(config.get("packing_format") or _GPTQ), _spec(entry)
    if spec.data_type == "int":
        if packing not in (_GPTQ, _AWQ):
            return f"it has no packing_format {packing}; {_ELSEWHERE}"
        if packing == _GPTQ and not spec.symmetric:
            return f"no zero points in {packing}; {_ELSEWHERE}"
        return None
    if spec.data_type == "mx_fp":
        return None if packing == _FLOATS else f"it reads mx_fp in {_FLOATS} only"
    if spec.data_type == "fp" and spec.granularity.span is Span.TILE:
        return None if packing == _TILES else f"it reads FP8 in {_TILES} only"
    return f"auto-round checkpoints of {spec} are unknown to it; {_ELSEWHERE}"


def _sglang_auto_round(config: Mapping[str, Any], entry: LayerEntry) -> str | None:
    packing, spec = str(config.get("packing_format") or _GPTQ), _spec(entry)
    if spec.data_type != "int":
        return f"it reads integers of auto-round only, not {spec.data_type}; {_ELSEWHERE}"
    if packing not in (_GPTQ, _AWQ):
        return f"it has no packing_format {packing}; {_ELSEWHERE}"
    if spec.bits not in (2, 3, 4, 8):
        return f"it has 2, 3, 4 and 8 bits, not {spec.bits}"
    return None


def _vllm_gptq(config: Mapping[str, Any], entry: LayerEntry) -> str | None:  # noqa: ARG001
    spec = _spec(entry)
    if (spec.bits, spec.symmetric) not in _MARLIN:
        return f"gptq has symmetric 4 and 8 bits there, not {spec}; {_ELSEWHERE}"
    return None


def _vllm_compressed(config: Mapping[str, Any], entry: LayerEntry) -> str | None:
    spec, act = _spec(entry), entry.scheme.activation
    if _is_e5m3(config, entry):
        return f"compressed-tensors has no format {E5M3}; write auto_round"
    if spec.data_type == "int" and act is not None and entry.layout == "ct_int":
        if not spec.symmetric:
            return "integer activations need symmetric weights"
        if (spec.bits, act.bits) not in ((8, 8), (4, 8)):
            return f"int-quantized holds 8-bit activations, not {act.bits}; use pack-quantized"
    return None


def _sglang_compressed(config: Mapping[str, Any], entry: LayerEntry) -> str | None:
    spec, act = _spec(entry), entry.scheme.activation
    if _is_e5m3(config, entry):
        return f"compressed-tensors has no format {E5M3}; write auto_round"
    if spec.data_type == "mx_fp":
        return "it has no linear layers of MXFP4 and MXFP8"
    if spec.data_type != "int":
        return None
    if act is not None:
        if (spec.bits, spec.symmetric, act.bits) != (8, True, 8):
            return f"of integer activations it has W8A8, not W{spec.bits}A{act.bits}"
        return None
    return None if spec.bits in (4, 8) else f"it has 4 and 8 bits, not {spec.bits}"


def _is_e5m3(config: Mapping[str, Any], entry: LayerEntry) -> bool:
    return config.get("format") == E5M3 or entry.layout == "nvfp4_e5m3"


_ENGINES: dict[str, dict[str, Callable[[Mapping[str, Any], LayerEntry], str | None]]] = {
    "vLLM 0.33": {
        "auto-round": _vllm_auto_round,
        "gptq": _vllm_gptq,
        "compressed-tensors": _vllm_compressed,
    },
    "SGLang 0.5": {
        "auto-round": _sglang_auto_round,
        "compressed-tensors": _sglang_compressed,
    },
}
"""By engine and method; a method that is not listed (awq, fp8) runs in all its forms."""
