"""The op of packed experts: eager, fake, compiled, differentiated; and the other op checks."""

from __future__ import annotations

import pytest
import torch

from ar_kernels import backend, ops
from ar_kernels.backends import Need
from ar_kernels.backends.reference import encode_meta
from ar_kernels.expert_ops import expert_linear, expert_linear_backward
from ar_kernels.testing import quantized
from ar_schemes import Granularity, Span, TensorSpec, scheme

SPEC = TensorSpec(granularity=Granularity(Span.GROUP, (32,)), symmetric=False)
ROWS, COLUMNS, COUNT = 48, 64, 3
EXPERT = torch.tensor([2, 0, 2, 3, 0, 2])  # nobody chose 1; there is no 3
NAMES = ["dense", "reference", "cpu_native"]


def stack(name: str):
    """Return float weights [E, O, I] and what the op is given for them."""
    found = backend(name)
    if found.missing() is not None:
        pytest.skip(found.missing())
    need = Need(SPEC, ROWS, COLUMNS, "cpu", torch.float32)
    torch.manual_seed(0)
    weights = [quantized(SPEC, ROWS, COLUMNS) for _ in range(COUNT)]
    packed = [found.pack(weight, need) for weight in weights]
    buffers = [tensor for one in packed for tensor in one.buffers.values()]
    dense = torch.stack([weight.dequantize() for weight in weights])
    return dense, (EXPERT, buffers, list(packed[0].meta), name)


@pytest.mark.parametrize("name", NAMES)
def test_every_token_meets_the_weight_of_its_expert(name) -> None:
    dense, rest = stack(name)
    x = torch.randn(len(EXPERT), COLUMNS)
    out = expert_linear(x, *rest, ROWS)
    for token, number in enumerate(EXPERT.tolist()):
        wanted = dense[number] @ x[token] if number < COUNT else torch.zeros(ROWS)
        torch.testing.assert_close(out[token], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_float_experts(name) -> None:
    dense, rest = stack(name)
    x = torch.randn(len(EXPERT), COLUMNS, requires_grad=True)
    expert_linear(x, *rest, ROWS).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    used = EXPERT < COUNT
    made = torch.einsum("toi,ti->to", dense[EXPERT[used]], other[used])
    made.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name) -> None:
    _, rest = stack(name)
    x = torch.randn(len(EXPERT), COLUMNS, requires_grad=True)
    torch.library.opcheck(expert_linear, (x, *rest, ROWS))
    grad = torch.randn(len(EXPERT), ROWS)
    torch.library.opcheck(expert_linear_backward, (grad, *rest, COLUMNS))


@pytest.mark.parametrize("preset", ["MXFP4", "NVFP4", "INT8", "FP8_STATIC"])
def test_opcheck_of_quantized_inputs(preset) -> None:
    spec = scheme(preset).activation
    assert spec is not None
    static = None if spec.dynamic else torch.tensor([0.01])
    x = torch.randn(5, COLUMNS, requires_grad=True)
    torch.library.opcheck(ops.quantize_input, (x, list(encode_meta(spec, ())), static, None))
    with torch.no_grad():
        assert not torch.equal(ops.quantize_input(x, list(encode_meta(spec, ())), static, None), x)
