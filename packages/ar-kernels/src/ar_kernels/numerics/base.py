"""What a data type must be able to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_kernels.weight import QuantizedWeight
    from ar_schemes import TensorSpec


@dataclass(frozen=True)
class Params:
    """Parameters of a quantized tensor, one value per group.

    Attributes:
        scale: float32 [..., R, G], already rounded to the precision that is stored.
        zero_point: float32, integer-valued, shape of `scale`; None when symmetric.
        extra: further levels.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class DataType(Protocol):
    """The arithmetic of one representation. Stateless; all tensors are [..., O, I]."""

    @property
    def name(self) -> str:
        """The `TensorSpec.data_type` it stands for."""

    def refuses(self, spec: TensorSpec) -> str | None:
        """Return why a spec cannot be computed, or None."""

    def parameters(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        low: Tensor | None = None,
        high: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> Params:
        """Return the parameters for a weight.

        `low` and `high` (shape of the scale) multiply the smallest and the largest value of each
        group before the scale is computed (clip factors); None means 1. Differentiable in both.
        `shared` holds what the weight has in common with others (see `shared`).
        """

    def shared(self, weights: Sequence[Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """Return the parameters that layers which engines fuse must have in common, by name.

        Most data types have none and return {}.
        """

    def rescale(self, params: Params, spec: TensorSpec, factor: Tensor) -> Params:
        """Return parameters with every scale multiplied by `factor` and rounded as stored.

        Differentiable in `factor` (shape of the scale); zero points stay.
        """

    def quantize(
        self, weight: Tensor, spec: TensorSpec, params: Params, *, offset: Tensor | None = None
    ) -> QuantizedWeight:
        """Return the codes for a weight; `offset` [..., O, I] is added before rounding."""

    def dequantize(self, weight: QuantizedWeight) -> Tensor:
        """Return the float32 weight the codes stand for."""

    def fake_quant(
        self, weight: Tensor, spec: TensorSpec, params: Params, *, offset: Tensor | None = None
    ) -> Tensor:
        """Return quantize + dequantize, float32, differentiable in `params` and `offset`.

        Equal to the bit to `dequantize(quantize(...))`. Gradients pass straight through the
        rounding and are zero where a code was clamped.
        """

    def search(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> Params:
        """Return parameters with less weighted squared error than `parameters(weight, spec)`.

        `importance` [I] or [..., I] weights the error of each input channel (mean square of the
        activations that meet it).
        """
