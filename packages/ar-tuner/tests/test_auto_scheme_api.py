from __future__ import annotations

import json

import pytest
import torch

from ar_schemes import SchemeError
from ar_tuner import AutoRound, AutoScheme, TunerError
from ar_tuner.auto_scheme import choose
from ar_tuner.auto_scheme.choose import moved
from ar_tuner.auto_scheme.scorers.fisher import Fisher

OPTIONS = ("W2A16G32", "W4A16G32", "W8A16G32")


def job(model, rows, *, listen=None, options=OPTIONS, avg_bits=3.5, settings=None, **asked):
    auto = AutoScheme(avg_bits, options, nsamples=4, seqlen=16, **{"cache": False} | asked)
    return AutoRound(
        model, scheme=auto, dataset=rows, on_event=listen, iters=1, nsamples=4, seqlen=16,
        **settings or {},
    )  # fmt: skip


def test_the_chosen_plan_is_an_ordinary_plan_and_goes_through_the_tuner(model, rows) -> None:
    events = []
    settings = {"distill": False}
    request = job(model(), rows, listen=events.append, settings=settings)
    plan = request.plan()
    assert plan.bits_per_weight <= 3.5
    assert len({r.scheme.name for r in plan.quantized}) > 1
    choice = request.chooser.choices[0]
    assert choice.bits == pytest.approx(plan.bits_per_weight)
    kinds = [e.kind for e in events]
    assert kinds.count("scheme_chosen") == 1
    stages = {(e.stage, e.done == e.total) for e in events if e.kind == "scoring_progress"}
    assert stages == {("scoring", False), ("scoring", True), ("probing", False), ("probing", True)}
    assert all(e.eta_seconds is not None for e in events if e.kind == "scoring_progress")
    assert request.chooser.probes
    tuned, used = request.quantize()
    assert used == plan
    q, k = (tuned.get_submodule(f"model.layers.0.self_attn.{n}_proj") for n in "qk")
    for module, name in ((q, "q"), (k, "k")):
        bits = plan[f"model.layers.0.self_attn.{name}_proj"].scheme.weight.bits
        assert module.weight[0, :32].unique().numel() <= 2**bits


def test_the_choice_is_a_function_of_model_text_and_seed(model, rows) -> None:
    first = job(model(), rows)
    assert first.plan() == job(model(), rows).plan()
    assert first.front() == job(model(), rows).front()
    other = job(model(), rows, seed=7)
    assert (
        other.front()["choices"][0]["predicted_loss"]
        != first.front()["choices"][0]["predicted_loss"]
    )


def test_a_saved_plan_is_a_layer_config_of_the_same_plan(model, rows, tmp_path) -> None:
    options = ("W2A16G32", {"bits": 5, "group_size": 32, "sym": False}, "MXFP4")
    rules = {"layer_config": {"layers.0.self_attn.o_proj": {"bits": 3, "group_size": 32}}}
    rules |= {"ignore_layers": "layers.1.self_attn.v_proj", "quant_lm_head": True}
    request = job(model(), rows, options=options, avg_bits=4.5, settings=rules, shared_layers=[])
    plan = request.plan()
    request.save_plan(tmp_path / "plan.json")
    saved = json.loads((tmp_path / "plan.json").read_text())
    for scheme in ("W4A16", "MXFP4"):  # whatever the default is
        again = AutoRound(model(), scheme=scheme, layer_config=saved, quant_lm_head=True).plan()
        for row in plan.rows:
            other = again[row.layer.name].scheme
            assert (other.weight, other.activation) == (row.scheme.weight, row.scheme.activation)
    request.save_front(tmp_path / "front.json")
    front = json.loads((tmp_path / "front.json").read_text())
    assert front == request.front()
    assert front["choices"][0]["front"][0]["predicted_loss"] > 0
    assert front["options"] == list(request.chooser.asked.schemes)


def test_several_averages_come_from_one_scoring(model, rows, monkeypatch) -> None:
    runs = []
    inner = Fisher.values
    monkeypatch.setattr(Fisher, "values", lambda self, task: runs.append(1) or inner(self, task))
    request = job(model(), rows, avg_bits=[2.8, 4.0, 8.0])
    plans = request.plans()
    assert runs == [1]
    assert [round(p.bits_per_weight, 1) <= t for p, t in zip(plans, (2.8, 4.0, 8.0), strict=True)]
    assert plans[0].bits_per_weight < plans[1].bits_per_weight < plans[2].bits_per_weight
    losses = [c.loss for c in request.chooser.choices]
    assert losses == sorted(losses, reverse=True)
    assert request.plan() == plans[0]
    assert len(AutoRound(model(), scheme="W4A16G32").plans()) == 1


def test_scores_are_kept_and_used_again_for_more_options(
    model, rows, tmp_path, monkeypatch
) -> None:
    path = tmp_path / "scores.json"
    job(model(), rows, cache=path, options=OPTIONS[:2]).plan()
    scored = []
    inner = Fisher.values

    def watched(self, task):
        scored.extend(task.missing(layer).keys() for layer in task.layers)
        return inner(self, task)

    monkeypatch.setattr(Fisher, "values", watched)
    again = job(model(), rows, cache=path)
    assert again.front()["choices"] == job(model(), rows).front()["choices"]
    assert {frozenset(o) for o in scored[:14]} == {frozenset({"W8A16G32"})}
    scored.clear()
    job(model(), rows, cache=path, avg_bits=5.0).plan()
    assert scored == []
    with pytest.raises(TunerError, match="text"):
        job(model(), rows[:2], cache=path).plan()


def test_scoring_that_was_killed_goes_on_to_the_same_scores(model, rows, tmp_path) -> None:
    class Killed(Exception):
        pass

    def kill(event):
        if event.kind == "scoring_progress" and event.done == 1:
            raise Killed

    path = tmp_path / "scores.json"
    with pytest.raises(Killed):
        job(model(), rows, cache=path, listen=kill).plan()
    half = json.loads(path.read_text())["values"]
    assert {name.split(".")[2] for name in half} == {"1"}
    assert job(model(), rows, cache=path).front() == job(model(), rows).front()


def test_scores_go_to_the_users_cache_unless_told_otherwise(
    model, rows, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    job(model(), rows, cache=None).plan()
    assert len(list((tmp_path / "ar" / "scores").glob("*.json"))) == 1


def test_without_calibration_nothing_is_measured(model, rows) -> None:
    request = job(model(), rows, calibrate=False)
    request.plan()
    assert request.chooser.probes == ()
    rough = job(model(), rows, method="delta_loss")
    rough.plan()  # its scores are no divergences
    assert rough.chooser.probes == ()


def test_mistakes_are_found_before_weights_are_read_or_scored(model, rows, monkeypatch) -> None:
    monkeypatch.setattr(Fisher, "values", lambda self, task: pytest.fail("scored"))
    for asked, error, said in (
        ({"avg_bits": 2.0}, TunerError, "less than the options allow"),
        ({"options": ("W2A16G32", "W4A16")}, SchemeError, "option W4A16"),
        ({"shared_layers": [["nowhere"]]}, TunerError, "matches no layer"),
    ):
        with pytest.raises(error, match=said):
            job(model(), rows, **asked).plan()


def test_a_plan_is_drafted_with_every_option_in_it(model, rows, monkeypatch) -> None:
    monkeypatch.setattr(Fisher, "values", lambda self, task: pytest.fail("scored"))
    draft = job(model(), rows).draft()
    assert {r.scheme.name for r in draft.quantized} == set(OPTIONS)


def test_numbers_of_one_scheme_do_not_go_with_options(model, rows) -> None:
    with pytest.raises(TunerError, match="group_size belong to one scheme"):
        job(model(), rows, settings={"group_size": 64})


def test_one_scheme_for_all_has_no_front(model) -> None:
    with pytest.raises(TunerError, match="no front"):
        AutoRound(model(), scheme="W4A16G32").front()


def test_a_size_is_met_although_the_rest_depends_on_the_choice(model, rows, monkeypatch) -> None:
    from ar_schemes import PlanSize
    from ar_tuner.auto_scheme import terrain

    def by_mix(format, plan, config, floats):
        """Every change of scheme from layer to layer costs a header of 100 bytes."""
        layers = {r.layer.name: int(r.stored_bits) // 8 for r in plan.quantized}
        names = [r.scheme.name for r in plan.quantized]
        changes = sum(a != b for a, b in zip(names, names[1:], strict=False))
        return PlanSize(layers, 5000 + 100 * changes)

    monkeypatch.setattr(terrain, "measure_plan", by_mix)
    least = 5000 + sum(la for la in by_mix("", job(model(), rows).draft(), {}, {}).layers.values())
    request = job(model(), rows, avg_bits=None, target_size=least)
    request.write_as("anything")
    request.plan()
    assert least - 3000 < request.chooser.choices[0].bytes <= least


def test_scoring_can_be_elsewhere_and_comes_back(monkeypatch) -> None:
    tiny = torch.nn.Linear(2, 2)
    went = []
    monkeypatch.setattr(choose, "checked_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(tiny, "to", lambda device: went.append(str(device)))
    with moved(tiny, "cuda:7"):
        assert went == ["meta"]
    assert went == ["meta", "cpu"]
    with moved(tiny, None):
        assert went == ["meta", "cpu"]


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(TunerError, match="cannot be used here"), moved(torch.nn.Linear(2, 2), "no"):
        pass
