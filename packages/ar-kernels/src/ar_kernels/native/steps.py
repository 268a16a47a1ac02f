"""What a decoding step needs beside quantized layers: `torch.ops.ar_kernels.step_*`.

Products of a few rows with a float weight, RMS norms, and the attention of one new token. They
compute in float32 whatever the type of their inputs. Without gradients: modules call them only
where none is asked for. Importing this module registers them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ar_kernels.native import library as lib
from ar_kernels.native.product import product_of
from ar_kernels.weight import KernelError

FLOAT_ROWS = 4
"""Most rows of x for a product with a float weight."""
WIDTH = 16
"""Norms and heads must be as wide as a multiple of this."""
MOST_WIDTH = 512
"""The widest head."""
ROUNDS_FIRST, ADDS_ONE, PLAIN = range(3)
"""Forms of a norm: rounded to the type of x and then times the weight; times one plus the weight;
times the weight."""

_LIBRARY = torch.library.Library("ar_kernels", "FRAGMENT")
_LIBRARY.define("step_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.define("step_norm(Tensor x, Tensor weight, float epsilon, int form) -> Tensor")
_LIBRARY.define("step_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., I], at most `FLOAT_ROWS` rows, times a weight [O, I] transposed: [..., O].

    Args:
        x: float32, float16 or bfloat16 on the CPU.
        weight: contiguous, of the type of x.
        bias: one value per feature, or None.

    Raises:
        KernelError: too many rows, or tensors that do not fit each other.
    """
    features, columns = weight.shape
    _check(x, weight)
    if x.shape[-1] != columns or not weight.is_contiguous():
        msg = f"x {list(x.shape)} does not fit a contiguous weight {list(weight.shape)}"
        raise KernelError(msg)
    out = x.new_empty((*x.shape[:-1], features))
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    floats = lib.Floats(weight.data_ptr(), weight.nbytes, features, columns)
    given = product_of(x, out, bias)
    lib.check(lib.library().ar_multiply_floats(lib.runtime(lib.best_isa()), floats, given))
    return out


def norm(x: Tensor, weight: Tensor, epsilon: float, form: int) -> Tensor:
    """Return x [..., I] over the root of its mean square plus `epsilon`, times a weight [I].

    Args:
        x: float32, float16 or bfloat16 on the CPU; I is a multiple of `WIDTH`.
        weight: of the type of x.
        epsilon: added to the mean square.
        form: `ROUNDS_FIRST`, `ADDS_ONE` or `PLAIN`.

    Raises:
        KernelError: another width, or a weight that does not fit.
    """
    columns = x.shape[-1]
    _check(x, weight)
    if weight.shape != (columns,) or columns % WIDTH:
        msg = f"x {list(x.shape)} with a weight {list(weight.shape)} is no norm of {WIDTH}n values"
        raise KernelError(msg)
    out = torch.empty(x.shape, dtype=x.dtype)
    flat = x.reshape(-1, columns)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    rows, stride = flat.shape[0], flat.stride(0)
    reach = ((rows - 1) * stride + columns) * x.itemsize if rows else 0
    given = lib.NormInput(
        *(flat.data_ptr(), reach, rows, columns, stride, lib.DTYPES[x.dtype], form),
        *(weight.contiguous().data_ptr(), epsilon, out.data_ptr()),
    )
    lib.check(lib.library().ar_norm(lib.runtime(lib.best_isa()), given))
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return softmax attention of one token: [B, 1, H, W].

    Args:
        q: [B, H, 1, W], float32, float16 or bfloat16 on the CPU; W is a multiple of `WIDTH`.
        k: [B, N, T, W], where N divides H; head h looks at h // (H / N).
        v: as `k`.
        mask: bool, broadcast to [B, H, 1, T]; False: not seen.
        scale: of the products of q and k.

    Raises:
        KernelError: tensors of other types or shapes.
    """
    batch, heads, _, width = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    _check(q, k, v)
    fits = k.shape == (batch, kv_heads, length, width) == v.shape and q.shape[2] == 1
    if not fits or heads % kv_heads or width % WIDTH or width > MOST_WIDTH:
        shapes = " ".join(str(list(t.shape)) for t in (q, k, v))
        msg = f"attention of one token with heads of {WIDTH}n up to {MOST_WIDTH} wide, not {shapes}"
        raise KernelError(msg)
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    seen, gaps = None, [0, 0]
    if mask is not None:
        mask = mask.expand(batch, heads, 1, length)
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        seen, gaps = mask.data_ptr(), list(mask.stride()[:2])
    out = torch.empty(batch, 1, heads, width, dtype=q.dtype)
    given = lib.Attention(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), lib.DTYPES[q.dtype]),
        *(batch, heads, kv_heads, length, width),
        *(*q.stride()[:2], *k.stride()[:3], *v.stride()[:3]),
        *(seen, *gaps, scale, out.data_ptr()),
    )
    lib.check(lib.library().ar_attend(lib.runtime(lib.best_isa()), given))
    return out


def _check(*tensors: Tensor) -> None:
    first = tensors[0]
    if first.dtype not in lib.DTYPES or any(
        t.dtype != first.dtype or t.device.type != "cpu" for t in tensors
    ):
        kinds = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        msg = f"the native CPU kernels need tensors of one float type on the CPU, not {kinds}"
        raise KernelError(msg)


def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _norm_shape(x: Tensor, weight: Tensor, epsilon: float, form: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape)


def _attention_shape(
    q: Tensor,
    k: Tensor,  # noqa: ARG001 - the op's signature
    v: Tensor,  # noqa: ARG001
    mask: Tensor | None,  # noqa: ARG001
    scale: float,  # noqa: ARG001
) -> Tensor:
    return q.new_empty((q.shape[0], 1, q.shape[1], q.shape[3]))


for _name, _kernel, _fake in (
    ("step_linear", linear, _linear_shape),
    ("step_norm", norm, _norm_shape),
    ("step_attention", attention, _attention_shape),
):
    _LIBRARY.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"ar_kernels::{_name}", _fake, lib=_LIBRARY)
