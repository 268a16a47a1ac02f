"""Quantized numbers made real: data types, bit layouts, the quantized linear, backends, loading.

`import ar_kernels` lets transformers load quantized checkpoints with these kernels; transformers
itself is not imported. `AR_KERNELS_TAKEOVER=never` leaves it alone.
"""

from ar_kernels.hf.arm import arm, torch_is_starting

if not torch_is_starting():  # inside `import torch` we only arm: see _autoload
    from ar_kernels.hookspecs import hookimpl
    from ar_kernels.linear import QuantLinear
    from ar_kernels.registry import (
        backend,
        backends,
        data_type,
        data_types,
        host,
        layout,
        layouts,
    )
    from ar_kernels.weight import KernelError, QuantizedWeight, equal

__version__ = "0.1.0"

__all__ = [
    "KernelError",
    "QuantLinear",
    "QuantizedWeight",
    "backend",
    "backends",
    "data_type",
    "data_types",
    "equal",
    "hookimpl",
    "host",
    "layout",
    "layouts",
]

arm()
