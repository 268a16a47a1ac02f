"""Understand a `quantization_config`, whatever method wrote it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ar_kernels.hf import config as plain
from ar_kernels.hf.compressed import CompressedPlan, parse_compressed
from ar_kernels.hf.fp8 import METHOD as FP8
from ar_kernels.hf.fp8 import parse_fp8
from ar_kernels.hf.mxfp4 import METHOD as MXFP4
from ar_kernels.hf.mxfp4 import parse_mxfp4
from ar_kernels.weight import KernelError
from ar_schemes import unknown_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ar_kernels.hf.config import LayerFormat
    from ar_kernels.hf.stored import StoredLayer

COMPRESSED = "compressed-tensors"
METHODS = (*plain.METHODS, COMPRESSED, FP8, MXFP4)
"""Values of `quant_method` that can be opened."""


class Understood(Protocol):
    """A `quantization_config`, understood."""

    @property
    def method(self) -> str:
        """The `quant_method`."""

    def resolve(
        self, layers: Mapping[str, tuple[str, ...]], heads: Collection[str]
    ) -> dict[str, LayerFormat]:
        """Return what the config says of each layer; layers it does not speak of are left out.

        `layers` holds all the names a layer goes by; `heads` are the output heads among them.
        """

    def settle(
        self, said: LayerFormat | None, layer: StoredLayer
    ) -> tuple[str | None, LayerFormat | None]:
        """Return (contradiction or None, the format) of a layer whose tensors are packed."""


def understand(config: Mapping[str, Any]) -> Understood:
    """Return a `quantization_config`, understood.

    Raises:
        KernelError: a method, packing or scheme that is not known here.
        SchemeError: a number that no scheme can have.
    """
    method = str(getattr(config.get("quant_method"), "value", config.get("quant_method")))
    if method in plain.METHODS:
        return plain.parse(config)
    if method == COMPRESSED:
        return CompressedPlan(parse_compressed(config))
    if method == FP8:
        return parse_fp8(config)
    if method == MXFP4:
        return parse_mxfp4(config)
    raise KernelError(unknown_name("quant_method", method, METHODS))
