"""Format `fake`: dequantized weights in an ordinary float checkpoint, for evaluation anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch
    from torch import Tensor

    from ar_export.formats.base import LayerEntry, Request
    from ar_kernels import QuantizedWeight
    from ar_kernels.layouts.base import TensorFact
    from ar_schemes import Scheme


class FakeFormat:
    """The weights a quantized model computes with, as floats; no size is saved."""

    name = "fake"
    spellings = ("fake",)
    summary = "dequantized floats (weights only), for anything that opens the float model"
    embeddings = "dequantized like every other weight"

    def refuses(
        self,
        spelling: str,  # noqa: ARG002
        scheme: Scheme,  # noqa: ARG002
        rows: int,  # noqa: ARG002
        columns: int,  # noqa: ARG002
    ) -> str | None:
        """Return why a layer cannot be carried, or None: every weight dequantizes."""
        return None

    def config(self, request: Request) -> dict[str, Any] | None:  # noqa: ARG002
        """Return None: readers need not know."""
        return None

    def tensors(
        self,
        config: Mapping[str, Any] | None,  # noqa: ARG002
        weight: QuantizedWeight,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """Return the dequantized weight."""
        return {"weight": weight.dequantize(dtype)}

    def reads(self, config: Mapping[str, Any] | None) -> bool:
        """Tell whether a checkpoint is of this format: any without a config."""
        return config is None

    def layers(
        self,
        config: Mapping[str, Any],  # noqa: ARG002
        tensors: Mapping[str, TensorFact],  # noqa: ARG002
    ) -> dict[str, LayerEntry]:
        """Return nothing: all layers are floats."""
        return {}

    def suffixes(self, entry: LayerEntry) -> Collection[str]:  # noqa: ARG002
        """Return the only suffix."""
        return ("weight",)
