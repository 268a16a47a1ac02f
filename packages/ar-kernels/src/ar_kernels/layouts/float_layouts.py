"""Layouts of float elements: FP8, MXFP4, MXFP8, NVFP4 and their kin.

Tensor names are those of compressed-tensors, or of the checkpoint kind that the layout is named
after. Every one is a row of the table at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ar_kernels.layouts.base import TensorFact
from ar_kernels.layouts.checks import require, require_holds
from ar_kernels.layouts.nibbles import pack_nibbles, unpack_nibbles
from ar_kernels.layouts.ordering import require_natural_order
from ar_kernels.weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_schemes import TensorSpec

_STEP = {"input_scale": TensorFact((1,), torch.float32)}
_GLOBAL = {"input_global_scale": TensorFact((1,), torch.float32)}
_WHOLE = "weight_global_scale"
_SIGN = 8
"""Sign bit of a 4-bit code in sign and magnitude."""


@dataclass(frozen=True)
class FloatLayout:
    """A layout of float elements.

    Attributes:
        name: identifier.
        data_type: the one it holds.
        bits: width of an element: 4 are packed two to a byte, 8 are stored as E4M3.
        spans: granularities it holds.
        scale: suffix of the scale.
        flat: the scale has one dimension.
        whole: there is a tensor scale beside the block scales.
        optional: tensors of static activations, present or not.
        magnitude: 4-bit integers are stored as sign and magnitude.
    """

    name: str
    data_type: str
    bits: int
    spans: tuple[str, ...] = ("group",)
    scale: str = "weight_scale"
    flat: bool = False
    whole: bool = False
    optional: Mapping[str, TensorFact] = field(default_factory=dict)
    magnitude: bool = False

    def refuses(self, spec: TensorSpec, rows: int, columns: int) -> str | None:
        """Return why a weight cannot be packed so, or None."""
        if (spec.data_type, spec.bits) != (self.data_type, self.bits):
            return f"{self.name} holds {self.data_type}{self.bits}, not {spec.data_type}{spec.bits}"
        if spec.granularity.span not in self.spans:
            return f"{self.name} holds one scale per {' or '.join(self.spans)}, not per " + str(
                spec.granularity
            )
        step_r, step_c = spec.granularity.region(rows, columns)
        if rows % step_r or columns % step_c or (self.bits == _PACKED and columns % 2):
            return f"{spec.granularity} does not divide a weight of shape [{rows}, {columns}]"
        return None

    def facts(self, spec: TensorSpec, rows: int, columns: int) -> dict[str, TensorFact]:
        """Return the packed tensors' shapes and types without data."""
        shape = spec.granularity.scale_shape(rows, columns)
        kept: tuple[int, ...] = shape
        if self.flat or spec.granularity.span == "tensor":
            kept = (shape[0] * shape[1],)
        out = {}
        if self.bits == _PACKED:
            out["weight_packed"] = TensorFact((rows, columns // 2), torch.uint8)
        else:
            out["weight"] = TensorFact((rows, columns), torch.float8_e4m3fn)
        out[self.scale] = TensorFact(kept, _scale_type(spec))
        if self.whole:
            out[_WHOLE] = TensorFact((1,), torch.float32)
        return out

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the packed tensors, and those of static activations where the weight has them.

        Raises:
            KernelError: the weight does not fit.
        """
        rows, columns = weight.shape[-2:]
        require_holds(self, weight.spec, rows, columns)
        require_natural_order(self.name, weight)
        fact = self.facts(weight.spec, rows, columns)[self.scale]
        scale = weight.scale.contiguous()
        if scale.dtype != fact.dtype:
            scale = scale.view(fact.dtype)
        out: dict[str, Tensor] = {}
        if self.bits == _PACKED:
            codes = _to_magnitude(weight.codes) if self.magnitude else weight.codes
            out["weight_packed"] = pack_nibbles(codes)
        else:
            out["weight"] = weight.codes.contiguous().view(torch.float8_e4m3fn)
        out[self.scale] = scale.reshape(fact.shape)
        if self.whole:
            out[_WHOLE] = weight.extra["global_scale"].reshape(1).float()
        return out | {k: weight.extra[k].reshape(1) for k in self.optional if k in weight.extra}

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, rows: int, columns: int
    ) -> QuantizedWeight:
        """Return the weight.

        Raises:
            KernelError: tensors are missing or do not fit.
        """
        require(self, tensors, spec, rows, columns)
        if self.bits == _PACKED:
            codes = unpack_nibbles(tensors["weight_packed"])
            codes = _from_magnitude(codes) if self.magnitude else codes
        else:
            codes = tensors["weight"].contiguous().view(torch.uint8)
        scale = tensors[self.scale].contiguous()
        stored = _STORED.get(spec.scale_dtype)
        if stored is not None and stored[0] != scale.dtype:
            scale = scale.view(stored[0])
        extra = {k: tensors[k].reshape(1) for k in self.optional if k in tensors}
        if self.whole:
            extra["global_scale"] = tensors[_WHOLE].reshape(1, 1)
        shape = spec.granularity.scale_shape(rows, columns)
        return QuantizedWeight(spec, codes, scale.reshape(shape), extra=extra)


_PACKED = 4
_STORED = {
    "e8m0": (torch.float8_e8m0fnu, torch.uint8),
    "ue5m3": (torch.uint8, torch.uint8),
    "float8_e4m3fn": (torch.float8_e4m3fn, torch.float8_e4m3fn),
}
"""Scale type to (type in a `QuantizedWeight`, type in a file); others are the same in both."""


def _scale_type(spec: TensorSpec) -> torch.dtype:
    found = _STORED.get(spec.scale_dtype)
    if found is not None:
        return found[1]
    plain: torch.dtype = getattr(torch, spec.scale_dtype)
    return plain


def _to_magnitude(codes: Tensor) -> Tensor:
    """Return codes k + 8 as sign and magnitude of k."""
    value = codes.short() - _SIGN
    return (value.abs() | (value < 0).short() * _SIGN).to(torch.uint8)


def _from_magnitude(codes: Tensor) -> Tensor:
    value = (codes & (_SIGN - 1)).short()
    return (torch.where(codes >= _SIGN, -value, value) + _SIGN).to(torch.uint8)


FLOAT_LAYOUTS = (
    FloatLayout("ct_float", "fp", 8, ("channel", "tensor", "tile"), optional=_STEP),
    FloatLayout("ct_nvfp4", "nv_fp", 4, whole=True, optional=_GLOBAL),
    FloatLayout("ct_mxfp4", "mx_fp", 4),
    FloatLayout("ct_mxfp8", "mx_fp", 8),
    FloatLayout("fp8_block", "fp", 8, ("tile",), scale="weight_scale_inv"),
    FloatLayout("fp8_tensor", "fp", 8, ("tensor", "channel"), optional=_STEP),
    FloatLayout("fp8_static", "fp", 8, ("channel",), flat=True, optional=_STEP),
    FloatLayout("mx_int", "mx_int", 4, magnitude=True),
    FloatLayout("nvfp4_e5m3", "nvfp4_v2", 4),
)
