"""The parts of stage `distill`: divergence, moments, weights in motion."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ar_kernels import data_type, equal
from ar_kernels.native import library, tuning
from ar_kernels.numerics.columns import params_of
from ar_schemes import scheme, schemes
from ar_tuner.distill import divergence as module
from ar_tuner.distill.divergence import divergence
from ar_tuner.distill.integers import IntegerLatent
from ar_tuner.distill.latent import COARSE, MARGIN, Latent
from ar_tuner.distill.moments import FIRST, SECOND, Moments
from ar_tuner.distill.stage import latent_of
from ar_tuner.stages import ModelTarget

WIDTH = 256
"""Of the weights: what a super group of GGUF's K types needs."""
NAMES = [n for n, s in schemes().items() if s.weight is not None and not s.roles]


def logits(dtype=torch.float32, *, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 5, 33, generator=made) * spread).to(dtype)


def oracle(candidate: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    p, q = (torch.softmax(x.double(), -1) for x in (reference, candidate))
    return (p * (p / q).log()).sum(-1).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", [1, 70, 2**22], ids=["token-by-token", "uneven", "at-once"])
def test_divergence_and_its_gradient_are_those_of_the_definition(dtype, part, monkeypatch) -> None:
    monkeypatch.setattr(module, "_CACHED", part)
    candidate, reference = logits(dtype).requires_grad_(), logits(dtype, seed=1)
    found = divergence(candidate, reference)
    assert found.dtype == torch.float32
    (grad,) = torch.autograd.grad(found * 3, candidate)
    twin = candidate.detach().double().requires_grad_()
    wanted = oracle(twin, reference)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    (slow,) = torch.autograd.grad(wanted * 3, twin)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), slow, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_divergence_of_equal_logits_is_zero_and_pulls_nowhere() -> None:
    candidate = logits().requires_grad_()
    found = divergence(candidate, candidate.detach() + 7.0)
    (grad,) = torch.autograd.grad(found, candidate)
    assert abs(float(found.detach())) < 1e-6
    assert float(grad.abs().max()) < 1e-7


def test_divergence_leaves_what_it_is_given() -> None:
    candidate, reference = logits().requires_grad_(), logits(seed=1)
    before = candidate.detach().clone(), reference.clone()
    divergence(candidate, reference).backward()
    assert torch.equal(candidate.detach(), before[0])
    assert torch.equal(reference, before[1])


def test_moments_are_adams() -> None:
    ours, theirs = torch.ones(7), torch.ones(7).requires_grad_()
    moments = Moments.like(ours)
    adam = torch.optim.Adam([theirs], lr=0.01, betas=(FIRST, SECOND), eps=1e-12)
    made = torch.Generator().manual_seed(0)
    for step in range(12):
        grad = torch.randn(7, generator=made)
        moments.move(ours, grad, step, 0.01)
        theirs.grad = grad.clone()
        adam.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_moments_take_a_step_size_per_element_and_do_not_know_the_gradients_size() -> None:
    sizes = torch.tensor([0.0, 0.1, 1.0])
    ends = []
    for scale in (1.0, 1e-6):
        value = torch.zeros(3)
        moments = Moments.like(value)
        for step in range(3):
            moments.move(value, torch.full((3,), scale), step, sizes)
        ends.append(value)
    torch.testing.assert_close(ends[0], -3 * sizes, rtol=1e-4, atol=0)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=0)


def target(name: str, *, transposed: bool = False, **overrides) -> ModelTarget:
    """Return a weight rounded to nearest with searched scales, and where it came from."""
    which = scheme(name).with_overrides(overrides)
    spec = which.weight
    made = torch.Generator().manual_seed(3)
    original = torch.randn(128, WIDTH, generator=made) * torch.linspace(0.2, 2, 128)[:, None]
    kind = data_type(spec.data_type)
    weight = kind.quantize(original, spec, kind.search(original, spec))
    ranged = {**weight.extra, "input_range": torch.tensor([-1.5, 2.0])}
    weight = dataclasses.replace(weight, extra=ranged)
    return ModelTarget("b.x", "b.x.weight", transposed, which, weight, original)


def several_steps(name: str, dtype: torch.dtype, transposed: bool) -> list[torch.Tensor]:
    """Return what a weight is made of, and becomes, over four steps."""
    latent = latent_of(target(name, transposed=transposed))
    made = torch.Generator().manual_seed(5)
    like = torch.zeros(1, dtype=dtype)
    out = [latent.stored(like)]
    for step in range(4):
        grad = torch.randn(out[0].shape, generator=made).to(dtype)
        latent.step(grad, step, codes=0.05, scales=0.01)
        out.append(latent.stored(like))
    return [*out, *latent.state().values()]


@pytest.mark.skipif(isinstance(library.load(), str), reason="the native library is not built")
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["MXFP4", "NVFP4", "W2A16", "W4A16", "W8A16", "W2A16G32"])
def test_compiled_kernels_move_weights_as_torch_does(name, dtype, transposed, monkeypatch) -> None:
    made = several_steps(name, dtype, transposed)
    monkeypatch.setattr(tuning, "serves", lambda *_: False)
    expected = several_steps(name, dtype, transposed)
    assert torch.equal(made[0], expected[0])
    assert not torch.equal(made[4], made[0])
    for one, other in zip(made, expected, strict=True):
        close = torch.isclose(one.float(), other.float(), rtol=1e-4, atol=1e-6)
        assert close.float().mean() > 0.9995  # a code on a border may fall to either side


@pytest.mark.skipif(isinstance(library.load(), str), reason="the native library is not built")
def test_compiled_kernels_see_the_divergence_that_torch_sees(monkeypatch) -> None:
    candidate, reference = logits(torch.bfloat16).requires_grad_(), logits(torch.bfloat16, seed=1)
    found = divergence(candidate, reference)
    monkeypatch.setattr(tuning, "serves", lambda *_: False)
    expected = divergence(candidate, reference)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    pair = [torch.autograd.grad(x * 10, candidate)[0] for x in (found, expected)]  # ten tokens
    torch.testing.assert_close(*pair, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_has_not_moved_is_the_weight_it_was(name) -> None:
    one = target(name)
    latent = latent_of(one)
    assert latent is not None
    assert equal(latent.quantize(), one.weight)
    assert torch.equal(latent.stored(one.original), one.weight.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_integers_of_every_width_start_as_they_were(bits, sym) -> None:
    one = target("W4A16", bits=bits, sym=sym, group_size=32)
    assert equal(latent_of(one).quantize(), one.weight)


@pytest.mark.parametrize("name", ["W2A16", "W4A16", "MXFP4", "NVFP4", "GGUF:Q4_K_S", "GGUF:Q4_1"])
def test_latents_stand_between_code_and_original_a_margin_from_the_border(name) -> None:
    one = target(name)
    latent = Latent.of(one)
    value, codes = latent.value, one.weight.dequantize()
    assert not torch.equal(value, codes)
    shift, way = value - codes, one.original - codes
    assert bool((shift * way >= -1e-6).all())
    assert bool((shift.abs() <= way.abs() + 1e-6).all())
    params = params_of(one.weight, kind=data_type(one.scheme.weight.data_type))
    kind = data_type(one.scheme.weight.data_type)
    # farther by half of the margin, every latent still rounds to its code
    reached = codes + shift * (0.5 - MARGIN / 2) / (0.5 - MARGIN)
    assert torch.equal(kind.fake_quant(reached, one.scheme.weight, params), codes)


def moved_by(
    name: str, *, codes: float, scales: float, steps: int = 20, **what
) -> Latent | IntegerLatent:
    latent = latent_of(target(name), **what)
    made = torch.Generator().manual_seed(5)
    grad = torch.randn(128, WIDTH, generator=made)
    for step in range(steps):
        latent.step(grad, step, codes=codes, scales=scales)
    return latent


@pytest.mark.parametrize(
    "name", ["W2A16", "W4A16", "GGUF:Q4_0", "GGUF:Q4_1", "NVFP4", "FP8_STATIC"]
)
def test_scales_move_without_moving_codes(name) -> None:
    latent = moved_by(name, codes=0.0, scales=2e-3)
    before, after = latent.target.weight, latent.quantize()
    assert torch.equal(after.codes, before.codes)
    assert not torch.equal(after.scale, before.scale)


@pytest.mark.parametrize("name", ["MXFP4", "GGUF:Q4_K_S", "GGUF:Q2_K_S", "GGUF:Q6_K"])
def test_powers_of_two_and_scales_of_two_levels_stay(name) -> None:
    latent = moved_by(name, codes=0.1, scales=0.1)
    before, after = latent.target.weight, latent.quantize()
    assert latent.factor is None
    assert torch.equal(after.scale, before.scale)
    assert not torch.equal(after.codes, before.codes)


@pytest.mark.parametrize("name", ["W8A16", "FP8_STATIC", "MXFP8"])
def test_wide_codes_stay(name) -> None:
    latent = moved_by(name, codes=1.0, scales=1e-3)
    assert latent.target.weight.spec.bits > COARSE
    assert latent.value_moments is None
    assert torch.equal(latent.quantize().codes, latent.target.weight.codes)


@pytest.mark.parametrize("name", ["W2A16", "W4A16", "NVFP4", "GGUF:Q4_K_S"])
def test_what_the_model_computes_with_is_what_will_be_written(name) -> None:
    latent = moved_by(name, codes=0.1, scales=5e-3)
    written = latent.quantize()
    assert not equal(written, latent.target.weight)
    assert torch.equal(latent.stored(latent.target.original), written.dequantize())
    assert torch.equal(written.extra["input_range"], torch.tensor([-1.5, 2.0]))


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("granularity", [{"group_size": 32}, {"group_size": -1}, {"bits": 8}])
def test_integers_in_steps_of_their_scale_move_as_any_weight_does(sym, granularity) -> None:
    one = target("W2A16", sym=sym, **granularity)
    plain, quick = Latent.of(one), latent_of(one)
    assert isinstance(quick, IntegerLatent)
    made = torch.Generator().manual_seed(5)
    for step in range(30):
        grad = torch.randn(128, WIDTH, generator=made)
        for latent in (plain, quick):
            latent.step(grad, step, codes=0.05, scales=2e-3)
    ours, theirs = quick.quantize(), plain.quantize()
    assert not torch.equal(ours.scale, one.weight.scale)
    assert float((ours.codes != theirs.codes).float().mean()) < 1e-3
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=2e-3, atol=0)
    if one.weight.spec.bits <= COARSE:
        assert float((ours.codes != one.weight.codes).float().mean()) > 0.1


def test_integers_keep_a_margin_from_the_border() -> None:
    one = target("W2A16")
    latent = latent_of(one)
    shift = latent.value - one.weight.codes.float()
    assert float(shift.abs().max()) <= 0.5 - MARGIN + 1e-6
    assert float(shift.abs().max()) > 0.5 - 2 * MARGIN


def test_one_may_hold_codes_or_scales() -> None:
    held = latent_of(target("W4A16"), codes=False)
    free = latent_of(target("W4A16"), scales=False)
    grad = torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(6))
    for latent in (held, free):
        for step in range(20):
            latent.step(grad, step, codes=0.2, scales=0.01)
    before = held.target.weight
    assert torch.equal(held.quantize().codes, before.codes)
    assert torch.equal(free.quantize().scale, before.scale)
    assert not torch.equal(held.quantize().scale, before.scale)
    assert not torch.equal(free.quantize().codes, before.codes)


def test_steps_go_against_the_gradient_one_size_at_a_time() -> None:
    latent = Latent.of(target("W4A16"), scales=False)
    start = latent.value.clone()
    latent.step(torch.ones(128, WIDTH), 0, codes=0.01, scales=0.0)
    step = (start - latent.value) / latent.unit
    free = step != 0  # not so a code at its limit, which the gradient cannot reach
    wanted = torch.full_like(step[free], 0.01)
    torch.testing.assert_close(step[free], wanted, rtol=1e-2, atol=1e-5)
    assert float(free.float().mean()) > 0.9


def test_a_transposed_weight_is_stored_as_the_model_stores_it() -> None:
    plain, turned = latent_of(target("W4A16")), latent_of(target("W4A16", transposed=True))
    like = torch.empty(0, dtype=torch.bfloat16)
    assert torch.equal(turned.stored(like), plain.stored(like).t())
    grad = torch.randn(128, WIDTH)
    plain.step(grad, 0, codes=0.1, scales=0.01)
    turned.step(grad.t().contiguous(), 0, codes=0.1, scales=0.01)
    assert equal(plain.quantize(), turned.quantize())
