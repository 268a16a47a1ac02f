"""The op: eager, fake, compiled, exported, differentiated."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ar_kernels import KernelError, QuantizedWeight, backend
from ar_kernels.backends import Need, PackedWeight
from ar_kernels.ops import multiply, quant_linear
from ar_kernels.testing import quantized
from ar_schemes import Granularity, Span, TensorSpec

SPEC = TensorSpec(granularity=Granularity(Span.GROUP, (16,)), symmetric=False)
ROWS, COLUMNS = 24, 64
NAMES = ["dense", "reference"]


def packed(name: str) -> tuple[QuantizedWeight, PackedWeight]:
    weight = quantized(SPEC, ROWS, COLUMNS)
    need = Need(SPEC, ROWS, COLUMNS, "cpu", torch.float32)
    return weight, backend(name).pack(weight, need)


class Layer(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        _, ready = packed(name)
        self.name, self.meta = name, list(ready.meta)
        self.count = len(ready.buffers)
        for i, tensor in enumerate(ready.buffers.values()):
            self.register_buffer(f"b{i}", tensor)
        self.bias = torch.nn.Parameter(torch.linspace(-1, 1, ROWS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        buffers = [getattr(self, f"b{i}") for i in range(self.count)]
        return torch.relu(quant_linear(x, buffers, self.meta, self.bias, self.name, ROWS)) + 1


def expected(name: str, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    weight, _ = packed(name)
    return torch.relu(torch.nn.functional.linear(x, weight.dequantize(), bias)) + 1


@pytest.mark.parametrize("name", NAMES)
def test_eager_equals_a_float_layer_with_the_dequantized_weight(name: str) -> None:
    layer, x = Layer(name), torch.randn(2, 3, COLUMNS)
    assert torch.allclose(layer(x), expected(name, x, layer.bias), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    _, ready = packed(name)
    x = torch.randn(2, 3, COLUMNS, requires_grad=True)
    bias = torch.randn(ROWS, requires_grad=True)
    args = (list(ready.buffers.values()), list(ready.meta))
    torch.library.opcheck(quant_linear, (x, *args, bias, name, ROWS))
    torch.library.opcheck(quant_linear, (x, *args, None, name, ROWS))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph_for_several_lengths(name: str) -> None:
    layer = Layer(name)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for tokens in (1, 5, 9):
            x = torch.randn(2, tokens, COLUMNS)
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_exports(name: str) -> None:
    layer, x = Layer(name).eval(), torch.randn(3, COLUMNS)
    program = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(COLUMNS,), (4, COLUMNS), (2, 3, COLUMNS)], ids=str)
def test_gradients_of_activations_and_bias_are_those_of_a_float_layer(
    name: str, shape: tuple[int, ...]
) -> None:
    layer, x = Layer(name), torch.randn(shape, requires_grad=True)
    layer(x).square().sum().backward()
    found = x.grad, layer.bias.grad
    x.grad, layer.bias.grad = None, None
    expected(name, x, layer.bias).square().sum().backward()
    for mine, theirs in zip(found, (x.grad, layer.bias.grad), strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_fake_tensors_get_shape_type_and_device() -> None:
    x = torch.empty(2, 3, COLUMNS, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device="meta")
    out = quant_linear(x, [weight], [], None, "dense", ROWS)
    assert (out.shape, out.dtype, out.device) == ((2, 3, ROWS), torch.bfloat16, x.device)


def test_autocast_returns_the_type_of_the_activations() -> None:
    layer, x = Layer("dense"), torch.randn(3, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = layer(x)
    assert found.dtype == torch.float32
    assert torch.allclose(found, layer(x), atol=0.05)


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(KernelError, match="unknown backend 'nowhere'"):
        quant_linear(torch.ones(1, COLUMNS), [], [], None, "nowhere", ROWS)


def test_whoever_records_ops_sees_the_op_and_gets_the_same() -> None:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204, ARG002
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    _, ready = packed("reference")
    call = (list(ready.buffers.values()), list(ready.meta), None, "reference", ROWS)
    x = torch.randn(3, COLUMNS)
    with torch.no_grad():
        alone = multiply(x, *call)
        with Recorder():
            recorded = multiply(x, *call)
        graph = make_fx(lambda x: multiply(x, *call))(x)
    assert any("quant_linear_plain" in name for name in seen)
    assert "quant_linear_plain" in str(graph.graph)
    assert torch.equal(alone, recorded)
    assert torch.equal(alone, graph(x))
