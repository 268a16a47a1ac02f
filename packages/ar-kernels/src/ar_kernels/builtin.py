"""The first-party data types, layouts and backends, entering through the hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_kernels.backends.cpu_aten import CpuAten
from ar_kernels.backends.dense import Dense
from ar_kernels.backends.reference import Reference
from ar_kernels.hookspecs import hookimpl
from ar_kernels.layouts.awq import AwqLayout
from ar_kernels.layouts.compressed_int import CompressedInt, CompressedPack
from ar_kernels.layouts.float_layouts import FLOAT_LAYOUTS
from ar_kernels.layouts.gguf import GGUF_LAYOUTS
from ar_kernels.layouts.gptq import GPTQ, GPTQ_G_IDX, GPTQ_V2, GPTQ_V2_G_IDX
from ar_kernels.layouts.mlx import MlxLayout
from ar_kernels.layouts.ragged import CT_RAGGED, FP8_RAGGED
from ar_kernels.numerics.float_min import FloatMinimum
from ar_kernels.numerics.fp8 import Fp8
from ar_kernels.numerics.integer import Integer
from ar_kernels.numerics.k_quants import KQuant
from ar_kernels.numerics.mx import Microscaling
from ar_kernels.numerics.nvfp4 import NvFp4, NvFp4E5M3

if TYPE_CHECKING:
    from ar_kernels.backends.base import Backend
    from ar_kernels.layouts.base import Layout
    from ar_kernels.numerics.base import DataType


@hookimpl
def ar_register_data_types() -> list[DataType]:
    """Return the built-in data types."""
    return [
        Integer(),
        Fp8(),
        *map(Microscaling, ("mx_fp", "mx_fp_rceil", "mx_int")),
        *map(NvFp4, ("nv_fp", "nv_fp4_with_static_gs")),
        NvFp4E5M3(),
        FloatMinimum(),
        KQuant("int_sym_dq", symmetric=True),
        KQuant("int_asym_dq", symmetric=False),
    ]


@hookimpl
def ar_register_layouts() -> list[Layout]:
    """Return the built-in layouts."""
    return [
        *(GPTQ, GPTQ_V2, GPTQ_G_IDX, GPTQ_V2_G_IDX),
        *(AwqLayout(), CompressedPack(), CompressedInt(), MlxLayout()),
        *FLOAT_LAYOUTS,
        *(FP8_RAGGED, CT_RAGGED),
        *GGUF_LAYOUTS,
    ]


@hookimpl
def ar_register_backends() -> list[Backend]:
    """Return the built-in backends."""
    return [Reference(), Dense(), CpuAten()]
