"""What every data type must do."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest
import torch

from ar_kernels.numerics.base import DataType
from ar_kernels.numerics.columns import column_params, nearest, params_of
from ar_kernels.testing.samples import float_weights
from ar_kernels.weight import KernelError, equal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ar_kernels.numerics.base import Params
    from ar_schemes import TensorSpec


class DataTypeConformance:
    """Mixin of tests for one data type.

    Attributes:
        subject: the data type.
        specs: specs it must serve; at least one of each granularity it claims.
        refused: specs it must refuse.
        shape: rows and columns that every spec divides.
    """

    subject: ClassVar[DataType]
    specs: ClassVar[tuple[TensorSpec, ...]]
    refused: ClassVar[tuple[TensorSpec, ...]] = ()
    shape: ClassVar[tuple[int, int]] = (16, 64)

    def cases(self) -> Iterator[tuple[str, TensorSpec, Tensor]]:
        """Yield (label, spec, weight) of every spec and sample weight."""
        for spec in self.specs:
            for kind, weight in float_weights(*self.shape).items():
                yield f"{spec} {kind}", spec, weight

    def as_stored(self, params: Params, spec: TensorSpec) -> Tensor:
        """Return the scale after storing; override where it is stored in several parts."""
        return params.scale.to(getattr(torch, spec.scale_dtype)).float()

    def test_it_is_a_data_type_whose_name_the_specs_carry(self) -> None:
        assert isinstance(self.subject, DataType)
        assert {spec.data_type for spec in self.specs} == {self.subject.name}

    def test_it_refuses_what_it_cannot_compute_and_nothing_else(self) -> None:
        assert [self.subject.refuses(spec) for spec in self.specs] == [None] * len(self.specs)
        for spec in self.refused:
            assert self.subject.refuses(spec), spec

    def test_scales_have_the_shape_of_the_granularity_and_are_finite(self) -> None:
        for label, spec, weight in self.cases():
            params = self.subject.parameters(weight, spec)
            assert params.scale.shape == spec.granularity.scale_shape(*self.shape), label
            assert params.scale.dtype == torch.float32, label
            assert torch.isfinite(params.scale).all(), label
            assert (params.zero_point is None) or not spec.symmetric, label

    def test_scales_are_already_in_the_stored_precision(self) -> None:
        for label, spec, weight in self.cases():
            for params in (
                self.subject.parameters(weight, spec),
                self.subject.search(weight, spec),
            ):
                assert torch.equal(self.as_stored(params, spec), params.scale), label

    def test_fake_quant_is_quantize_then_dequantize_to_the_bit(self) -> None:
        for label, spec, weight in self.cases():
            params = self.subject.parameters(weight, spec)
            offset = torch.rand(self.shape, generator=torch.Generator().manual_seed(1)) - 0.5
            for shift in (None, offset):
                codes = self.subject.quantize(weight, spec, params, offset=shift)
                fake = self.subject.fake_quant(weight, spec, params, offset=shift)
                assert fake.dtype == torch.float32, label
                assert torch.equal(fake, self.subject.dequantize(codes)), label

    def test_quantize_gives_the_same_bits_twice(self) -> None:
        for label, spec, weight in self.cases():
            one, two = (
                self.subject.quantize(weight, spec, self.subject.parameters(weight, spec))
                for _ in range(2)
            )
            assert equal(one, two), label

    def test_quantizing_a_dequantized_weight_changes_nothing(self) -> None:
        for label, spec, weight in self.cases():
            params = self.subject.parameters(weight, spec)
            once = self.subject.fake_quant(weight, spec, params)
            assert torch.equal(self.subject.fake_quant(once, spec, params), once), label

    def test_the_nearest_value_of_single_columns_is_that_of_fake_quant_to_the_bit(self) -> None:
        columns = torch.tensor([self.shape[1] - 1, 0, 7, 3])
        for label, spec, weight in self.cases():
            params = self.subject.parameters(weight, spec)
            wanted = self.subject.fake_quant(weight, spec, params)[:, columns]
            own = column_params(params, spec, tuple(weight.shape), columns)
            found = nearest(weight.float()[:, columns], spec, own, kind=self.subject)
            assert torch.equal(found, wanted), label

    def test_the_parameters_of_a_quantized_weight_give_it_back(self) -> None:
        for label, spec, weight in self.cases():
            made = self.subject.quantize(weight, spec, self.subject.parameters(weight, spec))
            params = params_of(made, kind=self.subject)
            if params is not None:
                again = self.subject.quantize(self.subject.dequantize(made), spec, params)
                assert equal(again, made), label

    def test_scaling_by_one_changes_nothing(self) -> None:
        for label, spec, weight in self.cases():
            params = self.subject.parameters(weight, spec)
            same = self.subject.rescale(params, spec, torch.ones_like(params.scale))
            assert torch.equal(same.scale, params.scale), label

    def test_clip_factors_of_one_change_nothing(self) -> None:
        for label, spec, weight in self.cases():
            params = self.subject.parameters(weight, spec)
            ones = torch.ones_like(params.scale)
            same = self.subject.parameters(weight, spec, low=ones, high=ones)
            assert torch.equal(same.scale, params.scale), label

    def test_gradients_reach_offset_clip_factors_and_scale_factor(self) -> None:
        for spec in self.specs:
            weight = float_weights(*self.shape)["normal"]
            ones = torch.ones_like(self.subject.parameters(weight, spec).scale)
            low, high, factor = (ones.clone().requires_grad_() for _ in range(3))
            offset = torch.zeros(self.shape, requires_grad=True)
            params = self.subject.parameters(weight, spec, low=low, high=high)
            params = self.subject.rescale(params, spec, factor)
            fake = self.subject.fake_quant(weight, spec, params, offset=offset)
            (fake - weight).square().sum().backward()
            for name, leaf in {
                "offset": offset,
                "low": low,
                "high": high,
                "factor": factor,
            }.items():
                assert leaf.grad is not None, f"{spec} {name}"
                assert torch.isfinite(leaf.grad).all(), f"{spec} {name}"
            assert offset.grad is not None
            assert offset.grad.abs().sum() > 0, spec

    def test_search_is_never_worse_than_plain_parameters(self) -> None:
        importance = torch.linspace(0.1, 3, self.shape[1])
        for label, spec, weight in self.cases():
            for weights in (None, importance):
                factor = torch.ones(self.shape[1]) if weights is None else weights
                plain, searched = (
                    ((self.subject.fake_quant(weight, spec, params) - weight.float()) ** 2 * factor)
                    .double()
                    .sum()
                    for params in (
                        self.subject.parameters(weight, spec),
                        self.subject.search(weight, spec, importance=weights),
                    )
                )
                assert searched <= plain * (1 + 1e-5), label

    def test_stacked_weights_equal_each_alone(self) -> None:
        for spec in self.specs:
            stack = torch.stack([float_weights(*self.shape, seed=s)["normal"] for s in (0, 1)])
            params = self.subject.parameters(stack, spec)
            whole = self.subject.dequantize(self.subject.quantize(stack, spec, params))
            for one, weight in zip(whole, stack, strict=True):
                alone = self.subject.fake_quant(weight, spec, self.subject.parameters(weight, spec))
                assert torch.equal(one, alone), spec

    def test_nan_and_infinity_are_refused(self) -> None:
        for spec in self.specs:
            for bad in (float("nan"), float("inf"), float("-inf")):
                weight = float_weights(*self.shape)["normal"]
                weight[1, 1] = bad
                with pytest.raises(KernelError):
                    self.subject.quantize(weight, spec, self.subject.parameters(weight, spec))
