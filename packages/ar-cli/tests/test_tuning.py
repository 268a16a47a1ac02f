"""Every option of the tuning loop arrives under the name that `AutoRound` knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import ar_cli
from ar_cli.commands import quantize
from ar_cli.main import cli
from ar_cli.main import run as run_main

DEMO = Path(ar_cli.__file__).parent / "demo" / "model"


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Return what `ar quantize` asks for, without doing it."""

    from ar_tuner.settings import make_settings

    def of(*args: str):
        seen = []

        def note(model, output, format, scheme, dataset, settings, **rest):  # noqa: A002
            seen.append(settings)
            return {"verified": True}

        monkeypatch.setattr(quantize, "quantize_one", note)
        done = CliRunner().invoke(
            cli, ["quantize", str(DEMO), "-o", str(tmp_path / "o"), "--json", *args]
        )
        assert done.exit_code == 0, done.output
        return make_settings(seen[0])

    return of


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("--recipe opt-rtn", "recipe", "opt_rtn"),
        ("--iters 7", "iters", 7),
        ("--batch-size 2", "batch_size", 2),
        ("--gradient-accumulate-steps 4", "gradient_accumulate_steps", 4),
        ("--lr 0.01", "lr", 0.01),
        ("--minmax-lr 0.02", "minmax_lr", 0.02),
        ("--lr-scheduler cosine", "lr_scheduler", "cosine"),
        ("--optimizer adam", "optimizer", "adam"),
        ("--enable-adam", "enable_adam", True),
        ("--momentum 0.5", "momentum", 0.5),
        ("--scale-init minmax", "scale_init", "minmax"),
        ("--enable-alg-ext", "enable_alg_ext", True),
        ("--use-best-mse", "not_use_best_mse", False),
        ("--not-use-best-mse", "not_use_best_mse", True),
        ("--use-best-mse --validation-rows 8", "validation_rows", 8),
        ("--use-best-mse --dynamic-max-gap 20", "dynamic_max_gap", 20),
        ("--nblocks 2", "nblocks", 2),
        ("--disable-minmax-tuning", "enable_minmax_tuning", False),
        ("--enable-minmax-tuning", "enable_minmax_tuning", True),
        ("--disable-quanted-input", "enable_quanted_input", False),
        ("--disable-opt-rtn", "disable_opt_rtn", True),
        ("--enable-opt-rtn", "disable_opt_rtn", False),
        ("--to-quant-block-names model.layers", "to_quant_block_names", "model.layers"),
        ("--enable-deterministic-algorithms", "enable_deterministic_algorithms", True),
        ("--seed 3", "seed", 3),
        ("--quant-lm-head", "quant_lm_head", True),
        ("--scale-dtype bf16", "scale_dtype", "bfloat16"),
    ],
)
def test_an_option_arrives(settings, typed, name, value) -> None:
    assert getattr(settings(*typed.split()), name) == value


def test_without_options_all_is_as_the_library_has_it(settings) -> None:
    from ar_tuner.settings import Settings

    assert settings() == Settings()


def test_a_layer_may_be_given_bits_only(settings) -> None:
    assert settings("--layer-config", '{"down_proj": 8}').layer_config == {"down_proj": 8}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--nblocks 0", "nblocks 0 is not allowed"),
        ("--optimizer adma", "Did you mean adam"),
        ("--validation-rows 4", "not_use_best_mse=False"),
        ("--recipe rtn --nblocks 2", "belongs to tuning"),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_work(capsys, tmp_path, typed, message) -> None:
    status = run_main(["quantize", str(DEMO), "-o", str(tmp_path / "o"), *typed.split()])
    assert status == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
