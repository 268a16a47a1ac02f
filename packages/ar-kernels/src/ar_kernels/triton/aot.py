"""Compiles launches for GPUs that are not there: what a driver would load, without one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ar_kernels.triton import kernels
from ar_kernels.triton.launch import tl_type

if TYPE_CHECKING:
    from ar_kernels.triton.packing import Packing
    from ar_kernels.triton.plan import Launch

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm89": GPUTarget("cuda", 89, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""Architectures that can be compiled for; Intel's compiler ships with torch's XPU wheels only."""
_FLOATS = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}
_SCALES = ("*fp16", "*u8", "*u8", "*u8")


@dataclass(frozen=True)
class Compiled:
    """What became of one launch.

    Attributes:
        size: bytes of machine code.
        shared: bytes of shared memory per program.
    """

    size: int
    shared: int


def compiled(launch: Launch, packing: Packing, target: str, *, dtype: str) -> Compiled:
    """Return what a launch compiles to.

    Args:
        launch: of `plan`.
        packing: the weight it was planned for.
        target: key of `TARGETS`.
        dtype: of the activations, `fp16`, `bf16` or `fp32`.

    Raises:
        Exception: the compiler's own, when it cannot.
    """
    kernel = getattr(kernels, launch.kernel)
    constants = dict(launch.constants)
    if "DOT" in constants:
        constants["DOT"] = tl_type(constants["DOT"])
    types = _pointers(launch, packing, dtype)
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    absent = {name: None for name, kind in signature.items() if kind == "constexpr"} | constants
    # what the launcher sees at run time: aligned pointers, and O and I that are multiples of 16
    even = {"n": packing.rows % 16 == 0, "k": packing.columns % 16 == 0}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or even.get(name)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=absent, attrs=aligned)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=TARGETS[target], options=options)
    code = made.asm["hsaco" if TARGETS[target].backend == "hip" else "cubin"]
    return Compiled(len(code), made.metadata.shared)


def _pointers(launch: Launch, packing: Packing, dtype: str) -> dict[str, Any]:
    """Return the types of the pointer arguments; those that are not there are constants."""
    floats, constants = _FLOATS[dtype], launch.constants
    upper = {3: "*i16", 5: "*u8", 6: "*i16"}.get(packing.bits, "constexpr")
    return {
        "x": floats,
        "words": "*i32",
        "high": upper,
        "scale": _SCALES[packing.scale],
        "zero": "*u8" if packing.asymmetric else "constexpr",
        "whole": "*fp32" if packing.whole else "constexpr",
        "bias": floats if constants.get("BIAS") else "constexpr",
        "partial": "*fp32",
        "out": "*fp32" if constants.get("PARTIAL") else floats,
    }
