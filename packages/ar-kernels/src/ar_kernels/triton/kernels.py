# mypy: ignore-errors
# ruff: noqa: RET505, SIM300 - branches of constants must be exclusive; constants are upper case
"""The device code. Triton's own language: types are those of its compiler, not of Python.

Everything is decoded to float32, the codes exactly; the group's scale multiplies partial sums
where that is cheaper than multiplying weights. Shapes: x [M, I], words [tiles * 16, O],
scale [G, O], out [M, O] (or [splits, M, O] float32, when the columns are shared out).
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["rows", "tiles", "groups", "chunk", "count"]
"""Arguments whose value must not make another variant: tokens come and go while serving."""


@triton.jit
def decoded(low, high, shift, high_shift, zero, BITS: tl.constexpr, KIND: tl.constexpr):
    """Return field `shift` of words as float32, before the packing's factor.

    Integers: placed in the mantissa of 2**23, from which 2**23 + zero point is taken: one logical
    and one float instruction, exact. Floats: placed in the fields of a half, whose
    exponent bias is larger, so that subnormals come out exact as well.
    """
    MAIN: tl.constexpr = 2 if BITS < 4 else (4 if BITS < 7 else 8)
    UPPER: tl.constexpr = 0 if BITS > 6 else BITS - MAIN
    code = (low >> shift) & ((1 << MAIN) - 1)
    if UPPER > 0:
        code = code | (((high >> high_shift) & ((1 << UPPER) - 1)) << MAIN)
    if KIND == 0:
        value = (code | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)
    else:
        # exponent and mantissa, then the sign, at their places in a half
        PLACE: tl.constexpr = 9 if KIND == 2 else 7
        SIGN: tl.constexpr = BITS - 1
        half = ((code & ((1 << SIGN) - 1)) << PLACE) | ((code >> SIGN) << 15)
        value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def step(stored, KIND: tl.constexpr, FACTOR: tl.constexpr):
    """Return scales as float32, times the packing's factor."""
    if KIND == 0:
        value = stored.to(tl.float32)
    elif KIND == 1:  # 2**(e - 127); 2**-127 is subnormal
        bits = stored.to(tl.int32)
        value = tl.where(bits == 0, 0x00400000, bits << 23).to(tl.float32, bitcast=True)
    elif KIND == 2:  # E4M3 in the fields of a half
        bits = stored.to(tl.int32)
        half = ((bits & 0x7F) << 7) | ((bits >> 7) << 15)
        value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:  # unsigned E5M3: its largest exponent is a number, so a half will not do
        bits = stored.to(tl.int32)
        normal = ((bits + (112 << 3)) << 20).to(tl.float32, bitcast=True)
        value = tl.where(bits < 8, bits.to(tl.float32) * 0.00000762939453125, normal)
    return value * FACTOR


@triton.jit
def in_place(low, shift: tl.constexpr, zero, BITS: tl.constexpr):
    """Return an integer field as float32, times 2**P.

    It stays where it is in the word, as far as a mantissa of 23 bits reaches: on Hopper shifting
    every field would cost more time than reading it.
    """
    P: tl.constexpr = shift if shift + BITS < 24 else shift - 16
    word = low
    if P < shift:
        word = low >> 16
    bits = (word & (((1 << BITS) - 1) << P)) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - (zero * (1 << P) + 8388608.0)


@triton.jit
def zeros(zero, at, mask, ASYMMETRIC: tl.constexpr, ZERO: tl.constexpr):
    """Return zero points as float32, ZERO where there is one for all."""
    if ASYMMETRIC:
        return tl.load(zero + at, mask=mask, other=0).to(tl.float32)
    else:
        return tl.full(mask.shape, ZERO, tl.float32)


@triton.jit(do_not_specialize=SIZES)
def one_row(
    x,
    words,
    high,
    scale,
    zero,
    whole,
    bias,
    out,
    rows,
    n,
    k,
    tiles,
    groups,
    chunk,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    ZERO: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    SLICES: tl.constexpr,
    TOGETHER: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Multiply one token (`rows` is 1) without tensor cores: decoding is bound by memory.

    Threads keep their 16 * BLOCK_N sums to the end, so that nothing is exchanged on the way.
    """
    MAIN: tl.constexpr = 2 if BITS < 4 else (4 if BITS < 7 else 8)
    UPPER: tl.constexpr = 0 if BITS > 6 else BITS - MAIN
    FIELDS: tl.constexpr = 32 // MAIN
    split = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < n
    r = tl.arange(0, 16)
    acc = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    first = split * chunk
    for tile in range(first, min(first + chunk, tiles)):
        at = (tile * 16 + r)[:, None] * n + cols[None, :]
        low = tl.load(words + at, mask=inside[None, :], other=0)
        top = low
        if UPPER > 0:
            top = tl.load(high + at, mask=inside[None, :], other=0).to(tl.int32)
        for s in tl.static_range(0, FIELDS, TOGETHER):
            group = min((tile * FIELDS + s) // SLICES, groups - 1) * n + cols
            by = step(tl.load(scale + group, mask=inside, other=0), SCALE, FACTOR)
            null = zeros(zero, group, inside, ASYMMETRIC, ZERO)
            null = null[None, :]
            part = tl.zeros((16, BLOCK_N), dtype=tl.float32)
            for j in tl.static_range(s, s + TOGETHER):
                column = (tile * FIELDS + j) * 16 + r
                xs = tl.load(x + column, mask=column < k, other=0.0).to(tl.float32)
                if KIND == 0 and BITS == MAIN:
                    # the shift that was saved, once per activation instead of once per weight
                    xs = xs * (1.0 / (1 << (j * MAIN if j * MAIN + MAIN < 24 else j * MAIN - 16)))
                    value = in_place(low, j * MAIN, null, BITS)
                else:
                    value = decoded(low, top, j * MAIN, j * UPPER, null, BITS, KIND)
                part += xs[:, None] * value
            acc += part * by[None, :]
    total = tl.sum(acc, axis=0)
    if PARTIAL:
        tl.store(out + split * n + cols, total, mask=inside)
    else:
        if WHOLE:
            total = total / tl.load(whole)
        if BIAS:
            total = total + tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + cols, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def many_rows(
    x,
    words,
    high,
    scale,
    zero,
    whole,
    bias,
    out,
    rows,
    n,
    k,
    tiles,
    groups,
    chunk,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    ZERO: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    SLICES: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_FIELDS: tl.constexpr,
    EARLY: tl.constexpr,
    DOT: tl.constexpr,
):
    """Multiply tiles of tokens on tensor cores, BLOCK_FIELDS * 16 columns at a time.

    EARLY multiplies the weights by their scales before the product, otherwise the product of the
    bare codes is multiplied; then BLOCK_FIELDS runs of 16 columns must share a scale. DOT is the
    type of both operands: that of the activations, or float32 in the interpreter, whose bf16
    product is wrong.
    """
    MAIN: tl.constexpr = 2 if BITS < 4 else (4 if BITS < 7 else 8)
    UPPER: tl.constexpr = 0 if BITS > 6 else BITS - MAIN
    FIELDS: tl.constexpr = 32 // MAIN
    BLOCK_K: tl.constexpr = BLOCK_FIELDS * 16
    split = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < n
    r = tl.arange(0, 16)
    f = tl.arange(0, BLOCK_FIELDS)
    kk = tl.arange(0, BLOCK_K)
    start = x + m.to(tl.int64)[:, None] * k
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = split * chunk
    for tile in range(first, min(first + chunk, tiles)):
        # loaded with three dimensions, so that what follows keeps neighbours along O together
        at = (tile * 16 + r)[None, :, None] * n + cols[None, None, :]
        low = tl.load(words + at, mask=inside[None, None, :], other=0)
        top = low
        if UPPER > 0:
            top = tl.load(high + at, mask=inside[None, None, :], other=0).to(tl.int32)
        for s in tl.static_range(0, FIELDS, BLOCK_FIELDS):
            column = (tile * FIELDS + s) * 16 + kk
            there = (m < rows)[:, None] & (column < k)[None, :]
            a = tl.load(start + column[None, :], mask=there, other=0.0).to(DOT)
            field = (f + s)[:, None, None]
            if EARLY:
                group = tl.minimum((tile * FIELDS + s + f) // SLICES, groups - 1)
                group = group[:, None] * n + cols[None, :]
                by = step(tl.load(scale + group, mask=inside[None, :], other=0), SCALE, FACTOR)
                null = zeros(zero, group, inside[None, :], ASYMMETRIC, ZERO)
                null = null[:, None, :]
                value = decoded(low, top, field * MAIN, field * UPPER, null, BITS, KIND)
                b = (value * by[:, None, :]).to(DOT).reshape(BLOCK_K, BLOCK_N)
                acc = tl.dot(a, b, acc, input_precision="ieee")
            else:
                group = min((tile * FIELDS + s) // SLICES, groups - 1) * n + cols
                by = step(tl.load(scale + group, mask=inside, other=0), SCALE, FACTOR)
                null = zeros(zero, group, inside, ASYMMETRIC, ZERO)
                null = null[None, None, :]
                value = decoded(low, top, field * MAIN, field * UPPER, null, BITS, KIND)
                b = value.to(DOT).reshape(BLOCK_K, BLOCK_N)
                acc += tl.dot(a, b, input_precision="ieee") * by[None, :]
    where = m.to(tl.int64)[:, None] * n + cols[None, :]
    mask = (m < rows)[:, None] & inside[None, :]
    if PARTIAL:
        tl.store(out + split.to(tl.int64) * rows * n + where, acc, mask=mask)
    else:
        if WHOLE:
            acc = acc / tl.load(whole)
        if BIAS:
            acc = acc + tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        tl.store(out + where, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def join(
    partial,
    whole,
    bias,
    out,
    count,
    n,
    SPLITS: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add partial sums [splits, M, O] in a fixed order, so that equal inputs give equal bits."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        acc += tl.load(partial + s * count + at, mask=mask, other=0.0)
    if WHOLE:
        acc = acc / tl.load(whole)
    if BIAS:
        acc = acc + tl.load(bias + at % n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def expand(
    words,
    high,
    scale,
    zero,
    whole,
    out,
    n,
    k,
    groups,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    ZERO: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    WHOLE: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the weight transposed, [I, O]: for so many tokens that a dense product wins."""
    MAIN: tl.constexpr = 2 if BITS < 4 else (4 if BITS < 7 else 8)
    UPPER: tl.constexpr = 0 if BITS > 6 else BITS - MAIN
    FIELDS: tl.constexpr = 32 // MAIN
    tile = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < n
    r = tl.arange(0, 16)
    at = (tile * 16 + r)[:, None] * n + cols[None, :]
    low = tl.load(words + at, mask=inside[None, :], other=0)
    top = low
    if UPPER > 0:
        top = tl.load(high + at, mask=inside[None, :], other=0).to(tl.int32)
    for j in tl.static_range(0, FIELDS):
        group = min((tile * FIELDS + j) // SLICES, groups - 1) * n + cols
        by = step(tl.load(scale + group, mask=inside, other=0), SCALE, FACTOR)
        if WHOLE:
            by = by / tl.load(whole)
        null = zeros(zero, group, inside, ASYMMETRIC, ZERO)
        null = null[None, :]
        value = decoded(low, top, j * MAIN, j * UPPER, null, BITS, KIND) * by[None, :]
        column = (tile * FIELDS + j) * 16 + r
        where = column.to(tl.int64)[:, None] * n + cols[None, :]
        mask = (column < k)[:, None] & inside[None, :]
        tl.store(out + where, value.to(out.dtype.element_ty), mask=mask)
