"""SGLang's plugin, entry point `ar_kernels` in the group `sglang.srt.plugins`."""

from __future__ import annotations

from ar_kernels.engines.adapter import METHOD_CLASS, Engine, make_config, make_method
from ar_kernels.engines.claims import METHOD


def register() -> None:
    """Make SGLang serve checkpoints it has no kernels for. Called in each of its processes.

    SGLang has no function for it: methods are entered into its tables, as its own are.
    """
    from sglang.srt import server_args
    from sglang.srt.layers import linear, parameter, quantization
    from sglang.srt.layers.quantization import base_config, unquant

    if METHOD in quantization.QUANTIZATION_METHODS:
        return
    engine = Engine(
        config=base_config.QuantizationConfig,
        method=base_config.LinearMethodBase,
        linear=linear.LinearBase,
        unquantized=unquant.UnquantizedLinearMethod,
        parameters=parameter,
    )
    if METHOD_CLASS not in linear.WEIGHT_LOADER_V2_SUPPORTED:
        linear.WEIGHT_LOADER_V2_SUPPORTED.append(METHOD_CLASS)
    made = make_config(engine, make_method(engine))
    quantization.QUANTIZATION_METHODS[METHOD] = made
    # where the host is a CPU with AMX, only this table is asked
    getattr(quantization, "CPU_QUANTIZATION_METHODS", {})[METHOD] = made
    offer = getattr(server_args, "add_quantization_method_choices", None)
    if offer is not None:  # values of --quantization, in versions that check them
        offer([METHOD])
