"""What vLLM's config classes make of checkpoints: no GPU and no compiled part is needed.

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 python tests/interop/vllm_configs.py OUT DIR...

Runs in an environment where the Python files of vLLM can be imported. OUT names the quantized
layers by directory: {directory: {layer: {"bits": ..., "group_size": ..., "sym": ...}}}. Each layer
is asked for as vLLM does: q, k, v and gate, up under their fused names. Prints JSON: `accepts`, or
what it raises or reads otherwise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What its model classes declare in `packed_modules_mapping`."""


def config_of(plain: dict[str, Any]) -> Any:
    """Return vLLM's config object."""
    from vllm.model_executor.layers.quantization import (
        auto_awq,
        auto_gptq,
        fp8,
        inc,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors

    known = {
        "auto-round": inc.INCConfig,
        "gptq": auto_gptq.AutoGPTQConfig,
        "awq": auto_awq.AutoAWQConfig,
        "fp8": fp8.Fp8Config,
        "compressed-tensors": compressed_tensors.CompressedTensorsConfig,
    }
    config = known[plain["quant_method"]].from_config(json.loads(json.dumps(plain)))
    config.packed_modules_mapping = FUSED
    return config


def layer_of(name: str) -> Any:
    """Return an empty layer of the class that vLLM has for a name."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    class QKVParallelLinear(LinearBase):
        """Compressed-tensors asks whether `Linear` is part of the class's name."""

    kind = ParallelLMHead if name.endswith("lm_head") else QKVParallelLinear
    return kind.__new__(kind)


def asked(config: Any, method: str, name: str) -> dict[str, Any] | None:
    """Return what the config says of a layer, None for a float one."""
    layer = layer_of(name)
    if method == "auto-round":
        from vllm.model_executor.layers.quantization.inc.schemes.factory import resolve_scheme

        found = config.config_parser.resolve(layer, name)
        if not found.quantized:
            return None
        if found.data_type == "int" and "gptq" in found.packing_format and not found.sym:
            msg = "its gptq kernels have no zero points"
            raise ValueError(msg)
        resolve_scheme(found)
        return {"bits": found.bits, "group_size": found.group_size, "sym": found.sym}
    if method == "gptq":
        from vllm.model_executor.layers.quantization.utils import gptq_utils

        if name.endswith("lm_head") and not config.lm_head_quantized:
            return None
        if gptq_utils.get_dynamic_override(config, layer_name=name) is False:
            return None
        gptq_utils.override_config(config := _copy(config), prefix=name)
        return {"bits": config.weight_bits, "group_size": config.group_size, "sym": config.is_sym}
    if method in ("awq", "fp8"):
        return _listed(config, method, name)
    found = config.get_scheme_dict(layer, name)
    if found is None:
        return None
    _without_kernels(sys.modules[type(config).__module__])
    config._get_scheme_from_parts(
        found["weights"], found["input_activations"], None, found["format"], name
    )
    args = found["weights"]
    return {"bits": args.num_bits, "sym": args.symmetric}


def _without_kernels(module: Any) -> None:
    """Let scheme classes be made that would look for a kernel of the GPU at once."""

    def nothing(self: Any, *args: Any, **kwargs: Any) -> None:
        """Take any arguments."""

    for name, found in list(vars(module).items()):
        if name.startswith("CompressedTensorsW") and ("Fp" in name or "fp" in name):
            setattr(module, name, type(name, (found,), {"__init__": nothing}))


def _copy(config: Any) -> Any:
    from copy import deepcopy

    return deepcopy(config)


def _listed(config: Any, method: str, name: str) -> dict[str, Any] | None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    if name.endswith("lm_head") and not getattr(config, "lm_head_quantized", False):
        return None
    awq = method == "awq"
    names = config.modules_to_not_convert if awq else config.ignored_layers
    mode = "substring" if awq else "exact"
    if is_layer_skipped(name, names, FUSED, match_mode=mode):
        return None
    return {"bits": 4 if awq else 8, "sym": not config.zero_point if awq else True}


def outcome(directory: Path, wanted: dict[str, dict[str, Any] | None]) -> str:
    """Return `accepts`, or how vLLM reads a checkpoint otherwise."""
    plain = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = config_of(plain)
    for name, members in fused(wanted).items():
        found = asked(config, plain["quant_method"], name)
        for member in members:
            mine = wanted[member]
            if (found is None) is not (mine is None):
                return f"differs: takes {name} for {'floats' if found is None else 'quantized'}"
            if found is not None and any(_plain(v) != mine[k] for k, v in found.items()):
                return f"differs: reads {name} as {found}"
    return "accepts"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def fused(names: Any) -> dict[str, list[str]]:
    """Return the layers that vLLM builds, each with the stored ones that it is made of."""
    out: dict[str, list[str]] = {}
    for name in names:
        parent, _, tail = name.rpartition(".")
        whole = next((key for key, parts in FUSED.items() if tail in parts), tail)
        out.setdefault(f"{parent}.{whole}" if parent else whole, []).append(name)
    return out


def main() -> None:
    """Ask for every directory; what fails does not stop the rest."""
    layers = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name in sys.argv[2:]:
        directory = Path(name)
        try:
            results[directory.name] = outcome(directory, layers[directory.name])
        except Exception as error:  # noqa: BLE001 - the outcome is the point
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]
            results[directory.name] = f"rejects: {text}"
    print(json.dumps(results))


if __name__ == "__main__":
    main()
