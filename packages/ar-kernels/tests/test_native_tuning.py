"""What tuning asks of the native library: to the bit what torch gives, on every instruction set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from ar_kernels import data_type
from ar_kernels.native import library, tuning
from ar_kernels.numerics.activation import fake_quant_activation, static_scale
from ar_kernels.numerics.elements import E2M1, E2M3, E4M3, FloatElement
from ar_kernels.numerics.halves import fake_quant_alike
from ar_kernels.weight import KernelError
from ar_schemes import scheme

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(isinstance(library.load(), str), reason="the native library is not built"),
    pytest.mark.usefixtures("isa"),
]
SPECS = {name: scheme(name).activation for name in ("MXFP4", "MXFP8", "NVFP4")}
SPECS["MXFP6"] = SPECS["MXFP4"].with_(bits=6)
for _bits in (4, 8):
    SPECS[f"MXFP{_bits} rceil"] = SPECS[f"MXFP{_bits}"].with_(data_type="mx_fp_rceil")
DTYPES = (torch.float32, torch.bfloat16)


def every_half() -> torch.Tensor:
    """Return rows of 64: every bfloat16, in order of size, shuffled, and few beside zeros."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    shuffled = bits[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    alone = torch.zeros(2**12, 16, dtype=torch.int16)
    alone[:, 5] = bits[::16]
    return torch.cat([bits, shuffled, alone.flatten()]).view(torch.bfloat16).reshape(-1, 64)


def floats() -> torch.Tensor:
    """Return rows of 64 float32 of every exponent, ordinary rows, borders, zeros."""
    made = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (1000, 64), generator=made).to(torch.int32)
    near = torch.randn(500, 64, generator=made) * torch.randn(500, 1, generator=made).mul(30).exp2()
    rows = [bits.view(torch.float32), near, torch.linspace(-8, 8, 64)[None], -torch.zeros(1, 64)]
    return torch.cat([*rows, near[:20] * 2.0**-126])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether values, signs of zero and places of no number are the same."""
    number = ~a.isnan()
    signs = torch.equal(torch.signbit(a)[number], torch.signbit(b)[number])
    return signs and torch.equal(a.isnan(), b.isnan()) and torch.equal(a[number], b[number])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_activations_are_quantized_as_by_torch(spec, dtype: torch.dtype) -> None:
    x = (every_half() if dtype is torch.bfloat16 else floats()).requires_grad_()
    assert tuning.serves(x)
    expected, made = fake_quant_activation(x, spec), fake_quant_alike(x, spec)
    assert made.dtype == dtype
    assert same(made, expected.to(dtype))
    grad = torch.randn(x.shape).to(dtype)
    grad[0, :2] = torch.tensor([float("nan"), -float("inf")])
    wanted = torch.autograd.grad(expected, x, grad.float())[0]
    assert same(torch.autograd.grad(made, x, grad)[0], wanted)
    with torch.no_grad():
        assert same(fake_quant_alike(x, spec), made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_static_range_of_the_tensor_is_used(dtype: torch.dtype) -> None:
    spec = SPECS["NVFP4"].with_(data_type="nv_fp4_with_static_gs")
    x = torch.randn(3, 5, 48).to(dtype)
    static = static_scale(torch.tensor([2.5]), spec)
    made = fake_quant_alike(x, spec, static=static)
    assert same(made, fake_quant_activation(x, spec, static=static).to(dtype))
    assert not torch.equal(made, fake_quant_alike(x, spec))


def test_few_values_and_parts_of_a_tensor() -> None:
    spec = SPECS["MXFP4"]
    x = torch.randn(7, 3, 192, dtype=torch.bfloat16)
    for some in (x[:1, :1, :32], x[:, ::2, 32:96], x.transpose(0, 1), x[:0]):
        assert same(fake_quant_alike(some, spec), fake_quant_activation(some, spec).bfloat16())


def test_several_threads_give_what_one_gives() -> None:
    x = torch.randn(300, 1024, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fake_quant_alike(x, SPECS["MXFP4"])
        torch.set_num_threads(3)
        assert torch.equal(fake_quant_alike(x, SPECS["MXFP4"]), one)
    finally:
        torch.set_num_threads(before)


def test_without_the_library_torch_computes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x = torch.randn(20, 64, dtype=torch.bfloat16)
    made = fake_quant_alike(x, SPECS["MXFP4"])
    library.load.cache_clear()
    monkeypatch.setenv(library.PATH_ENV, str(tmp_path / "none.so"))
    try:
        assert not tuning.serves(x)
        assert torch.equal(fake_quant_alike(x, SPECS["MXFP4"]), made)
    finally:
        monkeypatch.undo()
        library.load.cache_clear()


def float_latent(element: FloatElement, *, grows: bool) -> tuning.Latent:
    made = torch.Generator().manual_seed(2)
    value = torch.randn(24, 96, generator=made)
    scale = value.reshape(24, 3, 32).abs().amax(-1) / element.maximum * 0.8
    growth = torch.randn(24, 3, generator=made) * 0.1 if grows else None
    return tuning.Latent(value, scale, growth, None, tuning.constants(element))


def plain_weight(latent: tuning.Latent, element: FloatElement) -> torch.Tensor:
    """Return the weight by torch, differentiable."""
    from ar_kernels.numerics.base import Params

    spec = scheme("MXFP4").weight.with_(bits={E2M1: 4, E2M3: 6, E4M3: 8}[element])
    value = latent.value
    if latent.growth is not None:
        value = value + value * latent.growth.repeat_interleave(32, 1)
    return data_type("mx_fp").fake_quant(value, spec, Params(latent.scale))


@pytest.mark.parametrize("element", [E2M1, E2M3, E4M3], ids=["E2M1", "E2M3", "E4M3"])
@pytest.mark.parametrize("grows", [False, True], ids=["fixed", "grows"])
def test_a_float_latent_is_made_and_moved(element: FloatElement, *, grows: bool) -> None:
    latent = float_latent(element, grows=grows)
    assert same(tuning.make(latent, torch.float32), plain_weight(latent, element).detach())
    halves = plain_weight(latent, element).detach().bfloat16()
    assert same(tuning.make(latent, torch.bfloat16), halves)
    grad = torch.randn(24, 96).bfloat16()
    given = latent.value, latent.scale, latent.growth
    leaves = [t.requires_grad_() for t in given if t is not None]
    found = torch.autograd.grad(plain_weight(latent, element), leaves, grad.float())
    for leaf in leaves:
        leaf.requires_grad_(False)  # noqa: FBT003
    moments = torch.zeros(24, 96), torch.ones(24, 96)
    adam = tuning.Adam(*moments, None, 0.01, (0.5, 0.75), 4.0, 1e-12)
    before = latent.value.clone()
    elements, steps, values = tuning.move(latent, grad, adam)
    bound = element.maximum * 32 * 2e-7  # sums of so many, in another order
    torch.testing.assert_close(elements - steps, found[1], rtol=1e-5, atol=bound)
    if grows:
        torch.testing.assert_close(values, found[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adam.first, found[0] * 0.5)
    torch.testing.assert_close(adam.second, 0.75 + 0.25 * found[0] ** 2)
    torch.testing.assert_close(latent.value, before - 0.01 * adam.first / (4 * adam.second).sqrt())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_made_and_moved(dtype: torch.dtype) -> None:
    made = torch.Generator().manual_seed(3)
    value = torch.rand(8, 64, generator=made) * 4.4 - 0.7
    value[0, :5] = torch.tensor([0.5, 1.5, 2.5, -0.5, 3.5])  # borders
    scale, slope = torch.rand(2, 8, 4, generator=made).unbind()
    zero = torch.randint(0, 4, (8, 4), generator=made).float()
    wide = [t.repeat_interleave(16, 1) for t in (scale, zero, slope)]
    latent = tuning.Latent(value, scale, None, zero, (3.0, 0.0, 0.0))
    codes = value.round().clamp(0, 3)
    assert torch.equal(tuning.make(latent, dtype), ((codes - wide[1]) * wide[0]).to(dtype))
    grad = torch.randn(8, 64, generator=made).to(dtype)
    unit = torch.rand(8, 64, generator=made)
    adam = tuning.Adam(torch.ones(8, 64), torch.ones(8, 64), unit, 0.1, (0.9, 0.95), 2.0, 1e-12)
    before = value.clone()
    elements, _, _ = tuning.move(latent, grad, adam, slope)
    wanted = ((codes - wide[1]) * grad.float()).reshape(8, 4, 16).sum(-1)
    torch.testing.assert_close(elements, wanted)
    passed = grad.float() * wide[2] * (before.round() == codes)
    torch.testing.assert_close(adam.first, 0.9 + 0.1 * passed)
    step = adam.first / (2 * adam.second).sqrt()
    torch.testing.assert_close(value, before - 0.1 * unit * step)
    still = value.clone()
    again, _, _ = tuning.move(latent, grad, None, slope)
    assert torch.equal(value, still)
    assert again.shape == scale.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words", [1, 17, 300, 4096])
def test_divergence_and_its_gradient(words: int, dtype: torch.dtype) -> None:
    made = torch.Generator().manual_seed(4)
    mine = (torch.randn(9, words, generator=made) * 5).to(dtype)
    theirs = (mine.float() + torch.randn(9, words, generator=made)).to(dtype)
    theirs[0] += 300
    total, grad = tuning.diverge(mine, theirs)
    q, p = mine.double().log_softmax(-1), theirs.double().log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum()
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)
    bound = 6e-7 if dtype is torch.float32 else 2e-3
    assert float((grad.double() - (q.exp() - p.exp())).abs().max()) <= bound


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(4, 64)
    with pytest.raises(KernelError, match="groups of 48"):
        tuning.fake_quant(x, 48, tuning.BELOW, 2, 1.0, list(tuning.constants(E2M1)), False)
    with pytest.raises(KernelError, match="does not fit"):
        tuning.mask(x, torch.ones(4, 63, dtype=torch.bool))
    with pytest.raises(KernelError, match="do not fit"):
        tuning.make(float_latent(E2M1, grows=False), torch.float64)
    with pytest.raises(KernelError, match="same shape and type"):
        tuning.diverge(x, x.bfloat16())
    uneven = float_latent(E2M1, grows=False)
    uneven = tuning.Latent(uneven.value, torch.ones(24, 12), None, None, uneven.element)
    with pytest.raises(KernelError, match="x is too small"):
        tuning.move(uneven, torch.randn(24, 96), None)
