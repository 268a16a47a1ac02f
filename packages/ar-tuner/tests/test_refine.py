"""Stage `distill` on whole models, and the way of a model through a stage."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ar_kernels import equal
from ar_tuner import AutoRound, TunerError, events, job, refine
from ar_tuner.distill import Distill, stage
from ar_tuner.refine import Rows, norm_gains, share_out, wanted_rows
from ar_tuner.stages import ModelResult, ModelTask, StageSettings

QUICK = {
    "iters": 12,
    "nsamples": 8,
    "seqlen": 32,
    "batch_size": 8,
    "group_size": 32,
    "algorithm": "opt_rtn",
    "distill": True,
}


@pytest.fixture
def many() -> torch.Tensor:
    """Token rows [64, 32], every one a document of its own."""
    return torch.randint(0, 128, (64, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _long_steps(monkeypatch) -> None:
    """Steps of the usual length leave no code's margin in as few as there are here."""
    monkeypatch.setattr(stage, "SIZES", stage.Sizes(codes=4e-3, scales=3e-3, gains=2e-3))


@pytest.fixture
def tasks(monkeypatch) -> list[ModelTask]:
    """What the stage is given, as it runs."""
    seen: list[ModelTask] = []
    refined = Distill.refine

    def note(self, task):
        seen.append(task)
        return refined(self, task)

    monkeypatch.setattr(Distill, "refine", note)
    return seen


def lively(made):
    """Return the model with larger weights: a random one predicts next to nothing."""
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(6.0 if "embed" in name or "wte" in name else 4.0)
    return made


def run(made, rows, **options):
    """Return (model, events) of a quantization in memory."""
    seen = []
    AutoRound(lively(made), dataset=rows, on_event=seen.append, **{**QUICK, **options}).quantize()
    return made, seen


def losses(seen) -> tuple[float, float]:
    done = next(e for e in seen if isinstance(e, events.StageDone))
    return done.loss_before, done.loss_after


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_held_out_rows_gain(model, many, tasks, kind) -> None:
    made, seen = run(model(kind), many, scheme="W2A16")
    before, after = losses(seen)
    assert after < 0.99 * before
    progress = [e for e in seen if isinstance(e, events.StageProgress)]
    assert [e.step for e in progress] == list(range(1, 13))
    assert {p.transposed for p in tasks[0].targets} == {kind == "gpt2"}
    gains = norm_gains(made)
    assert gains
    moved = [
        n for n in gains if not torch.equal(made.get_parameter(n), model(kind).get_parameter(n))
    ]
    assert moved == list(gains)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gains_too(model, many, dtype) -> None:
    _, seen = run(model().to(dtype), many, scheme="W2A16")
    before, after = losses(seen)
    assert after < 0.99 * before


@pytest.mark.parametrize("scheme", ["INT8", "MXFP4", "NVFP4", "FP8_STATIC"])
def test_models_with_quantized_activations_are_refined_as_they_will_run(
    model, many, tasks, scheme
) -> None:
    options = {"scheme": scheme, "group_size": None}
    made, seen = run(model(), many, **options)
    before, after = losses(seen)
    assert after <= before
    task = tasks[0]
    assert any(t.scheme.activation is not None for t in task.targets)
    plain = made(input_ids=task.held_out[:2]).logits
    assert not torch.equal(task.logits({}, task.held_out[:2], True), plain)


def test_the_reference_is_the_float_model(model, many, tasks) -> None:
    float_model = lively(model())
    run(model(), many, quant_lm_head=True)
    task = tasks[0]
    wanted = float_model(input_ids=many[:2]).logits
    assert "lm_head.weight" in {t.parameter for t in task.targets}
    gains = {n: float_model.get_parameter(n) for n in task.gains}
    found = task.logits(gains, many[:2], False)
    torch.testing.assert_close(found, wanted)


def test_a_quantized_head_is_refined_with_the_rest(model, many) -> None:
    made, seen = run(model(), many, quant_lm_head=True, scheme="W2A16")
    before, after = losses(seen)
    assert after < before
    assert len(torch.unique(made.lm_head.weight[0, :32])) <= 4


def test_a_result_that_held_out_rows_do_not_gain_by_is_thrown_away(
    model, many, monkeypatch
) -> None:
    alone, _ = run(model(), many, distill=False, algorithm="rtn")
    monkeypatch.setattr(stage, "SIZES", stage.Sizes(30.0, 0.9, 5.0))
    made, seen = run(model(), many, algorithm="rtn")
    before, after = losses(seen)
    assert after == before
    for name, parameter in alone.named_parameters():
        assert torch.equal(made.get_parameter(name), parameter), name


def test_equal_seeds_give_equal_bits_and_others_do_not(model, many) -> None:
    one, two = (run(model(), many)[0] for _ in range(2))
    other, _ = run(model(), many, seed=7)
    state, again = one.state_dict(), two.state_dict()
    assert all(torch.equal(state[k], again[k]) for k in state)
    assert any(not torch.equal(state[k], v) for k, v in other.state_dict().items())


def refined(task: ModelTask, **numbers):
    settings = dataclasses.replace(task.settings, **numbers)
    return Distill().refine(dataclasses.replace(task, settings=settings))


def test_a_stage_goes_on_from_its_state_to_the_same_bits(model, many, tasks) -> None:
    run(model(), many)
    task = tasks[0]
    whole = Distill().refine(task)
    kept = {}

    class Stop(RuntimeError):
        pass

    def save(state, done) -> None:
        kept["state"] = ({k: v.clone() for k, v in state.items()}, done)
        if done == 7:
            raise Stop

    with pytest.raises(Stop):
        Distill().refine(dataclasses.replace(task, save=save))
    steps = []
    rest = dataclasses.replace(
        task, saved=kept["state"], report=lambda step, steps_, loss: steps.append(step)
    )
    resumed = Distill().refine(rest)
    assert steps == list(range(8, task.settings.steps + 1))
    assert resumed.loss_after == whole.loss_after
    assert all(equal(resumed.weights[n], whole.weights[n]) for n in whole.weights)
    assert all(torch.equal(resumed.tensors[n], whole.tensors[n]) for n in whole.tensors)


def test_rows_in_parts_give_the_same_model(model, many, tasks) -> None:
    run(model(), many)
    sizes = []

    def counted(logits):
        def call(replaced, rows, quantized):
            sizes.append(rows.shape[0])
            return logits(replaced, rows, quantized)

        return call

    task = dataclasses.replace(tasks[0], logits=counted(tasks[0].logits))
    whole, _ = refined(task), sizes.clear()
    parts = refined(task, max_logits=32 * 128)
    assert max(sizes) == 1
    assert parts.loss_before == pytest.approx(whole.loss_before, rel=1e-4)
    assert parts.loss_after == pytest.approx(whole.loss_after, rel=0.02)


def test_a_stage_changes_nothing_itself(model, many, tasks) -> None:
    made, _ = run(model(), many)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    rng = torch.get_rng_state()
    Distill().refine(tasks[0])
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_rounding_without_data_can_be_refined(model, many) -> None:
    _, seen = run(model(), many, algorithm="rtn", scheme="W2A16")
    before, after = losses(seen)
    assert after < before


NUMBERS = StageSettings(steps=4, batch_size=2)


def test_no_document_is_on_both_sides() -> None:
    documents = [(i, i + 1) if i % 3 else (i,) for i in range(60)]
    rows = torch.arange(60)[:, None].expand(60, 4)
    found = share_out(rows, documents, 10, NUMBERS)
    sides = [
        {d for r in side[:, 0].tolist() for d in documents[r]}
        for side in (torch.cat([found.walk, found.stage]), found.held_out)
    ]
    assert sides[0].isdisjoint(sides[1])
    assert len(found.walk) == 10
    assert len(found.held_out) >= 1
    assert set(found.walk[:, 0].tolist()).isdisjoint(found.stage[:, 0].tolist())
    assert len(found.all[0]) == len(found.walk) + len(found.stage) + len(found.held_out)


def test_a_stage_without_rows_of_its_own_learns_from_those_of_the_blocks() -> None:
    rows = torch.arange(20)[:, None]
    found = share_out(rows, [(i,) for i in range(20)], 18, NUMBERS)
    assert set(found.walk[:, 0].tolist()) <= set(found.stage[:, 0].tolist())


def test_the_end_of_a_single_document_is_held_out() -> None:
    rows = torch.arange(40)[:, None]
    found = share_out(rows, [(0,)] * 40, 10, NUMBERS)
    assert found.held_out[:, 0].tolist() == [38, 39]
    assert int(found.stage.max()) == 36


def test_rows_that_are_wanted_cover_blocks_stage_and_judge() -> None:
    assert wanted_rows(128, StageSettings(200, 4)) == 128 + 800 + refine.HELD_OUT
    assert [t.shape for t in Rows(torch.ones(3, 2)).all] == [(3, 2)]


def test_too_few_rows_leave_the_stage_out_and_say_so(model, many) -> None:
    _, seen = run(model(), many[:15])
    assert not any(isinstance(e, events.StageStarted) for e in seen)
    notes = [e.text for e in seen if isinstance(e, events.Note) and e.level == "warning"]
    assert "distill is left out: 15 calibration rows are too few to hold any out" in notes


def left_out(seen) -> str:
    assert not any(isinstance(e, events.StageStarted) for e in seen)
    return next(e.text for e in seen if isinstance(e, events.Note) and "left out" in e.text)


def test_a_stage_that_does_not_fit_is_left_out(model, many, monkeypatch) -> None:
    monkeypatch.setattr(refine, "_free", lambda device: 10**5)
    assert "distill is left out: it needs about" in left_out(run(model(), many)[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral"])
def test_scales_alone_gain_and_leave_codes(model, many, tasks, kind) -> None:
    made, seen = run(model(kind), many, scheme="W2A16", distill="scales")
    before, after = losses(seen)
    assert after < before
    task = tasks[0]
    assert task.settings.flat
    for target in task.targets:
        was = target.weight.dequantize().unflatten(1, (-1, 32))
        now = target.view(made.get_parameter(target.parameter)).unflatten(1, (-1, 32))
        scales = target.weight.scale.float().unsqueeze(-1)
        moved = (now * was).sum(-1, keepdim=True) / was.square().sum(-1, keepdim=True) * scales
        torch.testing.assert_close(now / moved, was / scales, rtol=1e-5, atol=1e-5)
        assert not torch.equal(now, was)


@pytest.mark.parametrize("scheme", ["W2A16", "NVFP4"])
def test_recomputed_blocks_give_what_others_do(model, many, tasks, scheme) -> None:
    options = {"scheme": scheme, "group_size": None if scheme == "NVFP4" else 32}
    run(model(), many, **options)
    run(model(), many, distill="scales", **options)
    plain, flat = tasks
    rows = many[:3]
    names = {t.parameter: t.original.float().requires_grad_() for t in plain.targets}
    again = {t.parameter: t.original.float().requires_grad_() for t in plain.targets}
    gains = dict(plain.gains)  # as they were before the stage
    one = plain.logits(names | gains, rows, True)
    two = flat.logits({k: (lambda v=v: v * 1.0) for k, v in again.items()} | gains, rows, True)
    assert torch.equal(one, two)
    for logits in (one, two):
        logits.square().mean().backward()
    for name, tensor in names.items():
        torch.testing.assert_close(again[name].grad, tensor.grad, rtol=1e-5, atol=1e-8)


def test_short_memory_leaves_codes_where_they_are(model, many, monkeypatch, tasks) -> None:
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    monkeypatch.setattr(refine, "_free", lambda device: weights * 12)
    _, seen = run(model(), many)
    assert tasks[0].settings.flat
    notes = [e.text for e in seen if isinstance(e, events.Note)]
    assert any("distill leaves codes as they are: it needs about" in n for n in notes)


def test_rows_are_taken_in_parts_where_activations_would_not_fit(model, many, tasks) -> None:
    run(model(), many, scheme="W2A16")
    task = tasks[0]
    small = dataclasses.replace(task.settings, max_saved=1)
    latents = [stage.latent_of(t) for t in task.targets]
    assert stage._part(task, latents) == task.settings.batch_size
    one = dataclasses.replace(task, settings=small)
    assert stage._part(one, latents) == 1
    parts, whole = Distill().refine(one), Distill().refine(task)
    assert parts.loss_after == pytest.approx(whole.loss_after, rel=1e-2)


def test_free_memory_is_told_in_bytes() -> None:
    assert 10**7 < refine._free(torch.device("cpu")) < 10**13


def test_a_model_that_predicts_nothing_is_not_refined(model, many) -> None:
    made = model().model  # the decoder without a head
    assert "predicts no tokens" in left_out(run(made, many)[1])


def test_norm_gains_are_those_of_the_text_decoder(model) -> None:
    assert norm_gains(model()) == (
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "nosuch"}, "unknown algorithm 'nosuch'.*signround"),
        ({"algorithm": "distill"}, "unknown algorithm 'distill'"),
        ({"algorithm": "rtn", "stage": "nosuch"}, "unknown stage 'nosuch'.*distill"),
        ({"stage": "distill", "distill": True}, "leave one out"),
        ({"distill": "yes"}, "distill 'yes' is not allowed"),
        ({"recipe": "rtn", "distill": True}, "distill True belongs to tuning"),
        ({"recipe": "rtn", "algorithm": "signround"}, "algorithm 'signround' belongs to tuning"),
        ({"recipe": "rtn", "stage": "distill"}, "stage 'distill' belongs to tuning"),
    ],
)
def test_what_cannot_follow_is_refused_before_work(model, options, message) -> None:
    with pytest.raises(TunerError, match=message):
        AutoRound(model(), **options)


def test_a_stage_may_be_switched_off_where_there_is_none(model) -> None:
    job = AutoRound(model(), recipe="rtn", distill=False, algorithm="rtn")
    assert job.settings.chosen.stage is None


def test_a_stage_of_others_may_return_as_little_as_it_likes(model, many, monkeypatch) -> None:
    class Halve:
        name = "halve"

        def refine(self, task: ModelTask) -> ModelResult:
            return ModelResult(tensors={"model.norm.weight": task.gains["model.norm.weight"] / 2})

    alone, _ = run(model(), many, distill=False, algorithm="rtn")
    monkeypatch.setattr(job, "stage", lambda name: Halve())
    made, seen = run(model(), many, algorithm="rtn")
    before, after = alone.state_dict(), made.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"model.norm.weight"}
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"] / 2)
    done = next(e for e in seen if isinstance(e, events.StageDone))
    assert (done.name, done.loss_before, done.loss_after) == ("halve", None, None)


def test_gains_without_a_name_in_the_files_stay(model, many, tasks, monkeypatch) -> None:
    names = job.source_names

    def fewer(request, prepared):
        return {k: v for k, v in names(request, prepared).items() if k != "model.norm.weight"}

    monkeypatch.setattr(job, "source_names", fewer)
    run(model(), many)
    assert len(tasks[0].gains) == 4
    assert "model.norm.weight" not in tasks[0].gains


def test_a_model_that_text_cannot_go_through_as_a_whole_is_not_refined(
    model, many, monkeypatch
) -> None:
    monkeypatch.setattr("ar_tuner.adapters.GenericAdapter.entry", lambda self, whole: whole.model)
    assert "cannot be run on text" in left_out(run(model(), many)[1])
