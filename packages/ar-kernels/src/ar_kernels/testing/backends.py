"""What every backend must do."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from torch import nn

from ar_kernels.backends.base import Backend, ExactBackend, Need, PackedWeight
from ar_kernels.backends.select import judge
from ar_kernels.linear import QuantLinear
from ar_kernels.numerics.activation import fake_quant_activation
from ar_kernels.ops import quant_linear
from ar_kernels.registry import backends, layouts
from ar_kernels.testing.samples import quantized
from ar_kernels.weight import equal
from ar_schemes import Granularity, Span, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ar_kernels.weight import QuantizedWeight

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""||y - reference|| / ||reference||: a few units of the type's last place, and for the 16 bit
types the rounding of the dequantized weight on top (bf16 measured 2.4e-3)."""


class BackendConformance:
    """Mixin of tests for one backend, against float64 with the same dequantized weight.

    Attributes:
        subject: the backend.
        specs: specs it must serve.
        shapes: rows and columns it must serve for every spec.
        dtypes: types of activations it must serve.
        device: torch device to run on.
        refused: needs it must refuse.
        tolerance: relative error allowed by type.
    """

    subject: ClassVar[Backend]
    specs: ClassVar[tuple[TensorSpec, ...]]
    shapes: ClassVar[tuple[tuple[int, int], ...]] = ((32, 64), (96, 128))
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16, torch.bfloat16)
    device: ClassVar[str] = "cpu"
    refused: ClassVar[tuple[Need, ...]] = ()
    tolerance: ClassVar[dict[torch.dtype, float]] = TOLERANCE

    @pytest.fixture(autouse=True)
    def _skip_where_it_cannot_run(self) -> None:
        lacks = self.subject.missing()
        if lacks is not None:
            pytest.skip(f"{self.subject.name}: {lacks}")

    def cases(self) -> Iterator[tuple[Need, QuantizedWeight, PackedWeight]]:
        """Yield a need, a weight and the weight as packed for it."""
        for spec in self.specs:
            for rows, columns in self.shapes:
                weight = quantized(spec, rows, columns)
                for dtype in self.dtypes:
                    need = Need(spec, rows, columns, self.device, dtype)
                    yield need, weight, self.subject.pack(weight, need)

    def inputs(self, need: Need) -> Iterator[Tensor]:
        """Yield activations [..., I]: one token, several, a batch, none, strided."""
        generator = torch.Generator().manual_seed(2)
        for shape in ((), (1,), (5,), (2, 3), (0,)):
            x = torch.randn(*shape, need.columns, generator=generator)
            yield x.to(need.device, need.dtype)
        wide = torch.randn(4, 2 * need.columns, generator=generator)
        yield wide.to(need.device, need.dtype)[:, ::2]

    def test_it_is_a_backend_that_says_how_far_it_was_tried(self) -> None:
        assert isinstance(self.subject, Backend)
        assert self.subject.keeps_codes == isinstance(self.subject, ExactBackend)
        assert self.subject.status.startswith(("verified", "contract-tested", "experimental"))

    def test_it_refuses_what_it_cannot_serve_and_nothing_else(self) -> None:
        for need, _, _ in self.cases():
            assert self.subject.refuses(need) is None, need
        for need in self.refused:
            assert self.subject.refuses(need), need

    def test_buffers_come_in_the_order_of_their_names(self) -> None:
        for _, _, packed in self.cases():
            assert tuple(packed.buffers) == self.subject.buffer_names(packed.meta)
            assert all(isinstance(n, int) and 0 <= n < 2**63 for n in packed.meta)

    def test_unpack_returns_the_weight_that_was_packed(self) -> None:
        if not isinstance(self.subject, ExactBackend):
            pytest.skip("does not keep the codes")
        for need, weight, packed in self.cases():
            assert equal(self.subject.unpack(packed, need).to("cpu"), weight)

    def test_the_product_is_that_of_the_dequantized_weight(self) -> None:
        for need, weight, packed in self.cases():
            bias = torch.linspace(-1, 1, need.rows).to(need.device, need.dtype)
            for x in self.inputs(need):
                for add in (None, bias):
                    found = self.subject.linear(x, packed, add)
                    assert found.dtype == need.dtype
                    assert found.shape == (*x.shape[:-1], need.rows)
                    assert self.error(found, x, weight, add) <= self.tolerance[need.dtype], need

    def error(
        self, found: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None
    ) -> float:
        """Return ||found - expected|| / ||expected||, expected in float64."""
        if not found.numel():
            return 0.0
        expected = x.double().cpu() @ weight.dequantize(torch.float64).t()
        if bias is not None:
            expected = expected + bias.double().cpu()
        return float((found.double().cpu() - expected).norm() / expected.norm())

    def test_equal_inputs_give_equal_bits(self) -> None:
        for need, _, packed in self.cases():
            x = torch.ones(3, need.columns, dtype=need.dtype, device=need.device)
            one, two = (self.subject.linear(x, packed, None) for _ in range(2))
            assert torch.equal(one, two)

    def test_the_op_runs_it_and_compiles_in_one_graph(self) -> None:
        if self.subject.name not in backends():
            pytest.skip(f"{self.subject.name} is not registered in this environment")
        for need, _, packed in self.cases():
            x = torch.ones(3, need.columns, dtype=need.dtype, device=need.device)
            expected = self.subject.linear(x, packed, None)
            args = (list(packed.buffers.values()), list(packed.meta), None)
            found = quant_linear(x, *args, self.subject.name, need.rows)
            assert torch.equal(found, expected)
        torch.library.opcheck(quant_linear, (x, *args, self.subject.name, need.rows))
        torch.compiler.reset()
        compiled = torch.compile(quant_linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, *args, self.subject.name, need.rows), expected)

    # The rest runs the backend inside a layer, as a model does.

    def layers(self) -> Iterator[tuple[QuantLinear, QuantizedWeight, Need]]:
        """Yield a layer prepared for the backend, its weight and its need: one of every spec."""
        if self.subject.name not in backends():
            pytest.skip(f"{self.subject.name} is not registered in this environment")
        lacks = backends()[self.subject.name].missing()
        if lacks is not None:  # the subject has stand-ins that layers do not
            pytest.skip(f"{self.subject.name}: {lacks}")
        rows, columns = self.shapes[0]
        for spec in self.specs:
            order = layout_for(spec, rows, columns)
            if order is None:
                continue
            weight, dtype = quantized(spec, rows, columns), self.dtypes[0]
            need = Need(spec, rows, columns, self.device, dtype)
            layer = QuantLinear.from_weight(weight, layout=order, dtype=dtype).to(self.device)
            layer.prepare(self.subject.name)
            yield layer, weight, need

    def test_a_layer_runs_on_it_and_keeps_its_checkpoint(self) -> None:
        for layer, weight, need in self.layers():
            assert layer.backend == self.subject.name
            assert equal(layer.quantized().to("cpu"), weight)
            state = layer.state_dict()
            assert all(tensor is not None for tensor in state.values())
            again = QuantLinear(
                need.spec,
                need.rows,
                need.columns,
                layout=layer.layout,
                bias=False,
                dtype=need.dtype,
                device=need.device,
            )
            again.load_state_dict(state)
            again.prepare(self.subject.name)
            x = torch.ones(2, need.columns, dtype=need.dtype, device=need.device)
            assert torch.equal(again(x), layer(x))

    def test_a_layer_moves_to_another_device_or_type_and_back(self) -> None:
        for layer, weight, need in self.layers():
            x = torch.ones(2, need.columns, dtype=need.dtype, device=need.device)
            before = layer(x)
            layer.to("cpu").to(need.device)
            for dtype in self.dtypes:
                layer.to(dtype)
                assert layer(x.to(dtype)).dtype == dtype
            layer.to(need.dtype)
            assert torch.equal(layer(x), before)
            assert equal(layer.quantized().to("cpu"), weight)

    def test_the_gradient_of_the_input_is_that_of_the_dequantized_weight(self) -> None:
        for layer, weight, need in self.layers():
            generator = torch.Generator().manual_seed(3)
            x = torch.randn(2, 3, need.columns, generator=generator).to(need.device, need.dtype)
            grad = torch.randn(2, 3, need.rows, generator=generator).to(need.device, need.dtype)
            leaf = x.clone().requires_grad_()
            layer(leaf).backward(grad)
            assert leaf.grad is not None
            expected = grad.double().cpu() @ weight.dequantize(torch.float64)
            error = (leaf.grad.double().cpu() - expected).norm() / expected.norm()
            assert error <= self.tolerance[need.dtype], need

    def test_quantized_activations_are_quantized_before_the_product_or_in_it(self) -> None:
        act = TensorSpec(bits=8, granularity=Granularity(Span.TOKEN))
        for plain, weight, need in self.layers():
            x = torch.randn(3, need.columns, generator=torch.Generator().manual_seed(4))
            layer = QuantLinear.from_weight(
                weight, layout=plain.layout, dtype=need.dtype, activation=act
            ).to(need.device)
            if judge(self.subject, layer.need()).hurdle is not None:
                continue
            layer.prepare(self.subject.name)
            given = x.to(need.dtype)
            fake = fake_quant_activation(given, act)
            found = layer(given.to(need.device))
            # the quantized input itself is rounded to the type of the activations
            allowed = 2 * self.tolerance[need.dtype]
            assert self.error(found, fake, weight, None) <= allowed, need

    def test_a_layer_runs_in_inference_mode_and_under_autocast(self) -> None:
        for layer, _, need in self.layers():
            x = torch.ones(2, need.columns, dtype=need.dtype, device=need.device)
            expected = layer(x)
            with torch.inference_mode():
                assert torch.equal(layer(x), expected)
            with torch.no_grad(), torch.autocast(need.device, torch.bfloat16):
                assert layer(x).dtype == need.dtype

    def test_a_layer_compiles_exports_and_trains_an_adapter(self) -> None:
        found = next(iter(self.layers()), None)
        if found is None:
            pytest.skip("no layout holds what it serves")
        layer, _, need = found
        x = torch.ones(3, need.columns, dtype=need.dtype, device=need.device)
        expected = layer(x)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        exported = torch.export.export(layer, (x,)).module()
        assert torch.equal(exported(x), expected)
        adapted = _Adapted(layer, need)
        adapted(x).square().sum().backward()
        for factor in (adapted.down, adapted.up):
            assert factor.grad is not None
            assert torch.isfinite(factor.grad).all()
        assert adapted.up.grad is not None
        assert adapted.up.grad.abs().sum() > 0


class _Adapted(nn.Module):
    """A LoRA adapter of rank 2 before and beside a quantized layer."""

    def __init__(self, layer: QuantLinear, need: Need) -> None:
        super().__init__()
        self.layer = layer
        generator = torch.Generator().manual_seed(5)
        down = torch.randn(2, need.columns, generator=generator) * 0.1
        up = torch.randn(need.rows, 2, generator=generator) * 0.1
        self.down = nn.Parameter(down.to(need.device, need.dtype))
        self.up = nn.Parameter(up.to(need.device, need.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + x @ self.down.t() @ self.down) + x @ self.down.t() @ self.up.t()


def layout_for(spec: TensorSpec, rows: int, columns: int) -> str | None:
    """Return a layout that holds a weight, without loss and whatever its zero points."""
    for name, found in layouts().items():
        if name in ("gptq", "gptq_g_idx") and not spec.symmetric:
            continue  # version 1 cannot hold a zero point of 0
        if found.refuses(spec, rows, columns) is None:
            return name
    return None
