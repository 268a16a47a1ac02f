"""Open a checkpoint, float or quantized, through Transformers and ar-kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_schemes import ArError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

DTYPES = ("auto", "bfloat16", "float16", "float32")


def open_model(path: Path, dtype: str = "auto", *, device: str = "cpu") -> nn.Module:
    """Return the model in a directory, ready to run.

    Raises:
        ArError: no checkpoint there or one that cannot be read, an unknown dtype, a device that
            this machine has not.
    """
    if dtype not in DTYPES:
        msg = f"--dtype {dtype!r} is not allowed: use one of {', '.join(DTYPES)}"
        raise ArError(msg)
    from ar_export import open_model as opened
    from ar_tuner.devices import checked_device

    where = checked_device(device)
    return opened(path, dtype).to(where)


def open_tokenizer(path: Path) -> Any:
    """Return the tokenizer in a directory.

    Raises:
        ArError: there is none.
    """
    from ar_tuner.loading import load_tokenizer

    tokenizer = load_tokenizer(path) if path.is_dir() else None
    if tokenizer is None:
        msg = f"{str(path)!r} holds no tokenizer"
        raise ArError(msg)
    return tokenizer
