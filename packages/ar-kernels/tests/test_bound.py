"""Products whose arguments are prepared: when a layer uses them, and that they give the same."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ar_kernels import KernelError, QuantLinear, data_type, ops
from ar_kernels import backend as get_backend
from ar_kernels.backends import Need
from ar_kernels.backends.reference import encode_meta
from ar_kernels.native import bound as binding
from ar_kernels.native import build, library
from ar_kernels.native.bound import NOT_FOR_US, Bound
from ar_kernels.numerics.activation import fake_quant_activation
from ar_schemes import Granularity, Span, TensorSpec, scheme

pytestmark = pytest.mark.skipif(
    library.missing() is not None, reason="the native library is not built"
)
EXCHANGE = "__dlpack_c_exchange_api__"
SPEC = TensorSpec(bits=4, granularity=Granularity(Span.GROUP, (32,)))


def layer_of(*, bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> QuantLinear:
    numbers = data_type("int")
    weight = torch.randn(96, 64)
    quantized = numbers.quantize(weight, SPEC, numbers.parameters(weight, SPEC))
    given = torch.randn(96) if bias else None
    made = QuantLinear.from_weight(quantized, layout="gptq", bias=given, dtype=dtype)
    made.prepare("cpu_native")
    return made


def both(layer: QuantLinear, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return what the prepared product gives, and what the layer computes without it."""
    bound = layer._bound
    quick = None if bound is None else bound(x, layer._buffers)
    layer._bound = None
    out = layer(x)
    layer._bound = bound
    return quick, out


@pytest.fixture(params=["quick_call", "ctypes_call"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have products called one way."""
    if request.param == "ctypes_call":
        monkeypatch.setattr(binding, "quick_call", lambda *_: None)
    elif not build.QUICK_CALL.is_file() or not hasattr(torch.Tensor, EXCHANGE):
        pytest.skip("no module that calls without ctypes")
    return str(request.param)


def test_the_module_is_used_where_it_is() -> None:
    made = layer_of()._bound
    assert isinstance(made, Bound)
    usable = build.QUICK_CALL.is_file() and hasattr(torch.Tensor, EXCHANGE)
    assert isinstance(made._call, types.BuiltinFunctionType) == usable


def test_without_the_module_or_torchs_part_ctypes_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{binding.__package__}._quick_call"
    given, shape = library.Bound(), (96, 64)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        assert binding.quick_call(given, shape) is None
    if not build.QUICK_CALL.is_file():
        return
    for other in (None, object(), 5):
        monkeypatch.setattr(torch.Tensor, EXCHANGE, other, raising=False)
        assert binding.quick_call(given, shape) is None


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", list(library.DTYPES), ids=str)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 1, 64), (3, 2, 5, 64), (0, 64), (2, 0, 64)])
def test_it_is_the_same_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = layer_of(dtype=dtype)
    x = torch.randn(shape).to(dtype)
    quick, out = both(layer, x)
    assert quick is not None
    assert quick.shape == out.shape
    assert torch.equal(quick, out)
    assert torch.equal(layer(x), out)


@pytest.mark.usefixtures("way")
def test_views_are_read_where_they_lie() -> None:
    layer = layer_of()
    wide = torch.randn(4, 3, 128).bfloat16()
    for x in (wide[2, 1, 32:96], wide[1:3].view(-1, 64)[5:], wide[1:2, 2:3, 64:], wide[3:, 1, :64]):
        quick, out = both(layer, x)
        assert quick is not None
        assert torch.equal(quick, out)
        assert torch.equal(quick, layer(x.clone()))


def test_a_call_checks_what_it_is_given(way: str) -> None:
    made = layer_of()._bound
    assert isinstance(made, Bound)
    x, y = torch.randn(4, 64).bfloat16(), torch.zeros(4, 96).bfloat16()
    gaps = torch.randn(64, 4).bfloat16().t()
    others = [(gaps, y), (x[:, :32], y), (x.view(8, 32), y), (x.new_empty(()), y)]
    if way == "quick_call":
        others += [(x.float(), y), (x.half(), y), (x.view(torch.int16), y), (x, y.float())]
        others += [
            (x, y[:3]),
            (x, y[:, :64]),
            (x, y.t()),
            (x, torch.zeros(4, 192).bfloat16()[:, ::2]),
        ]
        for wrong in ((), (x,), (x, y, y)):
            with pytest.raises(TypeError, match="two tensors"):
                made._call(*wrong)
        with pytest.raises(RuntimeError):
            made._call(x, None)  # type: ignore[arg-type]
    for given in others:
        assert made._call(*given) == NOT_FOR_US
    assert not y.any()
    assert made._call(x, y) == 0
    assert y.any()


@pytest.mark.usefixtures("way")
def test_what_is_not_for_it_goes_the_usual_way() -> None:
    layer = layer_of()
    plain = torch.randn(4, 64).bfloat16()
    others: list[torch.Tensor] = [
        torch.randn(4, 64),
        torch.randn(64, 4).bfloat16().t(),
        plain.clone().requires_grad_(),
        torch.nn.Parameter(plain),
    ]
    for x in others:
        quick, out = both(layer, x)
        assert quick is None
        assert out.dtype == x.dtype
        assert torch.equal(out, layer(x))
    layer(others[2]).sum().backward()
    assert others[2].grad is not None
    assert layer_of(bias=True)._bound is None
    with pytest.raises(KernelError, match=r"need float32, float16 or bfloat16 \[\.\.\., 64\]"):
        layer(torch.randn(4, 63).bfloat16())


def test_modes_and_graphs_see_an_op() -> None:
    layer = layer_of()
    x = torch.randn(1, 64).bfloat16()
    expected = layer(x)
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # noqa: ANN202
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        assert torch.equal(layer(x), expected)
    assert "ar_kernels.quant_linear_plain.default" in seen
    with torch.no_grad():
        graph = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(graph(x), expected)
        exported = torch.export.export(layer, (x,), strict=False).module()
        assert torch.equal(exported(x), expected)


def test_another_weight_is_another_product() -> None:
    layer, other = layer_of(), layer_of()
    x = torch.randn(1, 64).bfloat16()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    blob = layer.packed_blob()
    assert blob is not None
    layer.settle(blob.clone())
    quick, out = both(layer, x)
    assert quick is not None
    assert torch.equal(quick, out)
    layer._buffers["ready_blob"] = blob.clone()  # by somebody who does not know of it
    assert both(layer, x)[0] is None
    layer.to(torch.float32)
    quick, out = both(layer, x.float())
    assert quick is not None
    assert torch.equal(quick, out)
    layer.prepare("dense")
    assert layer._bound is None


def test_a_bias_that_comes_later_counts() -> None:
    layer = layer_of(dtype=torch.float32)
    x = torch.randn(2, 64)
    without = layer(x)
    layer.bias = torch.nn.Parameter(torch.ones(96), requires_grad=False)
    assert torch.allclose(layer(x), without + 1, atol=1e-4)


def test_a_copy_arrives_where_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pickle.dumps(layer_of())
    monkeypatch.setattr(library, "missing", lambda: "a compiler")
    made = pickle.loads(packed)  # noqa: S301 - our own
    assert made._bound is None
    assert made.backend == "cpu_native"


def test_copies_have_their_own() -> None:
    layer = layer_of()
    x = torch.randn(1, 64).bfloat16()
    expected = layer(x)
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - our own
        assert isinstance(made._bound, Bound)
        assert made._bound is not layer._bound
        quick, out = both(made, x)
        assert quick is not None
        assert torch.equal(quick, expected)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("preset", ["MXFP4", "MXFP8", "NVFP4", "INT8", "FP8_BLOCK"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_quantized_as_by_the_op(preset: str, dtype: torch.dtype) -> None:
    asked = scheme(preset)
    assert asked.activation is not None
    assert asked.weight is not None
    numbers = data_type(asked.weight.data_type)
    weight = torch.randn(128, 256)
    held = numbers.quantize(weight, asked.weight, numbers.parameters(weight, asked.weight))
    packed = get_backend("cpu_native").pack(held, Need(asked.weight, 128, 256, "cpu", dtype))
    bound = Bound("blob", packed.buffers["blob"], packed.meta, dtype)
    spec = list(encode_meta(asked.activation, ()))
    for rows in (1, 5):
        x = torch.randn(rows, 256).to(dtype)
        before = x.clone()
        found = ops.quantized_input(x, spec, None, None)
        assert torch.equal(found, ops.quantize_input(x, spec, None, None))
        exact = fake_quant_activation(x, asked.activation).to(dtype)
        assert torch.equal(found, exact)
        assert found.data_ptr() != x.data_ptr()
        assert torch.equal(x, before)
        quick = bound(found, packed.buffers)
        assert quick is not None
        assert torch.equal(quick, get_backend("cpu_native").linear(found, packed, None))


def test_a_layer_with_quantized_inputs_uses_it_too() -> None:
    asked = scheme("MXFP4")
    assert asked.weight is not None
    numbers = data_type("mx_fp")
    weight = torch.randn(128, 256)
    held = numbers.quantize(weight, asked.weight, numbers.parameters(weight, asked.weight))
    layer = QuantLinear.from_weight(
        held, layout="ct_mxfp4", dtype=torch.bfloat16, activation=asked.activation
    )
    layer.prepare("cpu_native")
    assert isinstance(layer._bound, Bound)
    x = torch.randn(2, 256).bfloat16()
    plain = QuantLinear.from_weight(held, layout="ct_mxfp4", dtype=torch.bfloat16)
    quantized = ops.quantize_input(x, list(encode_meta(asked.activation, ())), None, None)
    assert torch.equal(layer(x), plain(quantized))
    assert not torch.equal(layer(x), plain(x))
