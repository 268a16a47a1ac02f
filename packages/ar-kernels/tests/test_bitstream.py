"""The bit stream against Python's own big integers, and published vectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ar_kernels import KernelError
from ar_kernels.layouts.bitstream import pack_stream, unpack_stream

VECTORS = {
    "4 bits, 0..7": (4, list(range(8)), "76543210"),
    "2 bits, i%4": (2, [i % 4 for i in range(16)], "E4E4E4E4"),
    "8 bits, 0..3": (8, list(range(4)), "03020100"),
    "3 bits, i%8": (3, [i % 8 for i in range(32)], "88FAC688 C688FAC6 FAC688FA"),
    "5 bits, i%32": (5, list(range(32)), "8A418820 C5A92839 CA307B9A 38BDAB49 FFBBCDEB"),
    "3 bits, all 4": (3, [4] * 32, "24924924 49249249 92492492"),
    "3 bits, all 3": (3, [3] * 32, "DB6DB6DB B6DB6DB6 6DB6DB6D"),
}


def hexes(words: torch.Tensor) -> str:
    return " ".join(f"{w & 0xFFFFFFFF:08X}" for w in words.tolist())


def oracle(values: list[int], bits: int) -> list[int]:
    """Return the words of one big integer with value i shifted to bit `bits * i`."""
    whole = sum(v << (bits * i) for i, v in enumerate(values))
    count = -(-len(values) * bits // 32)
    words = [(whole >> (32 * k)) & 0xFFFFFFFF for k in range(count)]
    return [w - 2**32 if w >= 2**31 else w for w in words]


@pytest.mark.parametrize("name", VECTORS)
def test_published_vectors(name: str) -> None:
    bits, values, words = VECTORS[name]
    assert hexes(pack_stream(torch.tensor(values, dtype=torch.uint8), bits)) == words


@given(data=st.data(), bits=st.integers(1, 8), count=st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_words_equal_the_oracle_and_come_back(data: st.DataObject, bits: int, count: int) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    packed = pack_stream(torch.tensor(values, dtype=torch.uint8), bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == oracle(values, bits)
    assert unpack_stream(packed, bits, count).tolist() == values


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_streams_of_their_own(bits: int) -> None:
    values = torch.randint(0, 2**bits, (2, 3, 64), dtype=torch.uint8)
    packed = pack_stream(values, bits)
    assert torch.equal(packed[1, 2], pack_stream(values[1, 2], bits))
    assert torch.equal(unpack_stream(packed, bits, 64), values)


def test_words_after_the_stream_are_ignored() -> None:
    values = torch.arange(16, dtype=torch.uint8)
    padded = torch.cat([pack_stream(values, 5), torch.full((7,), -1, dtype=torch.int32)])
    assert torch.equal(unpack_stream(padded, 5, 16), values)


@pytest.mark.parametrize("values", [[0, 8], [-1, 7]], ids=str)
def test_values_beyond_the_width_are_refused(values: list[int]) -> None:
    with pytest.raises(KernelError, match="do not fit 3 bits: 0 to 7 do"):
        pack_stream(torch.tensor(values, dtype=torch.int32), 3)


def test_too_few_words_are_refused() -> None:
    with pytest.raises(KernelError, match="2 words cannot hold 17 values of 4 bits"):
        unpack_stream(torch.zeros(2, dtype=torch.int32), 4, 17)
