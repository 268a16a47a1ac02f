"""Loading for inference through transformers: `AutoModelForCausalLM.from_pretrained` just works.

`arm` registers the quantizer; `config` reads what a checkpoint says; nothing here imports
transformers before the user does.
"""

from __future__ import annotations

from typing import Any

from ar_kernels.hf.arm import arm


def ask_for(
    backend: str = "auto", method: str = "auto-round", *, head_bits: int | None = None
) -> Any:
    """Return a `quantization_config` for `from_pretrained` that asks for a backend, or a head.

    Args:
        backend: its name, as `ar backends` lists it; `auto` leaves the choice to us.
        method: the `quant_method` of the checkpoint; it stays as it is, but must be named.
        head_bits: on the CPU, compute with an output head of 4, 5, 6 or 8 bits, rounded as the
            model is opened, where the checkpoint's is in 16 bits. Changes the numbers; the
            checkpoint's head is still what is saved. 16: as the checkpoint holds it. None: as
            AR_KERNELS_HEAD_BITS says, else without loss (12 bits a value where it is bf16).

    Raises:
        KernelError: no such method is known here.
    """
    from ar_kernels.hf.quantizer import CONFIGS
    from ar_kernels.weight import KernelError
    from ar_schemes import unknown_name

    if method not in CONFIGS:
        raise KernelError(unknown_name("quant_method", method, CONFIGS))
    return CONFIGS[method].asking(method, backend, head_bits)


__all__ = ["arm", "ask_for"]
