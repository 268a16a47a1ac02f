"""Folding through a run: checkpoints, resume, the stage."""

from __future__ import annotations

import copy

import pytest
import torch

from ar_tuner import AutoRound, TunerError
from ar_tuner.stages import ModelResult

QUICK = {"nsamples": 8, "seqlen": 32, "batch_size": 4, "bits": 2, "group_size": 32, "fold": True}


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "rtn"},
        {"recipe": "opt_rtn"},
        {"recipe": "fast", "iters": 2},
        {"algorithm": "signround", "iters": 2},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_every_algorithm_takes_it_and_the_checkpoint_is_the_model(
    model, rows, sinks, tmp_path, options, uneven
) -> None:
    made = uneven(model())
    floats = copy.deepcopy(made.state_dict())
    job = AutoRound(made, dataset=rows, **{**QUICK, **options})
    job.quantize_and_save(tmp_path / "out", format="memory")
    sink = sinks[-1]
    moved = [k for k, v in sink.tensors.items() if "norm" in k and not torch.equal(v, floats[k])]
    assert moved
    assert all("layernorm" in k for k in moved)
    written = model().requires_grad_(requires_grad=False)
    state = {**sink.tensors, **{f"{k}.weight": w.dequantize() for k, w in sink.weights.items()}}
    written.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(written(rows).logits, made(rows).logits)


def test_a_bias_that_changed_with_its_rows_is_written(model, rows, sinks, tmp_path) -> None:
    options = {"attention_bias": True}
    made, written = model(**options), model(**options)
    attention = made.model.layers[1].self_attn
    attention.v_proj.bias.copy_(torch.linspace(-1, 1, 32))
    attention.v_proj.weight[3] *= 50
    attention.o_proj.weight[:, [3, 19]] /= 50
    before = attention.v_proj.bias.clone()
    AutoRound(made, dataset=rows, recipe="opt_rtn", **QUICK).quantize_and_save(
        tmp_path / "out", format="memory"
    )
    sink, name = sinks[-1], "model.layers.1.self_attn.v_proj.bias"
    assert not torch.equal(sink.tensors[name], before)
    state = {**sink.tensors, **{f"{k}.weight": w.dequantize() for k, w in sink.weights.items()}}
    written.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(written(rows).logits, made(rows).logits)


def test_folding_without_it_changes_nothing_but_rounding(model, rows, uneven) -> None:
    """At 8 bits little is lost either way: a fold that did not cancel would show."""
    logits = []
    made = uneven(model())
    with torch.no_grad():
        logits.append(made(rows).logits)
    for on in (False, True):
        options = {**QUICK, "bits": 8, "fold": on, "recipe": "opt_rtn"}
        quantized, _ = AutoRound(copy.deepcopy(made), dataset=rows, **options).quantize()
        with torch.no_grad():
            logits.append(quantized(rows).logits)
    plain, folded = ((x - logits[0]).square().mean() for x in logits[1:])
    assert folded < 4 * plain


def test_a_killed_run_goes_on_with_what_was_folded(model, rows, sinks, tmp_path, uneven) -> None:
    class Killed(BaseException):
        pass

    def kill(event) -> None:
        if event.to_dict()["kind"] == "block_started" and event.index == 1:
            raise Killed

    options = {**QUICK, "recipe": "fast", "iters": 2}
    AutoRound(uneven(model()), dataset=rows, **options).quantize_and_save(
        tmp_path / "whole", format="memory"
    )
    whole = sinks[-1]
    job = AutoRound(uneven(model()), dataset=rows, on_event=kill, **options)
    with pytest.raises(Killed):
        job.quantize_and_save(tmp_path / "out", format="memory")
    job = AutoRound(uneven(model()), dataset=rows, resume=True, **options)
    job.quantize_and_save(tmp_path / "out", format="memory")
    resumed = sinks[-1]
    assert set(whole.tensors) == set(resumed.tensors)
    assert all(torch.equal(whole.tensors[k], resumed.tensors[k]) for k in whole.tensors)
    assert all(torch.equal(whole.weights[k].codes, resumed.weights[k].codes) for k in whole.weights)


@pytest.mark.parametrize(
    "options", [{}, {"token_weights": True, "block_steps": 2}], ids=["", "all"]
)
def test_blocks_that_come_from_disk_come_back_folded(
    model, rows, sinks, tmp_path, options, uneven
) -> None:
    uneven(model()).save_pretrained(tmp_path / "float")
    logits = []
    for low in (True, False):
        job = AutoRound(
            tmp_path / "float",
            dataset=rows,
            recipe="fast",
            iters=2,
            low_cpu_mem_usage=low,
            **QUICK,
            **options,
        )
        written = job.quantize_and_save(tmp_path / f"out{low}", format="memory")
        with torch.no_grad():
            logits.append(written.model(rows).logits)
    one, two = [s for s in sinks if s.state == "committed"]
    assert set(one.tensors) == set(two.tensors)
    assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors)
    assert all(torch.equal(one.weights[k].codes, two.weights[k].codes) for k in one.weights)
    assert torch.equal(*logits)


@pytest.mark.parametrize("scheme", ["W2A16", "MXFP4"])
def test_the_stage_starts_from_the_folded_model(  # noqa: PLR0913
    model, sinks, tmp_path, monkeypatch, uneven, scheme
) -> None:
    many = torch.randint(0, 128, (64, 32), generator=torch.Generator().manual_seed(1))
    made = uneven(model())
    with torch.no_grad():
        float_logits = made(many[:4]).logits
    teachers = []

    class Look:
        name = "look"

        def refine(self, task):
            with torch.no_grad():
                teachers.append(task.logits({}, many[:4], False))  # noqa: FBT003
            return ModelResult()

    monkeypatch.setattr("ar_tuner.job.stage", lambda name: Look())
    said = {"scheme": "MXFP4", "bits": None, "group_size": None, "fold": None}
    options = {**QUICK, "iters": 2, "recipe": "light", **(said if scheme == "MXFP4" else {})}
    AutoRound(made, dataset=many, **options).quantize_and_save(tmp_path / "out", format="memory")
    error = (teachers[0] - float_logits).square().mean()
    assert error < 1e-6 * float_logits.square().mean()
    state = sinks[-1].tensors
    gains = {k: v for k, v in made.state_dict().items() if "norm" in k}
    assert all(torch.equal(state[k], v) for k, v in gains.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": "yes"}, "fold 'yes' is not allowed"),
        ({"fold": True, "nblocks": 2}, "fold looks at one block at a time"),
    ],
)
def test_what_cannot_be_folded_is_refused_before_work(model, options, message) -> None:
    with pytest.raises(TunerError, match=message):
        AutoRound(model(), **options)
