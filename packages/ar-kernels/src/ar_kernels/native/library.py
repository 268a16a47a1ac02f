"""The shared library of our CPU kernels, bound with ctypes. Nothing is loaded at import."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from collections.abc import Sequence

ABI = 6
PATH_ENV = "AR_NATIVE_LIBRARY"
ISA_ENV = "AR_NATIVE_ISA"
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
"""Instruction sets by their number in the library, slowest first."""
BUILD = "python -m ar_kernels.native.build"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BAD_RANGE = 7
"""Status of values or numbers outside of what is served."""
_STATUS = {
    1: "the format is not one that the kernels read",
    2: "the packed weight has another size than its format asks for",
    3: "x is too small for its shape, or of a type that is not served",
    4: "the output has another size than the product",
    5: "this processor lacks the instruction set",
    6: "out of memory",
    BAD_RANGE: "rows, features or offsets lie outside of the weight",
}


class Runtime(ctypes.Structure):
    """`ar_runtime` of api.h."""

    _fields_ = (("parallel", ctypes.c_void_p), ("isa", ctypes.c_int64))


class Weight(ctypes.Structure):
    """`ar_weight` of api.h."""

    _fields_ = (
        ("meta", ctypes.c_void_p),
        ("blob", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
    )


class Product(ctypes.Structure):
    """`ar_product` of api.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_bytes", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_bytes", ctypes.c_int64),
    )


class Bound(ctypes.Structure):
    """`ar_bound` of api.h."""

    _fields_ = (
        ("runtime", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
    )


class Floats(ctypes.Structure):
    """`ar_floats` of api.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


class Compact(ctypes.Structure):
    """`ar_compact_weight` of api.h."""

    _fields_ = (
        ("blob", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("outliers", ctypes.c_int64),
    )


class NormInput(ctypes.Structure):
    """`ar_norm_input` of api.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_bytes", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("form", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("epsilon", ctypes.c_double),
        ("y", ctypes.c_void_p),
    )


class Attention(ctypes.Structure):
    """`ar_attention` of api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in "qkv"),
        ("dtype", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "kv_heads", "length", "width")),
        *((f"q{i}", ctypes.c_int64) for i in range(2)),
        *((f"k{i}", ctypes.c_int64) for i in range(3)),
        *((f"v{i}", ctypes.c_int64) for i in range(3)),
        ("mask", ctypes.c_void_p),
        *((f"mask{i}", ctypes.c_int64) for i in range(2)),
        ("scale", ctypes.c_double),
        ("y", ctypes.c_void_p),
    )


class Pair(ctypes.Structure):
    """`ar_pair` of api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in "ab"),
        ("dtype", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("y", ctypes.c_void_p),
    )


class Turn(ctypes.Structure):
    """`ar_turn` of api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("dtype", "sequences", "heads", "width")),
    )


class Copy(ctypes.Structure):
    """`ar_copy` of api.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("dtype", "sequences", "heads", "width")),
        ("y", ctypes.c_void_p),
        *((f"y{i}", ctypes.c_int64) for i in range(2)),
    )


class Call(ctypes.Structure):
    """`ar_call` of api.h."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("what", ctypes.c_void_p),
        ("with_", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


PRODUCTS, NORM, ATTEND, GATE, ADD, TURN, COPY = range(7)
"""Kinds of `Call`."""


@dataclass(frozen=True)
class Sizes:
    """How a packed weight lies in memory (format.h has it).

    Attributes:
        all: bytes.
        header: bytes before the first record.
        record: bytes of 64 features: their factors, then chunks of groups.
        chunk: bytes of a whole chunk; the last one of a record may be shorter.
        lead: bytes of scales and zero points in front of a chunk's codes.
        groups: of a chunk.
    """

    all: int
    header: int
    record: int
    chunk: int
    lead: int
    groups: int


def path() -> Path:
    """Return where the library is, or would be built: beside this module, or as told."""
    told = os.environ.get(PATH_ENV)
    return Path(told) if told else Path(__file__).parent / "libar_native.so"


@functools.cache
def load() -> ctypes.CDLL | str:
    """Return the library, or why it cannot be used. Loads it once."""
    file = path()
    if not file.is_file():
        return f"the compiled library {file.name} ({BUILD} builds it with a C++ compiler)"
    try:
        library = ctypes.CDLL(str(file))
        found = library.ar_abi()
    except (OSError, AttributeError) as error:
        return f"a library that loads: {error}"
    if found != ABI:
        return f"a library of interface {ABI}, not {found} ({BUILD} builds it again)"
    _declare(library)
    return library


def missing() -> str | None:
    """Return what this installation or machine lacks to run the kernels, or None."""
    library = load()
    if isinstance(library, str):
        return library
    wanted = os.environ.get(ISA_ENV)
    if wanted and wanted not in supported():
        return f"a processor with {wanted} ({ISA_ENV}); it has {', '.join(supported())}"
    if best_isa() == "portable" and wanted != "portable":
        return f"AVX2 ({ISA_ENV}=portable runs the slow kernels)"
    return None


@functools.cache
def supported() -> tuple[str, ...]:
    """Return the instruction sets that this processor runs, slowest first."""
    return tuple(name for i, name in enumerate(ISAS) if library().ar_runs(i))


def best_isa() -> str:
    """Return the instruction set to use: `AR_NATIVE_ISA`, or the best."""
    return os.environ.get(ISA_ENV) or supported()[-1]


def library() -> Any:
    """Return the library.

    Raises:
        KernelError: it is not there or does not load.
    """
    found = load()
    if isinstance(found, str):
        msg = f"the native CPU kernels cannot run; missing: {found}"
        raise KernelError(msg)
    return found


@functools.cache
def runtime(isa: str | None = None) -> Runtime:
    """Return the runtime of an instruction set, with torch's threads where torch offers them."""
    return Runtime(_parallel_for(), ISAS.index(isa or best_isa()))


def _parallel_for() -> int | None:
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).torch_parallel_for
    except (OSError, AttributeError):
        return None  # older torch: one thread
    return ctypes.cast(function, ctypes.c_void_p).value


@functools.lru_cache(maxsize=4096)
def integers(meta: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    """Return the integers of a format as C reads them; kept, so that pointers to them stay good."""
    return (ctypes.c_int64 * len(meta))(*meta)


@functools.lru_cache(maxsize=4096)
def sizes(meta: tuple[int, ...]) -> Sizes:
    """Return the sizes of the weights of a format.

    Raises:
        KernelError: the integers are no format.
    """
    out = (ctypes.c_int64 * 6)()
    check(library().ar_sizes(integers(meta), out))
    return Sizes(*out)


def check(status: int) -> None:
    """Raise what a status says.

    Raises:
        KernelError: the status is not 0.
    """
    if status:
        msg = f"native CPU kernel: {_STATUS.get(status, f'unknown status {status}')}"
        raise KernelError(msg)


def _declare(library: ctypes.CDLL) -> None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    runtime, weight, product, floats, compact, norm, attention = (
        ctypes.POINTER(s) for s in (Runtime, Weight, Product, Floats, Compact, NormInput, Attention)
    )
    arguments: dict[str, Sequence[Any]] = {
        "ar_fake_quant": (runtime, pointer),
        "ar_mask": (runtime, pointer, pointer, number, number, pointer),
        "ar_make": (runtime, pointer),
        "ar_move": (runtime, pointer, pointer),
        "ar_diverge": (runtime, pointer),
        "ar_soften": (runtime, pointer),
        "ar_norm_back": (runtime, pointer),
        "ar_runs": (number,),
        "ar_sizes": (pointer, pointer),
        "ar_pack": (runtime, pointer, pointer, number, pointer, number),
        "ar_unpack": (runtime, weight, pointer, number),
        "ar_multiply": (runtime, weight, product),
        "ar_multiply_bound": (pointer, pointer, number, pointer),
        "ar_multiply_experts": (runtime, weight, product, pointer, number),
        "ar_expand": (runtime, weight, number, number, number, pointer, number),
        "ar_multiply_floats": (runtime, floats, product),
        "ar_compact_ends": (runtime, floats, number, number, pointer),
        "ar_compact": (runtime, floats, number, number, pointer, pointer, number),
        "ar_multiply_compact": (runtime, compact, product),
        "ar_norm": (runtime, norm),
        "ar_attend": (runtime, attention),
        "ar_run": (runtime, pointer, number, number),
        "ar_read": (runtime, pointer, number, pointer),
    }
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, ctypes.c_int32
    library.ar_compact_bytes.argtypes = (number, number, number)
    library.ar_compact_bytes.restype = number


def weight(blob: torch.Tensor, meta: tuple[int, ...]) -> Weight:
    """Return a packed weight as C takes it; the blob must outlive it."""
    numbers = ctypes.addressof(integers(meta))
    return Weight(numbers, blob.data_ptr(), blob.numel())
