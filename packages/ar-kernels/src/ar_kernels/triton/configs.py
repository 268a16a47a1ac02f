"""Launch configurations per architecture. A pure table: no GPU was at hand to tune it.

The figures follow from the hardware's limits (shared memory, warps) and from what comparable
kernels ship; whoever has the hardware changes rows, nothing else. Every row but XPU's was compiled
for its architecture and fits its shared memory (2-bit codes, the widest tiles); the tests repeat
a selection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Regime:
    """How up to `rows` tokens are multiplied.

    Attributes:
        rows: largest number of tokens.
        block_m: tokens per program; 1 without tensor cores (`one_row`), else a multiple of 16.
        block_n: output features per program.
        block_fields: runs of 16 columns per product, at most; unused for one token.
        warps: of 32 threads (of 64 on AMD).
        stages: of software pipelining.
        waves: programs wanted per processor; columns are split until there are so many.
    """

    rows: int
    block_m: int
    block_n: int
    block_fields: int
    warps: int
    stages: int
    waves: int


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        name: `sm90`, `gfx942`, ...
        processors: multiprocessors (compute units) of its common product, where unknown.
        shared: bytes of shared memory one program may use.
        regimes: by rising `rows`.
        dense_rows: from so many tokens on the weight is expanded for a dense product; a guess,
            as comparable kernels fall behind a dense product between 128 and 256 tokens.
        expand_n: output features per program of `expand`.
    """

    name: str
    processors: int
    shared: int
    regimes: tuple[Regime, ...]
    dense_rows: int
    expand_n: int = 128


_AMPERE = (
    Regime(1, 1, 128, 0, 4, 2, 4),
    Regime(16, 16, 64, 4, 4, 4, 2),
    Regime(32, 32, 64, 4, 4, 3, 2),
    Regime(64, 64, 64, 4, 4, 3, 2),
    Regime(1 << 30, 64, 128, 4, 8, 3, 1),
)
_SMALL = tuple(replace(row, stages=min(row.stages, 2)) for row in _AMPERE)
"""For processors with half the shared memory."""
_AMD = (
    Regime(1, 1, 128, 0, 2, 2, 4),
    Regime(16, 16, 64, 4, 4, 2, 2),
    Regime(32, 32, 64, 4, 4, 2, 2),
    Regime(64, 64, 64, 4, 4, 2, 1),
    Regime(1 << 30, 64, 128, 2, 8, 2, 1),
)
_XPU = tuple(replace(row, warps=max(4, row.warps), stages=2) for row in _AMPERE)

ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm80", 108, 163 << 10, _AMPERE, 256),
        Arch("sm89", 128, 99 << 10, _SMALL, 256),
        Arch("sm90", 132, 227 << 10, _AMPERE, 256),
        Arch("sm100", 148, 227 << 10, _AMPERE, 256),
        Arch("sm120", 170, 99 << 10, _SMALL, 256),
        Arch("gfx942", 304, 64 << 10, _AMD, 256),
        Arch("xpu", 160, 128 << 10, _XPU, 256),
        Arch("interpreter", 2, 1 << 30, _AMPERE[:3], 24, 32),
    )
}
"""The table."""
