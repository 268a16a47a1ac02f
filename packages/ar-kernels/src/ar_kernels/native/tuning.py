"""What tuning asks for beside products: activations fake-quantized, latents moved, divergence.

Each does in one pass over memory what torch does in many. They serve float32 and bfloat16 on the
CPU; where `serves` says no, callers compute the same by torch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ar_kernels.native import library as lib
from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from ar_kernels.numerics.elements import FloatElement

BELOW, ABOVE, OF_TENSOR = range(3)
"""How the scale of a group follows from its largest magnitude: the power of two at most
largest / 2**top; the least power of two that nothing exceeds; E4M3 beside a scale of the tensor."""
LANES = 16
"""Latents move in groups of a multiple of so many values."""
_TYPES = (torch.float32, torch.bfloat16)
_DIGITS = 23
"""Of float32."""
_LIBRARY = torch.library.Library("ar_kernels", "FRAGMENT")
_LIBRARY.define(
    "tune_fake_quant(Tensor x, int size, int rule, int top, float whole, float[] element, "
    "bool masks) -> (Tensor, Tensor)"
)
_LIBRARY.define("tune_mask(Tensor x, Tensor inside) -> Tensor")


class _Element(ctypes.Structure):
    """`ar_element` of api_tuning.h."""

    _fields_ = tuple((name, ctypes.c_float) for name in ("maximum", "least", "large"))


class _Groups(ctypes.Structure):
    """`ar_groups` of api_tuning.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("groups", "size", "dtype", "rule", "top")),
        ("whole", ctypes.c_float),
        ("element", _Element),
        ("y", ctypes.c_void_p),
        ("inside", ctypes.c_void_p),
    )


class _Latent(ctypes.Structure):
    """`ar_latent` of api_tuning.h."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("groups", "size")),
        *((name, ctypes.c_void_p) for name in ("scale", "growth", "zero")),
        ("element", _Element),
        ("dtype", ctypes.c_int64),
        ("matrix", ctypes.c_void_p),
    )


class _Adam(ctypes.Structure):
    """`ar_adam` of api_tuning.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("slope", "first", "second", "unit")),
        *((n, ctypes.c_float) for n in ("size", "keep_first", "keep_second", "correction", "tiny")),
        ("sums", ctypes.c_void_p),
    )


class _Logits(ctypes.Structure):
    """`ar_logits` of api_tuning.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("mine", "theirs")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "dtype")),
        *((name, ctypes.c_void_p) for name in ("grad", "parts")),
    )


@dataclass(frozen=True)
class Latent:
    """What a weight stands for; tensors are float32 and contiguous.

    Attributes:
        value: [O, I], in groups along I.
        scale: [O, G].
        growth: [O, G]; what is rounded is `value * (1 + growth)`; None: nothing is added.
        zero: [O, G]: `value` are codes, and this their zero points; None: float elements.
        element: its constants, see `constants`; of codes the largest.
    """

    value: Tensor
    scale: Tensor
    growth: Tensor | None
    zero: Tensor | None
    element: tuple[float, float, float]


@dataclass(frozen=True)
class Adam:
    """A step of Adam on the value of a latent.

    Attributes:
        first, second: moments, float32 [O, I], changed in place.
        unit: float32 [O, I], what the step size is times; None: 1.
        size: step size, divided by the correction of the first moment.
        keep: decay of both moments.
        correction: 1 / (1 - decay of the second ** steps).
        tiny: added to the root.
    """

    first: Tensor
    second: Tensor
    unit: Tensor | None
    size: float
    keep: tuple[float, float]
    correction: float
    tiny: float


def constants(element: FloatElement) -> tuple[float, float, float]:
    """Return the largest magnitude, the smallest normal one and the constant that rounds."""
    return element.maximum, 2.0 ** (1 - element.bias), 1.5 * 2.0 ** (_DIGITS - element.mantissa)


def serves(*tensors: Tensor) -> bool:
    """Tell whether the library is there and takes tensors of these types and devices."""
    fit = all(t.device.type == "cpu" and t.dtype in _TYPES for t in tensors)
    return fit and lib.missing() is None


def fake_quant(  # noqa: PLR0913 - an op's signature is flat
    x: Tensor,
    size: int,
    rule: int,
    top: int,
    whole: float,
    element: list[float],
    masks: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    """Return x quantized and dequantized, and where it was not clamped.

    Args:
        x: float32 or bfloat16; contiguous groups of `size` along the last axis.
        size: of a group, divides the last axis.
        rule: `BELOW`, `ABOVE` or `OF_TENSOR`.
        top: exponent of the largest element.
        whole: scale of the tensor, where the rule has one.
        element: see `constants`.
        masks: the mask is wanted: bool, of the shape of x; else it is empty.

    Raises:
        KernelError: another type or device, or groups that do not divide the last axis.
    """
    if x.dtype not in _TYPES or x.device.type != "cpu" or x.shape[-1] % size:
        msg = f"groups of {size} need float32 or bfloat16 on the CPU, not {x.dtype} {list(x.shape)}"
        raise KernelError(msg)
    x = x.contiguous()
    out = torch.empty_like(x)
    inside = torch.empty(x.shape if masks else (0,), dtype=torch.bool)
    given = _Groups(
        *(x.data_ptr(), x.numel() // size, size, lib.DTYPES[x.dtype], rule, top, whole),
        *(_Element(*element), out.data_ptr(), inside.data_ptr() if masks else None),
    )
    lib.check(lib.library().ar_fake_quant(lib.runtime(lib.best_isa()), ctypes.byref(given)))
    return out, inside


def mask(x: Tensor, inside: Tensor) -> Tensor:
    """Return x times a mask, bool of its shape; float32 or bfloat16 on the CPU.

    Raises:
        KernelError: another type, device or shape.
    """
    if x.dtype not in _TYPES or x.device.type != "cpu" or x.shape != inside.shape:
        msg = f"a mask {list(inside.shape)} does not fit {x.dtype} {list(x.shape)} on {x.device}"
        raise KernelError(msg)
    x, inside = x.contiguous(), inside.contiguous()
    out = torch.empty_like(x)
    kind, runtime = lib.DTYPES[x.dtype], lib.runtime(lib.best_isa())
    pointers = x.data_ptr(), inside.data_ptr()
    lib.check(lib.library().ar_mask(runtime, *pointers, kind, x.numel(), out.data_ptr()))
    return out


def make(latent: Latent, dtype: torch.dtype) -> Tensor:
    """Return the weight that a latent stands for, float32 or bfloat16 [O, I]."""
    out = torch.empty(latent.value.shape, dtype=dtype)
    given = _latent(latent, out)
    lib.check(lib.library().ar_make(lib.runtime(lib.best_isa()), ctypes.byref(given)))
    return out


def move(
    latent: Latent, grad: Tensor, adam: Adam | None, slope: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Move the value of a latent and return what the gradient of its scale is made of.

    The gradient passes straight through the rounding, and is zero where a code was clamped.

    Args:
        latent: groups are a multiple of `LANES`.
        grad: of the weight, float32 or bfloat16 [O, I].
        adam: None: the value stays.
        slope: float32 [O, G]: what the gradient of codes is times; None for float elements.

    Returns:
        Float32 [O, G], sums over groups: gradient times element (codes: less the zero point);
        passed gradient times value / scale; passed gradient times value. Of codes the first alone.
    """
    grad = grad.contiguous()
    sums = torch.empty(3, *latent.scale.shape)
    moments = [None] * 3 if adam is None else [adam.first, adam.second, adam.unit]
    numbers = (0.0,) * 5
    if adam is not None:
        numbers = (adam.size, *adam.keep, adam.correction, adam.tiny)
    given = _latent(latent, grad)
    step = _Adam(_pointer(slope), *map(_pointer, moments), *numbers, sums.data_ptr())
    runtime = lib.runtime(lib.best_isa())
    lib.check(lib.library().ar_move(runtime, ctypes.byref(given), ctypes.byref(step)))
    elements, steps, values = sums.unbind()
    return elements, steps, values


def diverge(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(theirs || mine) summed over rows, float32 [], and its gradient by mine.

    Args:
        mine: logits, float32 or bfloat16 [N, V].
        theirs: logits of the same shape and type.

    Raises:
        KernelError: other types, devices or shapes.
    """
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype or not serves(mine, theirs):
        msg = f"logits {mine.dtype} {list(mine.shape)} and {theirs.dtype} {list(theirs.shape)}"
        raise KernelError(msg + " have no divergence here: same shape and type, on the CPU")
    mine, theirs = mine.contiguous(), theirs.contiguous()
    grad, parts = torch.empty_like(mine), torch.empty(mine.shape[0], 3)
    given = _Logits(
        *(mine.data_ptr(), theirs.data_ptr(), *mine.shape, lib.DTYPES[mine.dtype]),
        *(grad.data_ptr(), parts.data_ptr()),
    )
    lib.check(lib.library().ar_diverge(lib.runtime(lib.best_isa()), ctypes.byref(given)))
    mean, sum_mine, sum_theirs = parts.unbind(1)
    return (mean + sum_mine.log() - sum_theirs.log()).sum(), grad


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    assert tensor.dtype is torch.float32
    return tensor.data_ptr()


def _latent(latent: Latent, matrix: Tensor) -> _Latent:
    rows, columns = latent.value.shape
    groups = latent.scale.numel()
    fits = matrix.shape == latent.value.shape and latent.scale.shape[0] == rows
    if not fits or columns % latent.scale.shape[1] or matrix.dtype not in _TYPES:
        shapes = list(matrix.shape), list(latent.value.shape), list(latent.scale.shape)
        msg = "matrix {}, value {} and scale {} do not fit".format(*shapes)
        msg += f", or {matrix.dtype} is neither float32 nor bfloat16"
        raise KernelError(msg)
    return _Latent(
        *(_pointer(latent.value), groups, rows * columns // groups),
        *map(_pointer, (latent.scale, latent.growth, latent.zero)),
        *(_Element(*latent.element), lib.DTYPES[matrix.dtype], matrix.data_ptr()),
    )


def _fake_quant_shape(  # noqa: PLR0913
    x: Tensor,
    size: int,  # noqa: ARG001 - the op's signature
    rule: int,  # noqa: ARG001
    top: int,  # noqa: ARG001
    whole: float,  # noqa: ARG001
    element: list[float],  # noqa: ARG001
    masks: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    shape = x.shape if masks else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.bool)


def _mask_shape(x: Tensor, inside: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape)


for _name, _kernel, _fake in (
    ("tune_fake_quant", fake_quant, _fake_quant_shape),
    ("tune_mask", mask, _mask_shape),
):
    _LIBRARY.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"ar_kernels::{_name}", _fake, lib=_LIBRARY)
