from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ar_schemes import Granularity, SchemeError, Span, SuperGroup, TensorSpec

COUNT = st.integers(1, 8)


@pytest.mark.parametrize(
    ("value", "span", "shape"),
    [
        (128, Span.GROUP, (64, 2)),
        (-1, Span.CHANNEL, (64, 1)),
        (0, Span.TENSOR, (1, 1)),
        ((32, 128), Span.TILE, (2, 2)),
    ],
    ids=["group", "channel", "tensor", "tile"],
)
def test_a_group_size_of_a_file_stands_for_a_granularity(value, span, shape) -> None:
    granularity = Granularity.from_group_size(value)
    assert granularity.span is span
    assert granularity.group_size == value
    assert granularity.scale_shape(64, 256) == shape


@pytest.mark.parametrize("value", [-2, True, "128", 1.5])
def test_a_group_size_that_means_nothing_is_refused(value) -> None:
    with pytest.raises(SchemeError, match="is not allowed"):
        Granularity.from_group_size(value)


@pytest.mark.parametrize(
    ("span", "size"), [(Span.GROUP, ()), (Span.TILE, (1,)), (Span.GROUP, (0,))]
)
def test_a_region_needs_its_sizes(span, size) -> None:
    with pytest.raises(SchemeError, match="positive number"):
        Granularity(span, size)


def test_a_region_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SchemeError, match="does not divide a tensor of shape"):
        Granularity(Span.GROUP, (100,)).scale_shape(64, 256)


@pytest.mark.parametrize("bits", [0, 17, 4.0, True])
def test_bits_are_whole_numbers_from_1_to_16(bits) -> None:
    with pytest.raises(SchemeError, match="bits"):
        TensorSpec(bits=bits)


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([16, 32, 64, 128]),
    rows=st.integers(1, 64),
    groups=st.integers(1, 8),
    symmetric=st.booleans(),
)
def test_bits_per_weight_counts_every_stored_bit(bits, group, rows, groups, symmetric) -> None:
    spec = TensorSpec(bits=bits, granularity=Granularity(Span.GROUP, (group,)), symmetric=symmetric)
    columns = group * groups
    stored = rows * columns * bits + rows * groups * (16 + (0 if symmetric else bits))
    assert spec.bits_per_weight(rows, columns) == pytest.approx(stored / (rows * columns))


def test_super_groups_and_full_precision_are_counted() -> None:
    q4_k = TensorSpec(
        granularity=Granularity(Span.GROUP, (32,)), symmetric=False, super_group=SuperGroup(8, 6)
    )
    assert q4_k.bits_per_weight(1, 256) == 4.5
    assert TensorSpec(bits=16).bits_per_weight(8, 8) == 16.0


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec(),
        TensorSpec(bits=2, granularity=Granularity(Span.TILE, (128, 128)), scale_dtype="float32"),
        TensorSpec(super_group=SuperGroup(8, 6), symmetric=False),
    ],
    ids=["group", "tile", "super"],
)
def test_plain_values_give_the_spec_back(spec) -> None:
    assert TensorSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 8),
    tile=st.tuples(st.integers(1, 8), st.integers(1, 8)),
)
def test_regions_cover_the_tensor_exactly(rows, columns, tile) -> None:
    granularity = Granularity(Span.TILE, tile)
    shape = (rows * tile[0], columns * tile[1])
    assert granularity.scale_shape(*shape) == (rows, columns)
    assert granularity.region(*shape) == tile


def test_a_spec_says_what_it_is_in_a_word() -> None:
    assert str(TensorSpec()) == "int4 group128"
    assert str(TensorSpec(symmetric=False, granularity=Granularity(Span.TILE, (8, 16)))) == (
        "int4 tile8x16 asym"
    )


def test_a_changed_copy_leaves_the_original() -> None:
    spec = TensorSpec()
    assert spec.with_(bits=3).bits == 3
    assert spec.bits == 4
    assert spec.group_size == 128
