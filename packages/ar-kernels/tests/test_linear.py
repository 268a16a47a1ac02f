from __future__ import annotations

import pytest
import torch

from ar_kernels import KernelError, QuantLinear, data_type, equal
from ar_kernels import layout as layout_of
from ar_kernels.layouts import TensorFact
from ar_schemes import scheme


def weight(bits: int = 4, *, symmetric: bool = True):
    spec = scheme("W4A16").with_overrides({"bits": bits, "group_size": 32, "sym": symmetric}).weight
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    kind = data_type("int")
    return kind.quantize(values, spec, kind.parameters(values, spec))


def layer(found, *, bias=None, layout="gptq_v2", dtype=torch.float32) -> QuantLinear:
    return QuantLinear.from_weight(found, layout=layout, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_it_computes_what_the_dequantized_weight_does(bits, symmetric, backend) -> None:
    found, bias = weight(bits, symmetric=symmetric), torch.randn(64)
    made = layer(found, bias=bias)
    made.prepare(backend)
    x = torch.randn(2, 5, 96)
    expected = torch.nn.functional.linear(x, found.dequantize(), bias)
    torch.testing.assert_close(made(x), expected)
    assert made.backend == backend


def test_the_state_dict_is_that_of_the_checkpoint_before_and_after_use() -> None:
    made = layer(weight(), bias=torch.zeros(64))
    before = {k: v.clone() for k, v in made.state_dict().items()}
    assert set(before) == {"qweight", "qzeros", "scales", "bias"}
    made(torch.randn(1, 96))
    after = made.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert equal(made.quantized(), weight())


def test_casting_leaves_the_packed_tensors_alone() -> None:
    made = layer(weight())
    made(torch.randn(1, 96))
    made.to(torch.bfloat16)
    state = made.state_dict()
    assert state["scales"].dtype is torch.float16
    assert state["qweight"].dtype is torch.int32
    out = made(torch.randn(1, 96, dtype=torch.bfloat16))
    assert out.dtype is torch.bfloat16
    assert equal(made.quantized(), weight())


def test_loading_other_tensors_changes_the_result() -> None:
    made, other = layer(weight()), layer(weight(symmetric=True))
    x = torch.randn(3, 96)
    before = made(x)
    state = {k: v.clone() for k, v in other.state_dict().items()}
    state["scales"] = state["scales"] * 2
    made.load_state_dict(state)
    torch.testing.assert_close(made(x), 2 * before)


def test_the_meta_device_holds_shapes_only() -> None:
    spec = weight().spec
    made = QuantLinear(spec, 64, 96, layout="gptq", bias=False, dtype=torch.float32, device="meta")
    assert made.qweight.shape == (12, 64)
    with pytest.raises(KernelError, match="meta device"):
        made.prepare()


def test_a_shape_no_layout_holds_is_refused() -> None:
    with pytest.raises(KernelError, match="multiple of 32"):
        QuantLinear(weight().spec, 63, 96, layout="gptq", bias=False, dtype=torch.float32)
    with pytest.raises(KernelError, match="unknown layout"):
        QuantLinear(weight().spec, 64, 96, layout="gtpq", bias=False, dtype=torch.float32)


@pytest.mark.parametrize("backend", ["dense", "reference", "cpu_aten"])
def test_channels_grouped_in_activation_order_meet_their_own_weights(backend) -> None:
    dtype = torch.bfloat16 if backend == "cpu_aten" else torch.float32
    made = layer(weight(symmetric=False), layout="gptq_v2_g_idx", dtype=dtype)
    made.g_idx.copy_(torch.arange(96) % 3)
    state = {k: v.clone() for k, v in made.state_dict().items()}
    expected = made.quantized().dequantize()
    made.prepare(backend)
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    error = (made(x) - x @ expected.t()).norm() / (x @ expected.t()).norm()
    assert error < (8e-3 if backend == "cpu_aten" else 1e-6)
    assert torch.equal(made.quantized().dequantize(), expected)
    assert all(torch.equal(made.state_dict()[k], state[k]) for k in state)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq", "ct_pack", "ct_int"])
def test_codes_a_backend_keeps_are_let_go_and_come_back(layout) -> None:
    made = layer(weight(), layout=layout)
    state = {k: v.clone() for k, v in made.state_dict().items()}
    size = sum(b.nbytes for b in made.buffers())
    made.prepare("reference")
    codes = max(state, key=lambda k: state[k].nbytes)
    assert codes not in dict(made.named_buffers())
    assert torch.equal(getattr(made, codes), state[codes])  # made again
    assert sum(b.nbytes for b in made.buffers()) < size + weight().codes.nbytes
    for moved in (made, made.to(torch.bfloat16), made.to("cpu").half()):
        after = moved.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[k], state[k]) for k in state)
        assert all(after[k].dtype == state[k].dtype for k in state)
    other = {k: v.clone() for k, v in layer(weight(), layout=layout).state_dict().items()}
    scale = next(k for k in other if "scale" in k)
    other[scale] = other[scale] * 2
    made.load_state_dict(other)
    torch.testing.assert_close(made.quantized().dequantize(), 2 * weight().dequantize())


def test_scales_in_a_type_the_layout_has_not_are_read_where_that_is_exact() -> None:
    found = weight()
    packed = layout_of("gptq").pack(found)
    scales = packed["scales"].bfloat16()
    fact = {"scales": TensorFact(tuple(scales.shape), torch.bfloat16)}
    made = QuantLinear(
        found.spec, 64, 96, layout="gptq", bias=False, dtype=torch.float32, stored=fact
    )
    made.qweight, made.qzeros, made.scales = packed["qweight"], packed["qzeros"], scales
    assert torch.equal(made.quantized().scale, scales.t().half())
    made.scales = scales * 2**-20
    with pytest.raises(KernelError, match="not exact in torch.float16"):
        made.quantized()


def test_it_tells_what_it_is() -> None:
    made = layer(weight())
    assert (made.in_features, made.out_features) == (96, 64)
    assert "not prepared" in repr(made)
    made.prepare("reference")
    assert "backend=reference" in repr(made)


def test_it_compiles_in_one_graph() -> None:
    made = layer(weight())
    x = torch.randn(2, 96)
    expected = made(x)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_a_model_may_look_at_the_weight() -> None:
    found = weight()
    made = layer(found)
    for prefer in (None, "reference"):
        if prefer is not None:
            made.prepare(prefer)
        assert made.weight.shape == (64, 96)
        assert made.weight.dtype is torch.float32
        assert made.weight.device.type == "cpu"
        assert torch.equal(made.weight + 0, found.dequantize())
    assert made.to(torch.bfloat16).weight.dtype is torch.bfloat16
    assert "weight" not in made.state_dict()


def test_a_model_may_multiply_by_the_weight_and_differentiate() -> None:
    made, x = layer(weight()), torch.randn(3, 96, requires_grad=True)
    out = torch.nn.functional.linear(x, made.weight)
    torch.testing.assert_close(out, made(x))
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, made.quantized().dequantize().sum(0).expand(3, 96))


def test_the_weight_of_an_empty_layer_is_asked_for_nothing() -> None:
    spec = weight().spec
    made = QuantLinear(
        spec, 64, 96, layout="gptq_v2", bias=False, dtype=torch.float16, device="meta"
    )
    assert made.weight.device.type == "meta"
    assert (made.weight * 2).shape == (64, 96)


def test_a_shared_layer_is_left_out_while_loading_and_then_put_everywhere() -> None:
    pytest.importorskip("transformers")
    from ar_kernels.hf.sharing import leave_out_shared, put_shared

    model = torch.nn.ModuleDict({"here": layer(weight()), "there": torch.nn.Linear(96, 64)})
    model.all_tied_weights_keys = {
        "there.weight": "here.weight",
        "there.bias": "here.bias",
        "head.weight": "embed.weight",
    }
    model.embed = torch.nn.Embedding(4, 4)
    places = leave_out_shared(model)
    assert places == {"there": "here"}
    assert model.all_tied_weights_keys == {"head.weight": "embed.weight"}
    assert not any(name.startswith("there") for name in model.state_dict())
    put_shared(model, places)
    assert model["there"] is model["here"]
