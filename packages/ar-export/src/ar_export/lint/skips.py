"""Which float layers a config says are quantized: asked the way each method's readers ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_kernels.hf.compressed import parse_compressed
from ar_kernels.hf.config import METHODS as INTEGER
from ar_kernels.hf.config import parse

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ar_export.formats.base import Readable

METHODS = {
    "auto-round": "extra_config",
    "gptq": "dynamic",
    "awq": "modules_to_not_convert",
    "compressed-tensors": "ignore",
    "fp8": "modules_to_not_convert",
}
"""Where a method lists the layers that stay as they are."""


def says_quantized(found: Readable, names: Collection[str]) -> dict[str, str]:
    """Return those of the names that the config takes for quantized, with the key to list them."""
    config = found.quantization_config
    assert config is not None
    method = str(config.get("quant_method"))
    if method in INTEGER:
        chosen = parse(config, reading=True).resolve({name: (name,) for name in names})
        taken = [n for n in names if n in chosen and chosen[n].scheme.weight is not None]
    elif method == "compressed-tensors":
        parsed = parse_compressed(config)
        taken = [n for n in names if parsed.find(n) is not None]
    else:
        taken = [n for n in names if n not in _listed(config)]
    return dict.fromkeys(taken, METHODS[method])


def _listed(config: Mapping[str, Any]) -> set[str]:
    """Return the names under either key: vLLM reads the first that is not empty."""
    return set(config.get("ignored_layers") or config.get("modules_to_not_convert") or ())
