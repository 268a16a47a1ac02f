"""Format `gguf`: one file for llama.cpp and its kin, tokenizer included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_export.errors import ExportError
from ar_export.gguf.mix import mixed
from ar_kernels import layout
from ar_kernels.layouts.gguf import gguf_type

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from ar_export.formats.base import LayerEntry, Request
    from ar_export.gguf.reader import GgufCheckpoint
    from ar_export.gguf.sink import GgufSink
    from ar_export.sink import SinkRequest
    from ar_kernels import QuantizedWeight
    from ar_kernels.layouts.base import TensorFact
    from ar_schemes import LayerPlan, Scheme

_VARIANTS = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q2_k_s", "q2_k_mixed"),
    *("q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
)
_PRESETS = {"q2_k": "GGUF:Q2_K_S"}


class GgufFormat:
    """Format `gguf`."""

    name = "gguf"
    spellings = ("gguf", *(f"gguf:{variant}" for variant in _VARIANTS))
    summary = "Q2_K to Q8_0 with llama.cpp's type mixes; llama.cpp, Ollama, Transformers"
    embeddings = "token_embd and output have types of their own"

    def scheme_for(self, spelling: str) -> str | None:
        """Return the preset that a spelling implies."""
        variant = spelling.partition(":")[2]
        return _PRESETS.get(variant, f"GGUF:{variant.upper()}") if variant else "GGUF:Q4_K_M"

    def adjust(self, spelling: str, plan: LayerPlan, config: Mapping[str, Any]) -> LayerPlan:  # noqa: ARG002
        """Return the plan with the type mix of the variant."""
        variant = variant_name(spelling)
        same = plan.default.weight is not None and (
            plan.default.name == self.scheme_for(spelling)
            or plan.default.name.removeprefix("GGUF:") == variant
        )
        return mixed(plan, variant) if same else plan

    def refuses(self, spelling: str, scheme: Scheme, rows: int, columns: int) -> str | None:  # noqa: ARG002
        """Return why a layer [rows, columns] cannot be carried, or None."""
        if scheme.weight is None:
            return None
        if scheme.activation is not None:
            return "gguf has weights only; llama.cpp quantizes activations as it likes"
        kind = gguf_type(scheme.weight)
        if kind is None:
            return f"gguf has no type for {scheme.weight}"
        return layout(f"gguf_{kind.lower()}").refuses(scheme.weight, rows, columns)

    def config(self, request: Request) -> dict[str, Any] | None:
        """Return None: a GGUF file describes itself.

        Raises:
            ExportError: llama.cpp has no loader for the architecture.
        """
        from ar_export.gguf.sink import check_request

        check_request(dict(request.config), request.plan, request.source)
        return None

    def tensors(
        self,
        config: Mapping[str, Any] | None,  # noqa: ARG002
        weight: QuantizedWeight,
        dtype: torch.dtype,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the blocks of a layer."""
        kind = gguf_type(weight.spec)
        if kind is None:
            msg = f"gguf has no type for {weight.spec}"
            raise ExportError(msg)
        return layout(f"gguf_{kind.lower()}").pack(weight)

    def reads(self, config: Mapping[str, Any] | None) -> bool:  # noqa: ARG002
        """Tell whether a safetensors checkpoint is of this format: none is."""
        return False

    def layers(
        self,
        config: Mapping[str, Any],  # noqa: ARG002
        tensors: Mapping[str, TensorFact],  # noqa: ARG002
    ) -> dict[str, LayerEntry]:
        """Return nothing: GGUF files are opened by `open`."""
        return {}

    def suffixes(self, entry: LayerEntry) -> Collection[str]:  # noqa: ARG002
        """Return the only suffix."""
        return ("blocks",)

    def float_bytes(
        self, config: Mapping[str, Any], floats: Mapping[str, tuple[tuple[int, ...], str]]
    ) -> int:
        """Return the bytes of float tensors, of the tokenizer (an estimate) and of the header."""
        from ar_export.gguf.sink import float_bytes

        return float_bytes(config, floats)

    def open_sink(self, request: SinkRequest) -> GgufSink:
        """Return the sink that writes a file."""
        from ar_export.gguf.sink import GgufSink

        self.config(request)
        return GgufSink(request, variant_name(request.format))

    def holds(self, path: Path) -> bool:
        """Tell whether a path is a GGUF file or a directory of one."""
        from ar_export.gguf.reader import is_gguf

        return is_gguf(path)

    def open(self, path: Path) -> GgufCheckpoint:
        """Return the checkpoint in a GGUF file."""
        from ar_export.gguf.reader import open_gguf

        return open_gguf(path)


def variant_name(spelling: str) -> str:
    """Return the variant of llama.cpp that a spelling means."""
    variant = spelling.partition(":")[2].upper() or "Q4_K_M"
    return "Q2_K_S" if variant == "Q2_K_MIXED" else variant
