"""Read the `quantization_config` of checkpoints with `quant_method` mxfp4: experts of gpt-oss.

The files hold all experts of a layer in one tensor, as `stacked` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ar_kernels.hf.config import LayerFormat
from ar_schemes import Scheme, describe, scheme

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ar_kernels.hf.stored import StoredLayer

METHOD = "mxfp4"
LAYOUT = "ct_mxfp4"
"""Each expert's slice is bit for bit what this layout holds: the lower half of a byte first."""


@dataclass(frozen=True)
class Mxfp4Plan:
    """A config of MXFP4 experts, understood: what is packed has one scheme, the files say what."""

    scheme: Scheme
    method: str = METHOD

    def resolve(
        self,
        layers: Mapping[str, tuple[str, ...]],  # noqa: ARG002 - the files decide
        heads: Collection[str],  # noqa: ARG002
    ) -> dict[str, LayerFormat]:
        """Return nothing: without files nobody can tell which layers are experts."""
        return {}

    def settle(
        self,
        said: LayerFormat | None,  # noqa: ARG002 - the files decide
        layer: StoredLayer,  # noqa: ARG002
    ) -> tuple[str | None, LayerFormat | None]:
        """Return the one format: a layer with scales in the files has it."""
        return None, LayerFormat(self.scheme, LAYOUT)


def parse_mxfp4(config: Mapping[str, Any]) -> Mxfp4Plan:  # noqa: ARG001 - it names skips only
    """Return a `quantization_config` with `quant_method` mxfp4, understood."""
    weights = replace(scheme("MXFP4"), activation=None)
    return Mxfp4Plan(replace(weights, name=describe(weights)))
