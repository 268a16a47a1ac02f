"""Loading for inference through transformers: `AutoModelForCausalLM.from_pretrained` just works.

`arm` registers the quantizer; `config` reads what a checkpoint says; nothing here imports
transformers before the user does.
"""

from __future__ import annotations

from typing import Any

from ar_kernels.hf.arm import arm


def ask_for(backend: str, method: str = "auto-round") -> Any:
    """Return a `quantization_config` for `from_pretrained` that asks for a backend.

    Args:
        backend: its name, as `ar backends` lists it.
        method: the `quant_method` of the checkpoint; it stays as it is, but must be named.

    Raises:
        KernelError: no such method is known here.
    """
    from ar_kernels.hf.quantizer import CONFIGS
    from ar_kernels.weight import KernelError
    from ar_schemes import unknown_name

    if method not in CONFIGS:
        raise KernelError(unknown_name("quant_method", method, CONFIGS))
    return CONFIGS[method].asking(method, backend)


__all__ = ["arm", "ask_for"]
