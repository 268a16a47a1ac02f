"""The ops of the CPU kernels: checked, compiled, exported, differentiated, under autocast."""

from __future__ import annotations

import pytest
import torch

from ar_kernels.native import library as lib
from ar_kernels.native import packing
from ar_kernels.native.ops import native_experts, native_linear
from ar_kernels.testing import quantized
from ar_schemes import Granularity, Span, TensorSpec

pytestmark = pytest.mark.skipif(
    isinstance(lib.load(), str), reason=f"not built: {lib.BUILD} builds it"
)
SPEC = TensorSpec(granularity=Granularity(Span.GROUP, (32,)), symmetric=False)
ROWS, COLUMNS, EXPERTS = 72, 96, 3
OFFSETS = torch.tensor([0, 2, 2, 7])


class Layer(torch.nn.Module):
    """Several weights joined: as features of one layer, or as experts."""

    def __init__(self, *, experts: bool) -> None:
        super().__init__()
        self.weights = [
            quantized(SPEC, ROWS if experts or i == 2 else 64, COLUMNS, seed=i)
            for i in range(EXPERTS)
        ]
        blob, meta = packing.join([packing.pack(w) for w in self.weights], experts=experts)
        self.meta, self.experts = list(meta), experts
        self.register_buffer("blob", blob)
        self.register_buffer("offsets", OFFSETS)
        shape = (EXPERTS, ROWS) if experts else (meta[0],)
        self.bias = torch.nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.experts:
            return native_experts(x, self.blob, self.meta, self.offsets, self.bias) + 1
        return native_linear(x, self.blob, self.meta, self.bias) + 1

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """Return the same of float layers."""
        dense = [w.dequantize(x.dtype) for w in self.weights]
        if not self.experts:
            return torch.nn.functional.linear(x, torch.cat(dense), self.bias) + 1
        parts = x.split(OFFSETS.diff().tolist())
        rows = [p @ w.t() + b for p, w, b in zip(parts, dense, self.bias, strict=True)]
        return torch.cat(rows) + 1


@pytest.fixture(params=[False, True], ids=["joined", "experts"])
def layer(request: pytest.FixtureRequest) -> Layer:
    torch.manual_seed(0)
    return Layer(experts=request.param)


def test_equals_float_layers(layer: Layer) -> None:
    x = torch.randn(7, COLUMNS)
    assert torch.allclose(layer(x), layer.expected(x), atol=1e-5)


def test_opcheck(layer: Layer) -> None:
    x = torch.randn(7, COLUMNS, requires_grad=True)
    name = "native_experts" if layer.experts else "native_linear"
    op = getattr(torch.ops.ar_kernels, name).default
    more = (layer.offsets,) if layer.experts else ()
    for bias in (layer.bias, None):
        torch.library.opcheck(op, (x, layer.blob, layer.meta, *more, bias))


def test_compiles_in_one_graph(layer: Layer) -> None:
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, COLUMNS)
    with torch.inference_mode():
        assert torch.equal(compiled(x), layer(x))


def test_exports(layer: Layer) -> None:
    x = torch.randn(7, COLUMNS)
    program = torch.export.export(layer.eval(), (x,))
    assert torch.equal(program.module()(x), layer(x))


def test_autocast_keeps_the_type_of_x(layer: Layer) -> None:
    x = torch.randn(7, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = layer(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, layer(x))


def test_gradients_are_those_of_float_layers(layer: Layer) -> None:
    x = torch.randn(7, COLUMNS, requires_grad=True)
    layer(x).square().sum().backward()
    found = x.grad, layer.bias.grad
    x.grad, layer.bias.grad = None, None
    layer.expected(x).square().sum().backward()
    for mine, theirs in zip(found, (x.grad, layer.bias.grad), strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-3)


def test_training_through_it_lowers_a_loss(layer: Layer) -> None:
    """A low-rank adapter in front of the frozen layer."""
    down = torch.nn.Parameter(torch.randn(4, COLUMNS) * 0.1)
    up = torch.nn.Parameter(torch.zeros(COLUMNS, 4))
    x, wanted = torch.randn(7, COLUMNS), torch.randn(7, layer.meta[0])
    layer.bias.requires_grad_(False)
    optimizer = torch.optim.Adam([down, up], lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x + x @ down.t() @ up.t()) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_opcheck_of_what_the_gradients_use(layer: Layer) -> None:
    if layer.experts:
        op, grad = torch.ops.ar_kernels.native_experts_backward.default, torch.randn(7, ROWS)
        torch.library.opcheck(op, (grad, layer.blob, layer.meta, layer.offsets))
    else:
        op = torch.ops.ar_kernels.native_expand.default
        torch.library.opcheck(op, (layer.blob, layer.meta, torch.bfloat16))
