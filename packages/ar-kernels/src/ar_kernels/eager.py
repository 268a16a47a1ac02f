"""Whether a tensor is computed with here and now: then what an op runs may be called by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_eager(x: Tensor) -> bool:
    """Tell whether x is computed with here and now: on the CPU, and by nobody who records ops."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    return x.is_cpu and not is_in_torch_dispatch_mode()
