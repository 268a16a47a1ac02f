"""The sixteen values and what is built on them."""

from __future__ import annotations

import torch
from ar_plugin_nf4.codebook import codebook, position
from ar_plugin_nf4.data_type import NormalFloat4

from ar_kernels.testing import float_weights, quantized
from ar_schemes import scheme

CPU = torch.device("cpu")


def test_the_values_are_those_of_the_paper() -> None:
    published = [
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
    ]  # fmt: skip
    torch.testing.assert_close(codebook(CPU), torch.tensor(published), rtol=0, atol=2e-6)


def test_the_rounded_position_is_the_nearest_value() -> None:
    x = torch.linspace(-1.2, 1.2, 1001)
    nearest = (x[:, None] - codebook(CPU)).abs().argmin(-1)
    found = position(x)[0].round().clamp(0, 15)
    assert torch.equal(found.long(), nearest)


def test_normal_weights_lose_less_than_with_integers_of_as_many_bits() -> None:
    weight = float_weights(64, 256)["normal"]
    spec = scheme("NF4").weight
    integer = scheme("W4A16").with_overrides({"group_size": 64}).weight
    errors = [
        (quantized(one, 64, 256).dequantize() - weight).square().mean() for one in (spec, integer)
    ]
    assert errors[0] < 0.95 * errors[1]


def test_an_offset_moves_the_weight_by_the_gap_it_lies_in() -> None:
    kind, spec = NormalFloat4(), scheme("NF4").weight
    weight = float_weights(2, 64)["normal"]
    params = kind.parameters(weight, spec)
    offset = torch.zeros_like(weight, requires_grad=True)
    kind.fake_quant(weight, spec, params, offset=offset).sum().backward()
    scale = params.scale.repeat_interleave(64, -1)
    assert torch.equal(offset.grad, position(weight / scale)[1] * scale)
