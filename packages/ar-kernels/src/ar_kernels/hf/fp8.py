"""Read the `quantization_config` of FP8 checkpoints, `quant_method` fp8 (DeepSeek, Qwen)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ar_kernels.hf.config import LayerFormat
from ar_kernels.weight import KernelError
from ar_schemes import Scheme, scheme_from_dict

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ar_kernels.hf.stored import StoredLayer

METHOD = "fp8"
_BLOCK, _TENSOR = "fp8_block", "fp8_tensor"
_NUMBERS = 2


@dataclass(frozen=True)
class Fp8Plan:
    """A config of FP8 weights, understood: one scheme, and names of modules kept in 16 bit."""

    scheme: Scheme
    layout: str
    skipped: tuple[str, ...]
    method: str = METHOD

    def resolve(
        self,
        layers: Mapping[str, tuple[str, ...]],
        heads: Collection[str],
    ) -> dict[str, LayerFormat]:
        """Return the scheme for every layer that is not skipped and no output head."""
        return {
            layer: LayerFormat(self.scheme, self.layout)
            for layer, names in layers.items()
            if layer not in heads and not any(self._skips(name) for name in names)
        }

    def settle(
        self,
        said: LayerFormat | None,  # noqa: ARG002 - the files decide
        layer: StoredLayer,  # noqa: ARG002
    ) -> tuple[str | None, LayerFormat | None]:
        """Return the one format: a layer with scales in the files has it."""
        return None, LayerFormat(self.scheme, self.layout)

    def _skips(self, name: str) -> bool:
        return any(name == end or f".{name}.".find(f".{end}.") >= 0 for end in self.skipped)


def parse_fp8(config: Mapping[str, Any]) -> Fp8Plan:
    """Return a `quantization_config` with `quant_method` fp8, understood.

    Raises:
        KernelError: an element or an activation scheme that is not known here, or a
            `weight_block_size` that is no pair.
    """
    element = str(config.get("fmt") or "e4m3")
    how = str(config.get("activation_scheme") or "dynamic")
    if element != "e4m3" or how not in ("dynamic", "static"):
        msg = (
            f"fp8: fmt {element!r} with activation_scheme {how!r} is not known here; "
            "e4m3 with dynamic or static is"
        )
        raise KernelError(msg)
    tile = config.get("weight_block_size")
    if tile is not None and not (isinstance(tile, (list, tuple)) and len(tile) == _NUMBERS):
        msg = f"fp8: weight_block_size must be two numbers, not {tile!r}"
        raise KernelError(msg)
    flat: dict[str, Any] = {"bits": 8, "data_type": "fp", "act_bits": 8, "act_data_type": "fp"}
    if tile is not None:
        flat |= {"group_size": list(tile), "act_group_size": tile[1], "act_dynamic": True}
    else:
        flat |= {"group_size": 0, "act_group_size": 0, "act_dynamic": how == "dynamic"}
    names = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
    return Fp8Plan(
        scheme_from_dict(flat),
        _TENSOR if tile is None else _BLOCK,
        tuple(str(name) for name in names),
    )
