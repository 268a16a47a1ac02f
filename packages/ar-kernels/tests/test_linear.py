from __future__ import annotations

import pytest
import torch

from ar_kernels import KernelError, QuantLinear, data_type, equal
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
    assert made.scales.dtype is torch.float16
    assert made.qweight.dtype is torch.int32
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


def test_channels_grouped_in_activation_order_are_refused() -> None:
    made = layer(weight(), layout="gptq_v2_g_idx")
    made.g_idx.copy_(made.g_idx.flip(0))
    with pytest.raises(KernelError, match="desc_act|act"):
        made(torch.randn(1, 96))


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
