"""Entry point of the group `torch.backends`: torch calls it at the end of `import torch`.

With it a quantized checkpoint opens in transformers without importing ar_kernels. An exception
here would break `import torch`, so nothing may leave `autoload`, and only the standard library is
imported.
"""

from __future__ import annotations

import logging
import sys

from ar_kernels.hf.arm import arm

_LIGHT = ("ar_kernels", "ar_kernels._autoload", "ar_kernels.hf", "ar_kernels.hf.arm")


def autoload() -> None:
    """Arm transformers where its own route cannot work. Never raises."""
    try:
        arm(explicit=False)
        _forget()
    except Exception:  # noqa: BLE001  torch would fail to import
        logging.getLogger(__name__).warning(
            "ar-kernels could not register with transformers; import ar_kernels to see why",
            exc_info=True,
        )


def _forget() -> None:
    """Drop the package from `sys.modules`, so that a later `import ar_kernels` counts as explicit.

    Kept when someone else has imported it, or is importing it right now.
    """
    mine = [name for name in sys.modules if name.split(".")[0] == "ar_kernels"]
    spec = getattr(sys.modules.get("ar_kernels"), "__spec__", None)
    if set(mine) <= set(_LIGHT) and not getattr(spec, "_initializing", False):
        for name in mine:
            del sys.modules[name]
