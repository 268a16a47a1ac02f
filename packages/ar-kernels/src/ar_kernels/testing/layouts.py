"""What every layout must do."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest
import torch

from ar_kernels.layouts.base import Layout
from ar_kernels.testing.samples import quantized
from ar_kernels.weight import KernelError, bits, equal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ar_kernels.weight import QuantizedWeight
    from ar_schemes import TensorSpec


class LayoutConformance:
    """Mixin of tests for one layout.

    Attributes:
        subject: the layout.
        specs: specs it must hold.
        shapes: rows and columns that it must hold for every spec.
        refused: (spec, rows, columns) that it must refuse.
    """

    subject: ClassVar[Layout]
    specs: ClassVar[tuple[TensorSpec, ...]]
    shapes: ClassVar[tuple[tuple[int, int], ...]] = ((32, 64), (64, 128))
    refused: ClassVar[tuple[tuple[TensorSpec, int, int], ...]] = ()

    def weight(self, spec: TensorSpec, rows: int, columns: int) -> QuantizedWeight:
        """Return a weight to pack; override where the layout holds only some values."""
        return quantized(spec, rows, columns)

    def weights(self) -> Iterator[QuantizedWeight]:
        """Yield a weight of every spec and shape."""
        for spec in self.specs:
            for rows, columns in self.shapes:
                yield self.weight(spec, rows, columns)

    def test_it_is_a_layout(self) -> None:
        assert isinstance(self.subject, Layout)
        assert self.subject.name

    def test_it_refuses_what_it_cannot_hold_and_nothing_else(self) -> None:
        for weight in self.weights():
            assert self.subject.refuses(weight.spec, *weight.shape) is None
        for spec, rows, columns in self.refused:
            assert self.subject.refuses(spec, rows, columns), (spec, rows, columns)

    def test_pack_raises_where_it_refuses(self) -> None:
        for spec, rows, columns in self.refused:
            with pytest.raises(KernelError):
                self.subject.pack(quantized(spec, rows, columns))

    def test_facts_foretell_shapes_and_types(self) -> None:
        for weight in self.weights():
            packed = self.subject.pack(weight)
            facts = self.subject.facts(weight.spec, *weight.shape)
            assert packed.keys() == facts.keys()
            for suffix, fact in facts.items():
                assert tuple(packed[suffix].shape) == fact.shape, suffix
                assert packed[suffix].dtype == fact.dtype, suffix
                assert packed[suffix].is_contiguous(), suffix

    def test_unpack_returns_the_weight_that_was_packed(self) -> None:
        for weight in self.weights():
            packed = self.subject.pack(weight)
            assert equal(self.subject.unpack(packed, weight.spec, *weight.shape), weight)

    def test_pack_returns_the_tensors_that_were_unpacked(self) -> None:
        for weight in self.weights():
            first = self.subject.pack(weight)
            again = self.subject.pack(self.subject.unpack(first, weight.spec, *weight.shape))
            for suffix, tensor in first.items():
                assert torch.equal(bits(again[suffix]), bits(tensor)), suffix

    def test_unpack_reads_strided_tensors(self) -> None:
        for weight in self.weights():
            packed = self.subject.pack(weight)
            strided = {k: torch.stack([v, v], -1)[..., 0] for k, v in packed.items()}
            assert equal(self.subject.unpack(strided, weight.spec, *weight.shape), weight)

    def test_a_missing_tensor_is_named(self) -> None:
        for weight in self.weights():
            packed = self.subject.pack(weight)
            for suffix in self.needed(packed.keys()):
                rest = {k: v for k, v in packed.items() if k != suffix}
                with pytest.raises(KernelError, match=suffix):
                    self.subject.unpack(rest, weight.spec, *weight.shape)

    def test_a_tensor_of_wrong_shape_is_named(self) -> None:
        for weight in self.weights():
            packed = self.subject.pack(weight)
            for suffix in self.needed(packed.keys()):
                wrong = {**packed, suffix: packed[suffix][:-1]}
                with pytest.raises(KernelError, match=suffix):
                    self.subject.unpack(wrong, weight.spec, *weight.shape)

    def needed(self, suffixes: Iterable[str]) -> tuple[str, ...]:
        """Return the suffixes that `unpack` cannot do without; override to leave some out."""
        return tuple(suffixes)
