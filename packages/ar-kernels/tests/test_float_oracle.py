"""Every float type against an oracle that knows its values one by one and computes in float64."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from ar_kernels import data_type, layout
from ar_kernels.layouts.gguf import GGUF_LAYOUTS
from ar_schemes import Granularity, Span, TensorSpec, scheme


def floats(exponent: int, mantissa: int, bias: int, top: float) -> list[float]:
    """Return the values of a small float that are not negative, from its definition."""
    out = []
    for power in range(2**exponent):
        for fraction in range(2**mantissa):
            if power == 0:
                out.append(fraction / 2**mantissa * 2.0 ** (1 - bias))
            else:
                out.append((1 + fraction / 2**mantissa) * 2.0 ** (power - bias))
    return sorted(v for v in out if v <= top)


E2M1, E2M3 = floats(2, 1, 1, 6.0), floats(2, 3, 1, 7.5)
E4M3, UE5M3 = floats(4, 3, 7, 448.0), floats(5, 3, 15, 114688.0)
QUARTERS = [n / 4 for n in range(8)]
GRIDS = {
    **dict.fromkeys(("MXFP4", "NVFP4", "NVFP4_E5M3"), E2M1),
    "MXFP6": E2M3,
    **dict.fromkeys(("MXFP8", "FP8_STATIC", "FPW8A16", "FP8_BLOCK"), E4M3),
    "MXINT4": QUARTERS,
}
TOP = {"MXFP4": 2, "MXFP6": 2, "MXFP8": 8, "MXINT4": 0}
ROOM = 1 + 1e-5
"""For float32 rounding of quotients and products, where the oracle has none."""

numbers = st.floats(-1e4, 1e4, width=32) | st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-45, 1.2e-38, -3e-39, 1e-30, 3e38, -3e38, 6.0, 448.0, 0.25, 1e-3]
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, TensorSpec, torch.Tensor]:
    """Return a scheme's name, a spec of it with some granularity, and a weight."""
    name = draw(st.sampled_from(sorted(GRIDS)))
    spec = scheme(name).weight
    assert spec is not None
    rows, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if spec.granularity.span is Span.TILE:
        tile = (draw(st.integers(1, 2)), draw(st.integers(1, 5)))
        spec = spec.with_(granularity=Granularity(Span.TILE, tile))
        rows, columns = rows * tile[0], groups * tile[1]
    elif spec.granularity.span is Span.GROUP:
        size = draw(st.sampled_from([1, 2, 16, 32]))
        spec = spec.with_(granularity=Granularity(Span.GROUP, (size,)))
        columns = groups * size
    else:
        columns = draw(st.integers(1, 9))
    values = draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns))
    return name, spec, torch.tensor(values, dtype=torch.float32).reshape(rows, columns)


def regions(weight: torch.Tensor, spec: TensorSpec):
    """Yield ((row, column) of a scale, the values it scales)."""
    high, wide = spec.granularity.region(*weight.shape)
    for top in range(0, weight.shape[0], high):
        for left in range(0, weight.shape[1], wide):
            cells = weight[top : top + high, left : left + wide]
            yield (top // high, left // wide), [float(v) for v in cells.flatten()]


def gap(value: float, grid: list[float]) -> float:
    """Return how far a value is from the nearest of a grid."""
    return min(abs(value - g) for g in grid)


def step_is_right(name: str, step: float, largest: float, whole: float) -> bool:
    """Tell whether a region's scale is what the type's definition says for its largest value."""
    if largest == 0:
        return step > 0
    if name in TOP:
        return step == 2.0 ** min(127, max(-127, math.frexp(largest)[1] - 1 - TOP[name]))
    if name.startswith("FP"):
        wanted = max(largest / 448, 1 / (448 * 512))
        return math.isclose(step, wanted, rel_tol=1e-6)
    grid, least = (UE5M3, 2.0**-17) if name == "NVFP4_E5M3" else (E4M3, 2.0**-9)
    block, wanted = step * whole, max(largest * whole / 6, least)
    return abs(block - wanted) <= gap(wanted, grid) * ROOM + wanted * 1e-6


@settings(max_examples=250, deadline=None)
@given(problems())
def test_scales_follow_their_definition_and_codes_are_the_nearest(problem) -> None:
    name, spec, weight = problem
    kind = data_type(spec.data_type)
    made = kind.quantize(weight, spec, kind.parameters(weight, spec))
    values, steps = made.dequantize(), kind.step(made)
    whole = float(made.extra["global_scale"]) if name == "NVFP4" else 1.0
    if name == "NVFP4":
        largest = float(weight.abs().max())
        tiny = largest <= 2688 / 3.4e38
        assert math.isclose(whole, 1.0 if tiny else 2688 / largest, rel_tol=1e-6)
    where, _ = zip(*regions(weight, spec), strict=True)
    for (at, cells), (_, found) in zip(regions(weight, spec), regions(values, spec), strict=True):
        step = float(steps[at])
        assert step_is_right(name, step, max(abs(v) for v in cells), whole), (name, at, step)
        for wanted, got in zip(cells, found, strict=True):
            best = gap(abs(wanted) / step, GRIDS[name])
            room = GRIDS[name][-1] * 2**-22
            assert abs(got - wanted) / step <= best * ROOM + room, (name, wanted, got)
            assert got == 0 or math.copysign(1, got) == math.copysign(1, wanted)
    assert len(where) == steps.numel()


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_zeros_denormals_and_single_values_stay_finite(name) -> None:
    spec = scheme(name).weight
    assert spec is not None
    kind = data_type(spec.data_type)
    rows = 128 if spec.granularity.span is Span.TILE else 1
    for value in (0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 3.4e38):
        weight = torch.zeros(rows, 128)
        weight[0, 77] = value
        made = kind.quantize(weight, spec, kind.parameters(weight, spec))
        out = made.dequantize()
        assert torch.isfinite(out).all()
        assert int((out != 0).sum()) <= 1
        searched = kind.quantize(weight, spec, kind.search(weight, spec))
        assert torch.isfinite(searched.dequantize()).all()


blocks = st.lists(
    st.floats(-100, 100, width=32) | st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 1e-7, 65504.0]),
    min_size=32,
    max_size=32,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([found.type for found in GGUF_LAYOUTS]), blocks, st.booleans())
def test_the_gguf_package_decodes_whatever_we_encode(kind, values, constant) -> None:
    gguf = pytest.importorskip("gguf")
    presets = {"Q2_K": "Q2_K_S", "Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}
    spec = scheme(f"GGUF:{presets.get(kind, kind)}").weight
    assert spec is not None
    row = [values[0]] * 256 if constant else values * 8
    weight = torch.tensor([row], dtype=torch.float32)
    found = data_type(spec.data_type)
    for params in (found.parameters(weight, spec), found.search(weight, spec)):
        made = found.quantize(weight, spec, params)
        packed = layout(f"gguf_{kind.lower()}").pack(made)["blocks"]
        theirs = gguf.quants.dequantize(packed.numpy(), getattr(gguf.GGMLQuantizationType, kind))
        assert torch.equal(torch.from_numpy(theirs), made.dequantize())
        assert torch.isfinite(made.dequantize()).all()
