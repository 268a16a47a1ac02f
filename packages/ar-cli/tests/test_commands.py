"""Every command through click's runner, on the embedded model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import ar_cli
from ar_cli.demo import run as demo
from ar_cli.main import cli
from ar_cli.main import run as run_main
from ar_schemes import ArError

DEMO = Path(ar_cli.__file__).parent / "demo" / "model"


def test_quantize_prints_facts_as_json(ar, tmp_path) -> None:
    done = ar("quantize", DEMO, "--recipe", "rtn", "-o", tmp_path / "out", "--json", "--bits", 8)
    facts = json.loads(done.stdout)
    assert facts["verified"] is True
    assert facts["scheme"] == "W8A16G128"
    assert facts["bytes"] < facts["bytes_before"]


def test_plan_joins_blocks_or_lists_every_layer(ar) -> None:
    joined = ar("plan", DEMO).output
    assert "model.layers.*.mlp.down_proj" in joined
    every = ar("plan", DEMO, "--all").output
    assert "model.layers.3.mlp.down_proj" in every
    facts = json.loads(ar("plan", DEMO, "--json", "--asym").stdout)
    assert facts["quantized"] == 28
    assert facts["bits_per_weight"] == pytest.approx(4 + 20 / 128)


def test_plan_takes_rules(ar, tmp_path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text('{"down_proj": "W8A16"}')
    for given in (rules, '{"down_proj": "W8A16"}'):
        facts = json.loads(ar("plan", DEMO, "--json", "--layer-config", given).stdout)
        found = {r["name"]: r["scheme"] for r in facts["layers"]}
        assert found["model.layers.0.mlp.down_proj"] == "W8A16"


@pytest.mark.parametrize("text", ["{", "nowhere.json", "[1]"])
def test_rules_that_are_no_object_are_refused(ar, text, tmp_path) -> None:
    file = tmp_path / "rules.json"
    file.write_text("[1]")
    done = ar("plan", DEMO, "--layer-config", file if text == "[1]" else text)
    assert done.exit_code == 2
    assert "--layer-config" in done.output


def test_inspect_tells_format_schemes_and_size(ar, rtn) -> None:
    text = ar("inspect", rtn).output
    assert "auto_round" in text
    assert "W4A16G128" in text
    assert "gptq" in ar("inspect", rtn, "--all").output
    assert json.loads(ar("inspect", rtn, "--json").stdout)["layers"][0]["layout"] == "gptq"
    assert "float" in ar("inspect", DEMO).output


def test_verify_ends_with_status_0_or_1(ar, rtn, tmp_path) -> None:
    assert ar("verify", rtn).exit_code == 0
    assert "28 compared bit by bit" in ar("verify", rtn, "--against", rtn).output
    assert json.loads(ar("verify", rtn, "--json").stdout)["ok"] is True
    assert "NOT sound" in ar("verify", tmp_path).output


def test_eval_measures_against_the_float_model(ar, rtn) -> None:
    args = ("--tokens", 2048, "--seqlen", 64, "--json")
    found = json.loads(ar("eval", rtn, "--against", DEMO, *args).stdout)
    assert 0 < found["kl"] < 1
    assert found["top1"] > 0.5
    alone = json.loads(ar("eval", rtn, *args).stdout)
    assert alone["ppl"] == pytest.approx(found["ppl"])
    assert "perplexity" in ar("eval", rtn, "--tokens", 2048, "--seqlen", 64).output


def test_eval_refuses_what_it_cannot_read(ar, rtn, tmp_path) -> None:
    assert "cannot be read" in ar("eval", rtn, "--text", tmp_path / "no.txt").output
    assert "--dtype" in ar("eval", rtn, "--dtype", "int8").output
    bare = tmp_path / "bare"
    bare.mkdir()
    assert ar("eval", bare).exit_code == 2
    short = tmp_path / "short.txt"
    short.write_text("few words")
    assert "less than one window" in ar("eval", rtn, "--text", short).output


def test_generate_is_greedy_unless_asked(ar, rtn) -> None:
    args = ("generate", rtn, "--prompt", "Return the", "--max-new-tokens", 6)
    assert ar(*args).stdout == ar(*args).stdout
    warm = (*args, "--temperature", 1.5, "--seed", 3)
    assert ar(*warm).stdout == ar(*warm).stdout


@pytest.mark.parametrize(
    "args",
    [("--seqlen", 1), ("--tokens", -5), ("--device", "nonsense")],
    ids=["seqlen", "tokens", "device"],
)
def test_eval_refuses_numbers_and_devices_that_cannot_be(ar, rtn, args) -> None:
    done = ar("eval", rtn, *args)
    assert done.exit_code == 2
    assert str(args[1]) in done.output


def test_generate_refuses_an_empty_prompt_and_an_unknown_device(ar, rtn) -> None:
    done = ar("generate", rtn, "--prompt", "")
    assert done.exit_code == 2
    assert "--prompt" in done.output
    assert ar("generate", rtn, "--prompt", "x", "--device", "nonsense").exit_code == 2


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_a_wrong_dataset_is_refused_before_work(ar, command, tmp_path) -> None:
    output = () if command == "plan" else ("-o", tmp_path / "out")
    done = ar(command, DEMO, "--dataset", "default:nmu=3", *output)
    assert done.exit_code == 2
    assert "unknown dataset option 'nmu'. Did you mean num?" in done.output
    assert list(tmp_path.iterdir()) == []


def test_the_help_shows_how_sets_are_combined(ar) -> None:
    from ar_tuner.calibration.grammar import OPTIONS

    shown = " ".join(ar("quantize", "--help").output.split())
    assert "names, separated by ','. Options follow a name after ':'" in shown
    assert all(option in shown for option in OPTIONS)


def test_the_next_commands_can_be_typed_as_they_stand(ar, tmp_path) -> None:
    out = tmp_path / "with space"
    lines = ar("quantize", DEMO, "--recipe", "rtn", "-o", out, "--no-verify").output.splitlines()
    typed = [shlex.split(line) for line in lines[lines.index("Next:") + 1 :]]
    assert [words[words.index("ar_cli") + 1] for words in typed] == ["eval", "inspect", "generate"]
    for words in typed:
        assert ar(*words[words.index("ar_cli") + 1 :]).exit_code == 0


def test_the_demo_keeps_the_recipe_and_gives_both_columns_the_same_layers(
    tmp_path, monkeypatch
) -> None:
    seen: list[dict[str, object]] = []

    def note(model, output, format, scheme, dataset, settings, **rest):  # noqa: A002
        seen.append(settings)
        return {"bytes": 1, "seconds": 1.0, "bytes_before": 2, "verified": True}

    monkeypatch.setattr(demo, "quantize_one", note)
    monkeypatch.setattr(demo, "_scores", lambda _: [{}, {}, {}])
    rules = {"layer_config": {"down_proj": "W8A16"}, "ignore_layers": "o_proj"}
    demo.run_demo(tmp_path, "auto_round", "W4A16", None, {"recipe": "light", **rules}, as_json=True)
    from ar_tuner import AutoRound

    tuned, nearest = seen
    assert AutoRound(DEMO, **tuned).settings.chosen.iters == 50
    assert {k: nearest[k] for k in rules} == rules


def test_a_chat_without_a_template_is_refused(ar, rtn) -> None:
    done = ar("generate", rtn, "--prompt", "x", "--chat")
    assert done.exit_code == 2
    assert "no chat template" in done.output


@pytest.mark.parametrize("command", ["schemes", "formats", "backends", "plugins"])
def test_a_listing_is_a_table_or_json(ar, command) -> None:
    assert ar(command).exit_code == 0
    told = json.loads(ar(command, "--json").stdout)
    assert isinstance(told, dict if command == "formats" else list)


def test_backends_of_a_checkpoint_say_what_runs_each_kind_of_layer(ar, rtn) -> None:
    told = json.loads(ar("backends", rtn, "--dtype", "float32", "--json").stdout)
    assert sum(kind["count"] for kind in told) == 28
    for kind in told:
        assert kind["backend"]
        assert kind["verdicts"][kind["backend"]].startswith("chosen: best usable")
        assert {"dense", "reference", "cpu_aten"} <= kind["verdicts"].keys()
    shown = ar("backends", rtn, "--explain").output
    assert "verdict" in shown
    assert "usable, priority 0" in shown


def test_backends_explain_every_scheme_and_a_device_that_is_not_there(ar) -> None:
    told = {k["layers"]: k for k in json.loads(ar("backends", "--explain", "--json").stdout)}
    assert {"W4A16", "MXFP4", "NVFP4", "FP8_STATIC", "INT8"} <= told.keys()
    assert "activations quantized before it" in told["MXFP4"]["why"]
    assert "not on cuda" in ar("backends", "--explain", "--device", "cuda").output


def test_doctor_tells_versions_and_the_archiver(ar) -> None:
    facts = json.loads(ar("doctor", "--json").stdout)
    assert facts["torch"]
    assert "archiver that `ar rcs` gets" in facts
    assert "no problems found" in ar("doctor").output


def test_an_unknown_command_names_the_nearest(capsys) -> None:
    assert run_main(["quantise"]) == 2
    assert "Did you mean quantize" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(capsys, monkeypatch) -> None:
    def interrupt(**kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupt)
    assert run_main(["quantize", "x"]) == 130
    assert "--resume" in capsys.readouterr().err
    assert run_main(["schemes"]) == 130
    assert "--resume" not in capsys.readouterr().err


def test_the_status_of_a_command_is_that_of_the_program(tmp_path) -> None:
    assert run_main(["verify", str(tmp_path)]) == 1
    assert run_main(["schemes"]) == 0


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        ([], {}),
        (["--distill"], {"distill": True}),
        (["--no-distill"], {"distill": False}),
        (["--distill-scales"], {"distill": "scales"}),
        (
            ["--algorithm", "signround", "--stage", "mine"],
            {"algorithm": "signround", "stage": "mine"},
        ),
        (
            ["--fold", "--token-weights", "--block-steps", "60"],
            {"fold": True, "token_weights": True, "block_steps": 60},
        ),
        (["--no-fold"], {"fold": False}),
        (["--clip-activations"], {"clip_activations": True}),
        (["--no-clip-activations"], {"clip_activations": False}),
    ],
)
def test_algorithm_and_stage_reach_the_job(ar, monkeypatch, tmp_path, typed, given) -> None:
    seen = {}

    class Job:
        def __init__(self, model, **options) -> None:
            seen.update(options)
            raise ArError("enough")

    monkeypatch.setattr("ar_tuner.AutoRound", Job)
    ar("quantize", "model", "-o", tmp_path / "out", *typed)
    names = ("algorithm", "distill", "stage", "fold", "token_weights", "block_steps")
    names = (*names, "clip_activations")
    assert {k: v for k, v in seen.items() if k in names} == given


def test_an_unknown_algorithm_is_refused_with_those_there_are(tmp_path, capsys) -> None:
    given = ["--algorithm", "nosuch", "-o", str(tmp_path / "out")]
    assert run_main(["quantize", str(DEMO), *given]) == 2
    said = capsys.readouterr().err
    assert "unknown algorithm 'nosuch'" in said
    assert "signround" in said
    assert list(tmp_path.iterdir()) == []


AUTO = ("--options", "W2A16,W4A16,W8A16", "--score-samples", 2)


@pytest.fixture
def scores(tmp_path, monkeypatch) -> Path:
    """Where scores are kept: not in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AR_AUTO_SCHEME_SEQLEN", "32")
    return tmp_path / "cache" / "ar" / "scores"


def test_plan_chooses_and_shows_the_front(ar, scores, tmp_path) -> None:
    files = ("--save-plan", tmp_path / "plan.json", "--save-front", tmp_path / "front.json")
    done = ar("plan", DEMO, "--avg-bits", 3, *AUTO, *files)
    assert done.exit_code == 0, done.output
    assert "auto_scheme" in done.stdout
    assert "predicted loss" in done.stdout
    assert "chosen" in done.stdout
    assert "scoring" in done.stderr
    assert len(list(scores.glob("*.json"))) == 1
    front = json.loads((tmp_path / "front.json").read_text())
    facts = json.loads(ar("plan", DEMO, "--target-bits", 3, *AUTO, "--json").stdout)
    assert facts["choices"] == front["choices"]
    assert front["choices"][0]["bits"] <= 3
    saved = json.loads((tmp_path / "plan.json").read_text())
    again = json.loads(ar("plan", DEMO, "--json", "--layer-config", tmp_path / "plan.json").stdout)
    assert {r["name"]: r["scheme"] for r in again["layers"] if r["name"] in saved} == saved


def test_quantize_meets_a_size(ar, scores, tmp_path) -> None:
    source = sum(f.stat().st_size for f in DEMO.glob("*.safetensors"))
    target = f"{source * 0.6 / 1e6:.3f}MB"
    done = ar("quantize", DEMO, "--target-size", target, *AUTO, "--recipe", "rtn",
              "--shared-layers", "q_proj,k_proj", "--json", "-o", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["verified"] is True
    assert 0.5 * source < facts["bytes"] <= 0.6 * source
    assert "x W" in facts["scheme"]
    assert "chosen:" in done.stderr
    front = json.loads((tmp_path / "out.run" / "front.json").read_text())
    picks = front["choices"][0]["layers"]
    assert picks["model.layers.0.self_attn.q_proj"] == picks["model.layers.0.self_attn.k_proj"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--options", "W4A16"), "--options needs --avg-bits or --target-size"),
        (("--avg-bits", 3), "need --options"),
        (("--avg-bits", 3, "--scheme", "W4A16", *AUTO), "--scheme is one scheme for all"),
        (("--avg-bits", 3, "--target-size", "1GB", *AUTO), "not both"),
        (("--avg-bits", 1, *AUTO), "less than the options allow"),
        (("--avg-bits", 3, *AUTO, "--score-method", "guess"), "unknown method 'guess'"),
        (("--avg-bits", 3, *AUTO, "--bits", 4), "bits belong to one scheme"),
    ],
)
def test_a_mixed_precision_that_cannot_be_is_refused(typed, said, scores, capsys) -> None:
    status = run_main(["plan", str(DEMO), *map(str, typed)])
    assert status == 2
    assert said in capsys.readouterr().err
    assert not scores.exists()


def test_layers_can_be_told_not_to_share(ar, scores) -> None:
    done = ar("plan", DEMO, "--avg-bits", 3, *AUTO, "--shared-layers", "none", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["choices"][0]["bits"] <= 3


def test_the_demo_takes_one_scheme(ar, tmp_path) -> None:
    done = ar("quantize", "--demo", "--avg-bits", 3, *AUTO, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "--demo takes one --scheme" in done.output


def test_models_lists_families_with_what_was_verified(ar) -> None:
    done = ar("models", "--type", "llama")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert any(line.split()[:3] == ["llama", "text", "yes"] for line in lines)
    assert "model.layers" in done.output
    facts = json.loads(ar("models", "--json").stdout)
    rows = {row["type"]: row for row in facts["families"]}
    assert len(rows) > 250
    assert rows["llama"]["formats"] == ["auto_round"]
    assert all(row["reason"] for row in rows.values() if not row["passes"])


def test_models_says_what_would_happen_with_a_checkpoint(ar, tmp_path) -> None:
    told = ar("models", DEMO).output
    assert "verified with a tiny model" in told
    assert "layers to be quantized (W4A16): 28" in told
    facts = json.loads(ar("models", DEMO, "--json").stdout)
    assert (facts["blocks"], facts["lists"]) == (4, ["model.layers"])
    done = ar("models", tmp_path)
    assert done.exit_code == 2
    assert "no config.json" in done.output
