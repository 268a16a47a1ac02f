"""The output head: tuned on probabilities, slice by slice."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ar_kernels import equal
from ar_schemes import scheme
from ar_tuner import AutoRound, TunerError, events
from ar_tuner.algorithms import head as head_module
from ar_tuner.algorithms import slices
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.algorithms.head import Head, HeadObjective, head_ranges, judged
from ar_tuner.algorithms.losses import kl_divergence
from ar_tuner.algorithms.opt_rtn import OptRtn
from ar_tuner.algorithms.rtn import nearest
from ar_tuner.algorithms.signround import SignRound
from ar_tuner.algorithms.slices import joined, slices_of
from ar_tuner.algorithms.tunables import at_start
from ar_tuner.logits import tail_of
from ar_tuner.parts import WeightRef
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call

VOCABULARY, WIDTH = 96, 64
QUICK = {"iters": 20, "nsamples": 8, "seqlen": 32, "batch_size": 4, "group_size": 32}


def task(name: str = "W3A16", *, bias: bool = False, tail=None, **settings) -> BlockTask:
    torch.manual_seed(1)
    made = nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(requires_grad=False)
    with torch.no_grad():
        made.weight.mul_(6)
    theirs = [torch.randn(4, 8, WIDTH) * torch.linspace(0.1, 2, WIDTH) for _ in range(2)]
    ours = [x + 0.05 * torch.randn(x.shape) for x in theirs]
    chosen = scheme(name)
    if chosen.weight.granularity.size == (128,):
        chosen = chosen.with_overrides({"group_size": 32})
    found = BlockTask(
        block=made,
        name="lm_head",
        targets=(Target(WeightRef("lm_head", "weight", transposed=False), chosen),),
        inputs=RowBank.of([Call(0, (x,), {}) for x in ours], [4, 4]),
        reference=rows_of(theirs),
        settings=TuneSettings(**{"iters": 60, "batch_size": 4, **settings}),
        report=lambda *_: None,
    )
    found = found if tail is None else dataclasses.replace(found, tail=tail)
    return dataclasses.replace(found, ranges=head_ranges(found))


def sliced(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(slices, "SLICE", rows * WIDTH)


def kl(made: BlockTask, weight) -> float:
    """KL of the float head on float states from another on the quantized ones, in one go."""
    module = made.block
    ours = torch.cat([c.args[0].reshape(-1, WIDTH) for c in made.inputs.calls])
    theirs = torch.cat(list(made.reference))
    bias = 0 if module.bias is None else module.bias
    p = made.tail(theirs @ module.weight.t() + bias).softmax(-1)
    q = made.tail(ours @ weight.t() + bias).softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("init", ["search", "minmax"])
def test_tuning_beats_rounding_to_nearest(sym, init) -> None:
    made = task(scale_init=init)
    target = made.targets[0]
    target = dataclasses.replace(target, scheme=target.scheme.with_overrides({"sym": sym}))
    made = dataclasses.replace(made, targets=(target,))
    result = SignRound().quantize_head(made)
    assert result.loss_after < 0.9 * result.loss_before
    weight = result.weights["lm_head"].dequantize()
    assert result.loss_after == pytest.approx(kl(made, weight), rel=1e-3)
    plain = nearest(target, made.weight(target)).dequantize()
    assert result.loss_before == pytest.approx(kl(made, plain), rel=1e-3)


@pytest.mark.parametrize(
    ("bias", "config"),
    [(False, {}), (True, {}), (True, {"final_logit_softcapping": 4.0, "logits_scaling": 0.5})],
    ids=["plain", "bias", "cap"],
)
def test_the_gradient_is_that_of_the_whole_head_at_once(monkeypatch, bias, config) -> None:
    sliced(monkeypatch, 40)
    made = task(bias=bias, tail=tail_of(SimpleNamespace(**config)))
    head = Head(made, slices_of(made.block.weight.shape, made.targets[0]))
    assert len(head.slices) == 3
    parts = [
        at_start(made.targets[0], head.weight[s], made.settings, energy=None, shared=None)
        for s in head.slices
    ]
    objective = HeadObjective(head, parts)
    loss = objective.backward([1, 6], 0.5)
    assert float(loss) == pytest.approx(objective.error([1, 6]))
    ours = torch.cat([made.inputs.calls[0].args[0][1], made.inputs.calls[1].args[0][2]])
    theirs = torch.cat([made.reference[1], made.reference[6]])
    weight = torch.cat([p.fake_quant().detach() for p in parts]).requires_grad_()
    extra = made.block.bias if bias else torch.zeros(VOCABULARY)
    slow = kl_divergence(
        made.tail(ours @ weight.t() + extra), made.tail(theirs @ made.block.weight.t() + extra)
    )
    (slow * 500).backward()
    assert slow.item() == pytest.approx(loss.item(), rel=1e-5)
    for part, where in zip(parts, head.slices, strict=True):
        expected = torch.autograd.grad(part.fake_quant(), part.offset, weight.grad[where])[0]
        torch.testing.assert_close(part.offset.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["W4A16", "MXFP4", "NVFP4", "INT8", "FP8_STATIC", "FPW8A16", "GGUF:Q4_0"]
)
@pytest.mark.parametrize("algorithm", [SignRound(), OptRtn()], ids=["signround", "opt_rtn"])
def test_slices_give_the_bits_of_the_whole(monkeypatch, name, algorithm) -> None:
    settings = {"iters": 3 if isinstance(algorithm, SignRound) else 0}
    whole = algorithm.quantize_head(task(name, **settings))
    sliced(monkeypatch, 24)
    parts = algorithm.quantize_head(task(name, **settings))
    assert whole.loss_after <= whole.loss_before
    assert parts.loss_after == pytest.approx(whole.loss_after, rel=1e-3)
    same = whole.weights["lm_head"].codes == parts.weights["lm_head"].codes
    # sums in another order may turn the sign of a gradient that is next to nothing
    assert float(same.float().mean()) > (0.999 if settings["iters"] else 0.9999)
    assert parts.weights["lm_head"].shape == (VOCABULARY, WIDTH)


def test_large_vocabularies_see_some_tokens_of_each_minibatch(monkeypatch) -> None:
    made = task()
    monkeypatch.setattr(head_module, "LOGITS", 10 * VOCABULARY)
    head = Head(made, slices_of(made.block.weight.shape, made.targets[0]))
    ours, theirs = head.tokens([0, 1])
    assert ours.shape == theirs.shape == (8, WIDTH)
    drawn = head.tokens([0, 1], torch.Generator().manual_seed(3))[0]
    assert drawn.shape[0] <= 10
    one, two = (SignRound().quantize_head(made) for _ in range(2))
    assert equal(one.weights["lm_head"], two.weights["lm_head"])
    assert one.loss_after < one.loss_before


def test_the_iterate_of_a_head_is_chosen_on_validation_rows() -> None:
    result = SignRound().quantize_head(task(keep="best", validation_rows=2))
    assert result.loss_after < result.loss_before


def test_without_steps_the_head_is_rounded_and_diverged_steps_are_thrown_away() -> None:
    made = task(iters=0)
    plain = nearest(made.targets[0], made.weight(made.targets[0]))
    assert equal(SignRound().quantize_head(made).weights["lm_head"], plain)
    broken = task(iters=2, optimizer="adam", tail=lambda logits: logits * float("nan"))
    result = SignRound().quantize_head(broken)
    assert result.diverged
    assert equal(result.weights["lm_head"], plain)


def test_searched_scales_are_kept_only_where_they_lose_less() -> None:
    made = task("W2A16", iters=0)
    result = OptRtn().quantize_head(made)
    assert result.loss_after < result.loss_before
    exact = nearest(made.targets[0], made.weight(made.targets[0]))
    head = Head(made, slices_of((VOCABULARY, WIDTH), made.targets[0]))
    with torch.no_grad():
        made.block.weight.copy_(exact.dequantize())
    assert judged(head, [exact]) == pytest.approx(OptRtn().quantize_head(made).loss_after, rel=0.3)


def test_rows_that_share_a_scale_stay_together(monkeypatch) -> None:
    sliced(monkeypatch, 20)
    ref = WeightRef("x", "weight", transposed=False)
    tiles = Target(ref, scheme("FP8_BLOCK").with_overrides({"group_size": [16, 16]}))
    assert [s.stop - s.start for s in slices_of((96, WIDTH), tiles)] == [16] * 6
    assert slices_of((96, WIDTH), Target(ref, scheme("FPW8A16"))) == (slice(0, 96),)


def test_slices_that_do_not_share_a_parameter_are_refused() -> None:
    made = task("NVFP4")
    weight = made.weight(made.targets[0])
    parts = [nearest(made.targets[0], weight[:48]), nearest(made.targets[0], weight[48:] * 3)]
    with pytest.raises(TunerError, match="layer x is too large.*global_scale"):
        joined(parts, "x")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 3.0),
        ({"logit_scale": 0.5}, 1.5),
        ({"logits_scaling": 2.0}, 1.5),
        ({"lm_head_multiplier": 2.0}, 6.0),
        ({"final_logit_softcapping": 2.0}, 2 * torch.tanh(torch.tensor(1.5)).item()),
        ({"final_logit_softcapping": None, "logit_scale": "no"}, 3.0),
    ],
)
def test_what_models_do_to_their_logits_is_known(config, expected) -> None:
    tail = tail_of(SimpleNamespace(**config))
    assert float(tail(torch.tensor(3.0))) == pytest.approx(expected)


def test_the_tail_of_gemma_is_what_gemma_computes(model, rows) -> None:
    made = model("gemma2")
    assert made.config.final_logit_softcapping
    seen = []
    handle = made.lm_head.register_forward_hook(lambda module, args, out: seen.append(out))
    logits = made(input_ids=rows[:1]).logits
    handle.remove()
    torch.testing.assert_close(tail_of(made.config)(seen[0]), logits)


def test_a_run_tunes_the_head_after_the_blocks(model, rows) -> None:
    made, seen = model("llama"), []
    before = made.lm_head.weight.clone()
    _, plan = AutoRound(
        made, scheme="W3A16", dataset=rows, quant_lm_head=True, on_event=seen.append, **QUICK
    ).quantize()
    assert plan["lm_head"].quantized
    done = [e for e in seen if isinstance(e, events.BlockDone)]
    assert [e.name for e in done] == ["model.layers.0", "model.layers.1", "lm_head"]
    assert {e.total for e in done} == {3}
    assert done[2].loss_after < done[2].loss_before
    nearest_weight = nearest(
        Target(WeightRef("lm_head", "weight", transposed=False), plan["lm_head"].scheme), before
    ).dequantize()
    assert not torch.equal(made.lm_head.weight, before)
    assert not torch.equal(made.lm_head.weight, nearest_weight)


def test_a_tied_head_stays_as_it_is(model, rows) -> None:
    made = model("qwen3")
    before = made.lm_head.weight.clone()
    _, plan = AutoRound(made, dataset=rows, quant_lm_head=True, **QUICK).quantize()
    assert "shares its weight" in plan["lm_head"].reason
    assert torch.equal(made.lm_head.weight, before)


@pytest.mark.parametrize("recipe", ["default", "opt_rtn", "rtn"])
def test_every_recipe_rounds_the_head(model, rows, sinks, tmp_path, recipe) -> None:
    numbers = {k: v for k, v in QUICK.items() if k != "iters" or recipe == "default"}
    made, checked = model("llama"), []
    job = AutoRound(made, dataset=rows, quant_lm_head=True, recipe=recipe, **numbers)
    job.quantize_and_save(
        tmp_path / "out", format="memory", check=lambda path, of, m: checked.append(of("lm_head"))
    )
    weight = sinks[-1].weights["lm_head"]
    assert equal(checked[0], weight)
    assert torch.equal(weight.dequantize(), made.lm_head.weight)


def test_a_run_killed_at_the_head_ends_in_the_same_bits(model, rows, sinks, tmp_path) -> None:
    class Stop(RuntimeError):
        pass

    def stop(event) -> None:
        if isinstance(event, events.BlockStarted) and event.name == "lm_head":
            raise Stop

    def job(**options):
        return AutoRound(model("llama"), dataset=rows, quant_lm_head=True, **QUICK, **options)

    job().quantize_and_save(tmp_path / "whole", format="memory")
    whole = sinks[-1].weights
    with pytest.raises(Stop):
        job(on_event=stop).quantize_and_save(tmp_path / "out", format="memory")
    job(resume=True).quantize_and_save(tmp_path / "out", format="memory")
    assert set(sinks[-1].weights) == set(whole)
    assert all(equal(sinks[-1].weights[n], whole[n]) for n in whole)


def test_a_head_that_is_run_before_the_last_block_is_refused(model, rows) -> None:
    made = model("llama")
    inner = made.model.forward

    def early(*args, **kwargs):
        made.lm_head(torch.zeros(1, 2, 64))
        return inner(*args, **kwargs)

    made.model.forward = early
    with pytest.raises(TunerError, match="output head lm_head is not run once, after all blocks"):
        AutoRound(made, dataset=rows, quant_lm_head=True, **QUICK).quantize()
