"""What may be asked of the tuning loop, and what becomes of it."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from ar_kernels import equal
from ar_tuner import AutoRound, TunerError, events
from ar_tuner.algorithms.base import TuneSettings
from ar_tuner.determinism import deterministic
from ar_tuner.recipes import RECIPES
from ar_tuner.settings import Settings, make_settings

QUICK = {"iters": 4, "nsamples": 8, "seqlen": 32, "batch_size": 4, "group_size": 32}


def test_recipes_have_the_numbers_of_auto_round() -> None:
    def row(name: str) -> tuple[object, ...]:
        r = RECIPES[name]
        return r.iters, r.nsamples, r.seqlen, r.batch_size, r.lr, r.algorithm, r.stage

    assert {name: row(name) for name in RECIPES} == {
        "best": (1000, 512, 2048, 8, None, "second_order", "distill"),
        "default": (200, 128, 2048, 8, None, "second_order", "distill"),
        "light": (50, 128, 2048, 8, 5e-3, "second_order", "distill"),
        "fast": (4, 128, 2048, 8, None, "second_order", None),
        "rtn": (0, 1, 2048, 8, None, "rtn", "distill"),
        "opt_rtn": (0, 128, 2048, 8, None, "opt_rtn", "distill"),
    }
    assert Settings(recipe="opt-rtn").chosen == dataclasses.replace(RECIPES["opt_rtn"], stage=None)


def test_settings_say_what_follows_the_blocks() -> None:
    assert Settings().chosen.stage == "distill"
    assert Settings(distill=False).chosen.stage is None
    assert Settings(stage="mine").chosen.stage == "mine"
    assert Settings(recipe="fast", distill=True).chosen.stage == "distill"
    assert Settings(algorithm="signround").chosen.stage is None
    assert Settings(momentum=0.5).chosen.stage is None
    assert Settings(momentum=0.5).chosen.algorithm == "signround"
    assert Settings(momentum=0.5, distill=True).chosen.stage == "distill"
    assert Settings(iters=0).chosen.stage is None


def test_the_stage_gets_more_rows_where_there_is_more_to_gain() -> None:
    def rows(**facts: object) -> int:
        numbers = RECIPES["default"].stage_settings(1, **facts)  # type: ignore[arg-type]
        return numbers.steps * numbers.batch_size

    assert rows(bits=4) < rows(bits=2) < rows(bits=8, activations=True)


def test_without_steps_scales_are_searched_unless_that_is_switched_off() -> None:
    assert Settings(iters=0).chosen.algorithm == "opt_rtn"
    assert Settings(iters=0, disable_opt_rtn=True).chosen.algorithm == "rtn"
    assert Settings(disable_opt_rtn=True).chosen.algorithm == "second_order"


def test_the_default_loop_is_that_of_the_default_settings() -> None:
    assert Settings().tuning() == TuneSettings(iters=200)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"enable_adam": True}, {"optimizer": "adam"}),
        ({"optimizer": "adam"}, {"optimizer": "adam"}),
        ({"momentum": 0.9}, {"momentum": 0.9}),
        ({"lr_scheduler": "cosine"}, {"lr_scheduler": "cosine"}),
        ({"gradient_accumulate_steps": 4}, {"accumulate": 4}),
        ({"enable_alg_ext": True}, {"loss": "suppressed", "frozen_super_scales": True}),
        ({"not_use_best_mse": False}, {"keep": "best"}),
        (
            {"not_use_best_mse": False, "validation_rows": 16, "dynamic_max_gap": 50},
            {"keep": "best", "validation_rows": 16, "patience": 50},
        ),
        ({"enable_minmax_tuning": False}, {"minmax_tuning": False}),
        ({"minmax_lr": 0.01, "lr": 0.02}, {"minmax_lr": 0.01, "lr": 0.02}),
        ({"recipe": "light"}, {"iters": 50, "lr": 5e-3}),
        ({"recipe": "opt_rtn", "disable_opt_rtn": False}, {"iters": 0, "search_wide": True}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_settings_reach_the_loop(given, expected) -> None:
    made = Settings(**given).tuning()
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "adma"}, "unknown optimizer 'adma'. Did you mean adam"),
        ({"lr_scheduler": "lienar"}, "unknown lr_scheduler 'lienar'. Did you mean linear"),
        ({"scale_init": 5}, "unknown scale_init '5'"),
        ({"momentum": 1.0}, "momentum 1.0 is not allowed: use a number from 0"),
        ({"momentum": float("nan")}, "momentum nan is not allowed"),
        ({"momentum": "0.9"}, "momentum '0.9' is not allowed"),
        ({"nblocks": 0}, "nblocks 0 is not allowed: use a whole number of at least 1"),
        ({"nblocks": True}, "nblocks True is not allowed"),
        ({"gradient_accumulate_steps": 1.5}, "gradient_accumulate_steps 1.5 is not allowed"),
        ({"validation_rows": -1}, "validation_rows -1 is not allowed"),
        ({"dynamic_max_gap": -2}, "dynamic_max_gap -2 is not allowed"),
        ({"seed": "x"}, "seed 'x' is not allowed"),
        ({"enable_alg_ext": "yes"}, "enable_alg_ext 'yes' is not allowed: use True or False"),
        ({"disable_opt_rtn": 1}, "disable_opt_rtn 1 is not allowed"),
        ({"enable_adam": True, "momentum": 0.5}, "momentum 0.5 belongs to optimizer 'sign'"),
        ({"enable_alg_ext": True, "scale_init": "minmax"}, "starts from searched scales"),
        ({"validation_rows": 8}, "give not_use_best_mse=False too"),
        ({"dynamic_max_gap": 8}, "give not_use_best_mse=False too"),
        ({"recipe": "rtn", "iters": 5}, "recipe 'rtn' rounds to nearest, without steps"),
        ({"recipe": "opt_rtn", "disable_opt_rtn": True}, "choose recipe 'rtn'"),
        ({"recipe": "rtn", "disable_opt_rtn": False}, "choose recipe 'opt_rtn'"),
        ({"iters": 0, "nblocks": 2}, "nblocks 2 belongs to tuning"),
        ({"recipe": "rtn", "enable_alg_ext": True}, "enable_alg_ext True belongs to tuning"),
        ({"enable_norm_bias_tuning": True}, "enable_norm_bias_tuning is not supported"),
        ({"enable_lfq": True}, "enable_lfq is not supported"),
        ({"scale_dtype": "fp64"}, "unknown scale_dtype 'fp64'"),
        ({"recipe": 5}, "unknown recipe '5'"),
        ({"iters": True}, "iters True is not allowed"),
        ({"lr": "0.1"}, "lr '0.1' is not allowed"),
        ({"layer_config": "down_proj"}, "layer_config 'down_proj' is not allowed: use a dict"),
        ({"ignore_layers": 5}, "ignore_layers 5 is not allowed: use names in a list"),
        ({"to_quant_block_names": [1]}, "to_quant_block_names \\[1\\] is not allowed"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_a_value_that_cannot_be_is_refused(given, message) -> None:
    with pytest.raises(TunerError, match=message):
        make_settings(given)


def test_what_is_not_done_may_be_switched_off() -> None:
    assert make_settings({"enable_norm_bias_tuning": False, "iters": 3}) == Settings(iters=3)


def test_none_means_the_default() -> None:
    unset = {"layer_config": None, "gradient_accumulate_steps": None, "lr_scheduler": None}
    assert make_settings(unset) == Settings()


def test_short_names_of_types_are_understood() -> None:
    assert Settings(scale_dtype="bf16").scale_dtype == "bfloat16"
    assert Settings(scale_dtype=torch.float32).scale_dtype == "float32"


def run(model, rows, kind="llama", **options):
    seen: list[events.Event] = []
    made = model(kind)
    job = AutoRound(made, dataset=rows, on_event=seen.append, **{**QUICK, **options})
    job.quantize()
    return made, seen


@pytest.mark.parametrize(
    "options",
    [
        {"enable_adam": True},
        {"nblocks": 2},
        {"gradient_accumulate_steps": 2, "batch_size": 2},
        {"enable_alg_ext": True, "scheme": "W2A16"},
        {"not_use_best_mse": False, "validation_rows": 2, "dynamic_max_gap": 2},
        {"scale_dtype": "fp32"},
        {"enable_minmax_tuning": False, "enable_quanted_input": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_runs_and_loses_less_than_rounding(model, rows, options) -> None:
    made, seen = run(model, rows, **{"iters": 12, **options})
    done = [e for e in seen if isinstance(e, events.BlockDone)]
    assert all(e.loss_after <= e.loss_before for e in done)
    assert any(e.loss_after < e.loss_before for e in done)
    assert torch.isfinite(made(input_ids=rows).logits).all()


def test_more_rows_held_out_than_there_are_is_refused_before_tuning(model, rows) -> None:
    seen: list[events.Event] = []
    job = AutoRound(
        model(), dataset=rows, not_use_best_mse=False, validation_rows=8, on_event=seen.append,
        **QUICK,
    )  # fmt: skip
    with pytest.raises(TunerError, match="validation_rows 8 leaves none of the 8 calibration"):
        job.quantize()
    assert not any(isinstance(e, events.BlockStarted) for e in seen)


def test_opt_rtn_beats_rtn_and_never_looks_at_quantized_blocks(model, rows) -> None:
    numbers = {k: v for k, v in QUICK.items() if k != "iters"}
    losses, weights = [], []
    for chain in (True, False):
        made, seen = run(
            model, rows, scheme="W3A16", recipe="opt_rtn", enable_quanted_input=chain,
            iters=None, **numbers,
        )  # fmt: skip
        done = [e for e in seen if isinstance(e, events.BlockDone)]
        assert all(e.loss_after < e.loss_before for e in done)
        losses.append([e.loss_after for e in done])
        weights.append(made.state_dict())
    assert losses[0] == losses[1]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize("options", [{"iters": 0}, {"recipe": "opt_rtn", "iters": None}])
def test_wide_integers_need_no_calibration_unless_forced(model, rows, options) -> None:
    made, seen = run(model, rows, scheme="W8A16", **options)
    assert not any(isinstance(e, events.CalibrationReady) for e in seen)
    forced, seen = run(model, rows, scheme="W8A16", disable_opt_rtn=False, **options)
    assert any(isinstance(e, events.CalibrationReady) for e in seen)
    ours, theirs = made.state_dict(), forced.state_dict()
    assert any(not torch.equal(ours[k], theirs[k]) for k in ours)


def test_layers_of_mixed_width_are_searched_where_that_gains(model, rows, sinks, tmp_path) -> None:
    def weights(recipe: str):
        job = AutoRound(
            model(), dataset=rows, recipe=recipe, group_size=32, nsamples=8, seqlen=32,
            layer_config={"down_proj": 8},
        )  # fmt: skip
        job.quantize_and_save(tmp_path / recipe, format="memory")
        return sinks[-1].weights

    plain, found = weights("rtn"), weights("opt_rtn")
    same = {name.rpartition(".")[2] for name in plain if equal(plain[name], found[name])}
    assert same == {"down_proj"}


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_algorithms_last_as_long_as_the_run(model, rows, before) -> None:
    seen: list[bool] = []
    torch.use_deterministic_algorithms(before, warn_only=before)
    try:
        job = AutoRound(
            model(), dataset=rows, enable_deterministic_algorithms=True, **QUICK,
            on_event=lambda _: seen.append(torch.are_deterministic_algorithms_enabled()),
        )  # fmt: skip
        job.quantize()
        assert torch.are_deterministic_algorithms_enabled() is before
        assert torch.is_deterministic_algorithms_warn_only_enabled() is before
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert any(seen)


def test_a_variable_of_the_environment_is_as_before(monkeypatch) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False)

    def failing() -> None:
        with deterministic(enabled=True):
            assert os.environ[name]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert name not in os.environ
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(name, ":16:8")
    with deterministic(enabled=True):
        assert os.environ[name] == ":16:8"
    assert os.environ[name] == ":16:8"
    with deterministic(enabled=False):
        assert not torch.are_deterministic_algorithms_enabled()
