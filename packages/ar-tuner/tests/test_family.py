from __future__ import annotations

import pytest
import torch

from ar_tuner.blocks import find_blocks
from ar_tuner.errors import TunerError
from ar_tuner.registry import find_adapter
from ar_tuner.testing import STEPS, check_family, image_batch, read_known, tiny_model, tiny_rows
from ar_tuner.testing.checkpoints import audit
from ar_tuner.testing.images import calibration_of, other_sample, several
from ar_tuner.testing.walking import check_called, check_walk, difference, silent_weights

pytest.importorskip("transformers")


def test_the_walk_is_compared_with_the_changed_model_and_weights_come_back() -> None:
    model = tiny_model("gemma3_text")
    adapter = find_adapter(model.config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = {"input_ids": tiny_rows(2), "use_cache": False}
    assert check_walk(model, adapter, find_blocks(model, adapter), [batch]) < 1e-4
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_blocks_that_no_batch_calls_are_refused() -> None:
    model = tiny_model("mllama")
    adapter = find_adapter(model.config)
    found = find_blocks(model, adapter)
    text = {"input_ids": tiny_rows(1), "use_cache": False}
    with pytest.raises(TunerError, match="never called: .*layers.1'"):
        check_called(model, adapter, found, [text])
    image = image_batch(model, model)
    assert image is not None
    assert len(check_called(model, adapter, found, [text, image])) == 2


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl", "gemma3", "mllama", "mistral3"])
def test_pixels_are_found_that_the_model_looks_at(kind: str) -> None:
    model = tiny_model(kind)
    batch = image_batch(model, model)
    assert batch is not None
    other = {**batch, "pixel_values": batch["pixel_values"] + 1}
    with torch.no_grad():
        assert difference(model(**batch).logits, model(**other).logits) > 1e-6


def test_a_matrix_that_the_plan_leaves_out_is_found() -> None:
    from ar_schemes import LayerPlan
    from ar_tuner import AutoRound

    model = tiny_model("qwen3_moe")
    plan = AutoRound(model, group_size=32).plan()
    found = find_blocks(model, find_adapter(model.config))
    assert silent_weights(found, plan) == []
    rows = tuple(
        r for r in plan.rows if "experts" not in r.layer.name and "q_proj" not in r.layer.name
    )
    silent = silent_weights(found, LayerPlan(rows, plan.default))
    assert "model.layers.0.self_attn.q_proj.weight" in silent
    assert "model.layers.3.mlp.experts.gate_up_proj" in silent


def test_names_are_compared_but_for_quantized_endings(tmp_path) -> None:
    from safetensors.torch import save_file

    model = tiny_model("llama", num_hidden_layers=1)
    source, made = tmp_path / "source", tmp_path / "made"
    model.save_pretrained(source)
    made.mkdir()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["model.layers.0.mlp.up_proj.qweight"] = state.pop("model.layers.0.mlp.up_proj.weight")
    save_file(state, made / "model.safetensors")
    audit(source, made, model)
    state["model.other.weight"] = state.pop("lm_head.weight")
    save_file(state, made / "model.safetensors")
    with pytest.raises(TunerError, match="missing 1: .'lm_head.weight'.*in excess 1"):
        audit(source, made, model)


def test_known_failures_say_step_and_reason(tmp_path) -> None:
    file = tmp_path / "known.toml"
    file.write_text('["kosmos-2.5"]\nstep = "forward"\nreason = "images"\n')
    assert read_known(file)["kosmos-2.5"]["step"] == "forward"
    file.write_text('[blip]\nstep = "forward"\n')
    with pytest.raises(TunerError, match="blip must have a step and a reason"):
        read_known(file)


def test_a_step_that_fails_ends_the_check_and_is_named() -> None:
    record = check_family("musicgen")
    assert (record.failed, record.facts) == ("build", {})
    assert "musicgen" in record.error
    assert STEPS[0] == "build"


@pytest.mark.parametrize("kind", ["blip", "blip-2", "idefics", "instructblip", "kosmos-2"])
def test_samples_like_one_differ_and_share_a_batch(kind: str) -> None:
    model = tiny_model(kind)
    row = image_batch(model, model)
    assert row is not None
    one, other = (other_sample(row, seed) for seed in (0, 1))
    blind = other_sample(row, 1, text=False)
    assert torch.equal(blind["input_ids"], row["input_ids"])
    assert not torch.equal(one["input_ids"], other["input_ids"])
    with torch.no_grad():
        both = model(**several(row, range(2))).logits
        apart = torch.cat([model(**one).logits, model(**other).logits])
        assert difference(model(**blind).logits, model(**row).logits) > 1e-6
    assert difference(both, apart) < 1e-5


def test_calibration_with_images_makes_a_sample_of_each_record() -> None:
    pytest.importorskip("PIL")
    assert list(calibration_of(None, 3)) == ["dataset"]
    row = {"input_ids": tiny_rows(1), "pixel_values": torch.zeros(1, 3, 4, 4)}
    given = calibration_of(row, 3)
    assert len(given["dataset"]) == 3
    sizes = {record["image"].width for record in given["dataset"]}
    assert len(sizes) == 3  # what tells one sample from another
