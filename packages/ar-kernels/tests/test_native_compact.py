"""bf16 weights in 12 bits: every value as it was, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from ar_kernels.native import compact as module
from ar_kernels.native import library, steps
from ar_kernels.native.compact import Compact, compact, linear
from ar_kernels.weight import KernelError

pytestmark = [
    pytest.mark.skipif(isinstance(library.load(), str), reason="the native library is not built"),
    pytest.mark.usefixtures("isa"),
]


@pytest.fixture(autouse=True)
def _weights_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORTH", 1e9)


def made_of(weight: torch.Tensor) -> Compact:
    found = compact(weight)
    assert found is not None
    return found


def values_in(held: Compact, columns: int) -> torch.Tensor:
    """Return the weight, read by rows of x with a single one."""
    ones = torch.eye(columns, dtype=torch.bfloat16)
    rows = [linear(x, held.blob, held.features, held.outliers) for x in ones.split(4)]
    return torch.cat(rows).t()


def odd_weight(features: int, columns: int) -> torch.Tensor:
    """Return normal values, and some of every other kind."""
    weight = torch.randn(features, columns) * 0.02
    weight[0] *= 1e-30  # a row of tiny ones
    weight[1, ::3] *= 1e-8  # many outliers
    weight[2] = 0
    weight[3 % features, 1::2] = -0.0
    weight[-1, -1] = 3e38
    return weight.bfloat16()


@pytest.mark.parametrize(("features", "columns"), [(4, 3), (17, 77), (33, 128), (20, 200)])
def test_nothing_is_lost(features: int, columns: int) -> None:
    weight = odd_weight(features, columns)
    held = made_of(weight)
    assert held.outliers > 0
    assert torch.equal(values_in(held, columns), weight)


def test_subnormal_numbers_are_what_the_weight_itself_gives() -> None:
    weight = (torch.randn(5, 130) * 1e-38).bfloat16()
    weight[3, 7] = 1.0  # the others are outliers, but for those without an exponent
    held = made_of(weight)
    x = torch.randn(1, 130).bfloat16() * 1e30
    found = linear(x, held.blob, held.features, held.outliers)
    expected = steps.linear(x, weight)
    assert torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("features", "columns"), [(1, 16), (101, 77), (64, 256), (40, 1000)])
def test_a_product_is_that_of_float64(rows: int, features: int, columns: int) -> None:
    x, weight, bias = (
        torch.randn(*s).bfloat16() for s in ((rows, columns), (features, columns), (features,))
    )
    held = made_of(weight)
    expected = x.double() @ weight.double().t()
    size = (x.double().abs() @ weight.double().abs().t()).norm()
    found = linear(x, held.blob, features, held.outliers)
    assert (found - expected).norm() < 5e-3 * size
    again = linear(x[None], held.blob, features, held.outliers, bias)
    assert again.shape == (1, rows, features)
    size += bias.double().norm()
    assert (again[0] - expected - bias.double()).norm() < 5e-3 * size


def test_sums_are_those_of_the_weight_itself(isa: str) -> None:
    weight = torch.empty(50, 384).uniform_(0.5, 1).bfloat16()
    weight *= torch.randint(0, 2, weight.shape) * 2 - 1
    held = made_of(weight)
    assert held.outliers == 0
    x = torch.randn(1, 384).bfloat16()
    found = linear(x, held.blob, 50, 0)
    if isa == "avx512_bf16":  # products of pairs in the same order
        assert torch.equal(found, steps.linear(x, weight))
    else:
        assert torch.allclose(found.float(), steps.linear(x, weight).float(), rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("rows", [0, 1])
def test_rows_may_have_gaps(rows: int) -> None:
    weight, wide = torch.randn(9, 64).bfloat16(), torch.randn(3, 192).bfloat16()
    held = made_of(weight)
    x = wide[: 2 * rows, 64:128]
    expected = linear(x.contiguous(), held.blob, 9, held.outliers)
    assert torch.equal(linear(x, held.blob, 9, held.outliers), expected)


def test_opcheck() -> None:
    weight = odd_weight(21, 70)
    held = made_of(weight)
    op = torch.ops.ar_kernels.step_compact_linear
    for bias in (None, torch.randn(21)):
        x = torch.randn(2, 70).bfloat16()
        torch.library.opcheck(op, (x, held.blob, 21, held.outliers, bias))


def test_what_does_not_fit_is_refused() -> None:
    weight = odd_weight(21, 70)
    held = made_of(weight)
    given = held.blob, 21, held.outliers
    with pytest.raises(KernelError, match="too small for its shape, or of a type"):
        linear(torch.randn(5, 70).bfloat16(), *given)
    with pytest.raises(KernelError, match="too small for its shape, or of a type"):
        linear(torch.randn(1, 70), *given)
    with pytest.raises(KernelError, match="another size"):
        linear(torch.randn(1, 300).bfloat16(), *given)
    with pytest.raises(KernelError, match="another size"):
        linear(torch.randn(1, 70).bfloat16(), held.blob[:-1], 21, held.outliers)
    for wrong in (weight.float(), weight[0], weight.t()):
        with pytest.raises(KernelError, match=r"contiguous bf16 \[O, I\]"):
            compact(wrong)


def test_what_does_not_pay_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 256).bfloat16()
    for bad in (float("inf"), float("nan")):
        odd = weight.clone()
        odd[3, 5] = bad
        assert compact(odd) is None
    monkeypatch.setattr(module, "WORTH", 0.85)
    many = torch.randn(640, 128)
    assert compact(many.bfloat16()) is not None
    assert compact(many[:, :100].contiguous().bfloat16()) is None  # of 128 columns a block
    many[:, ::8] *= 1e-8
    assert compact(many.bfloat16()) is None  # an eighth of its values are outliers


def test_parts_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = odd_weight(40, 130)
    whole = made_of(weight)
    monkeypatch.setattr(module, "_PART", 7 * 130 * 2)
    read: list[torch.Tensor] = []
    parts = compact(weight, read.append)
    assert parts is not None
    assert parts.outliers == whole.outliers
    assert torch.equal(parts.blob, whole.blob)
    assert torch.equal(torch.cat(read), torch.cat([weight, weight]))
