"""From a packed weight and a number of tokens to launches; plain data, no GPU needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ar_kernels.triton.configs import ARCHS
from ar_kernels.triton.words import fields

if TYPE_CHECKING:
    from ar_kernels.triton.configs import Arch, Regime
    from ar_kernels.triton.packing import Packing

_JOIN_BLOCK = 1024
_LEAST_TILES = 2
"""Tiles of columns below which a further split costs more than it spreads."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: name in `kernels`.
        grid: programs.
        constants: its compile-time arguments.
        warps: per program.
        stages: of software pipelining.
    """

    kernel: str
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """How a product is computed.

    Attributes:
        main: the launch that decodes.
        splits: parts of the columns, each with sums of its own; 1 when there is only one.
        chunk: tiles of columns in a part.
        join: the launch that adds them, None for one part or a dense product.
    """

    main: Launch
    splits: int
    chunk: int
    join: Launch | None


def arch_of(kind: str, version: str) -> Arch:
    """Return the row for a device: that of its architecture, else the nearest older one.

    Args:
        kind: `cuda`, `hip`, `xpu` or `cpu` (the interpreter).
        version: `90` for compute capability 9.0, `gfx942`, or empty.
    """
    if kind == "cpu":
        return ARCHS["interpreter"]
    if kind in ("xpu", "hip"):
        return ARCHS["xpu" if kind == "xpu" else "gfx942"]
    known = sorted(int(name[2:]) for name in ARCHS if name.startswith("sm"))
    older = [number for number in known if number <= int(version)]
    return ARCHS[f"sm{older[-1] if older else known[0]}"]


def plan(packing: Packing, rows: int, arch: Arch, processors: int, *, bias: bool, dot: str) -> Plan:
    """Return how `rows` tokens (at least 1) are multiplied.

    Args:
        packing: the weight.
        rows: M.
        arch: row of the table.
        processors: multiprocessors of the device.
        bias: whether there is one.
        dot: type of the operands of a product on tensor cores, `fp16`, `bf16` or `fp32`.
    """
    if rows >= arch.dense_rows:
        return Plan(expansion(packing, arch), 1, packing.tiles, None)
    regime = next(r for r in arch.regimes if rows <= r.rows)
    blocks_n = -(-packing.rows // regime.block_n)
    blocks_m = -(-rows // regime.block_m)
    splits = _splits(blocks_n * blocks_m, packing.tiles, regime.waves * processors)
    chunk = -(-packing.tiles // splits)
    splits = -(-packing.tiles // chunk)
    ends = {"WHOLE": packing.whole, "BIAS": int(bias)}
    constants: dict[str, Any] = {
        **_format(packing),
        **ends,
        "PARTIAL": int(splits > 1),
        "BLOCK_N": regime.block_n,
    }
    if rows == 1:
        constants["TOGETHER"] = packing.together
        main = Launch("one_row", (blocks_n, splits, 1), constants, regime.warps, regime.stages)
    else:
        constants |= {**_product(packing, regime), "DOT": dot}
        grid = (blocks_n, blocks_m, splits)
        main = Launch("many_rows", grid, constants, regime.warps, regime.stages)
    if splits == 1:
        return Plan(main, 1, chunk, None)
    blocks = -(-rows * packing.rows // _JOIN_BLOCK)
    join = Launch("join", (blocks, 1, 1), {"SPLITS": splits, **ends, "BLOCK": _JOIN_BLOCK}, 4, 1)
    return Plan(main, splits, chunk, join)


def expansion(packing: Packing, arch: Arch) -> Launch:
    """Return the launch that writes the dense weight, transposed."""
    grid = (-(-packing.rows // arch.expand_n), packing.tiles, 1)
    constants = {**_format(packing), "WHOLE": packing.whole, "BLOCK_N": arch.expand_n}
    return Launch("expand", grid, constants, 4, 1)


def _format(packing: Packing) -> dict[str, Any]:
    return {
        "BITS": packing.bits,
        "KIND": packing.element,
        "SCALE": packing.scale,
        "FACTOR": packing.factor,
        "ZERO": packing.zero,
        "ASYMMETRIC": packing.asymmetric,
        "SLICES": packing.slices,
    }


def _product(packing: Packing, regime: Regime) -> dict[str, int]:
    """Return what `many_rows` needs beside: where the scale is applied, columns per product.

    On the sums it costs block_m * block_n multiplications a group, on the weights
    group * block_n.
    """
    at_most = min(regime.block_fields, fields(packing.bits))
    late = min(at_most, packing.together)
    early = regime.block_m > late * 16
    return {
        "EARLY": int(early),
        "BLOCK_M": regime.block_m,
        "BLOCK_FIELDS": at_most if early else late,
    }


def _splits(blocks: int, tiles: int, wanted: int) -> int:
    most = max(1, tiles // _LEAST_TILES)
    return max(1, min(most, -(-wanted // blocks), 32))
