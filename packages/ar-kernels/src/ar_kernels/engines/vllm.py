"""vLLM's plugin, entry point `ar_kernels` in the group `vllm.general_plugins`."""

from __future__ import annotations

from ar_kernels.engines.adapter import METHOD_CLASS, Engine, make_config, make_method
from ar_kernels.engines.claims import METHOD


def register() -> None:
    """Make vLLM serve checkpoints it has no kernels for. Called in each of its processes."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, quantization
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    if METHOD in quantization.QUANTIZATION_METHODS:
        return
    engine = Engine(
        config=QuantizationConfig,
        method=linear.LinearMethodBase,
        linear=linear.LinearBase,
        unquantized=linear.UnquantizedLinearMethod,
        parameters=parameter,
    )
    if METHOD_CLASS not in linear.WEIGHT_LOADER_V2_SUPPORTED:
        linear.WEIGHT_LOADER_V2_SUPPORTED.append(METHOD_CLASS)
    quantization.register_quantization_config(METHOD)(make_config(engine, make_method(engine)))
