"""Models that see and whose code lies beside their weights: nothing runs without consent."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from ar_kernels.linear import QuantLinear
from ar_tuner import AutoRound, TunerError
from ar_vlm import Inputs, read_samples
from ar_vlm.testing import make_tiny, write_samples

if TYPE_CHECKING:
    from pathlib import Path

CODE = """from pathlib import Path

from transformers import LlavaConfig, LlavaForConditionalGeneration

with (Path.home() / "ran.txt").open("a") as file:
    file.write("ran")


class TheirConfig(LlavaConfig):
    model_type = "theirs"


class TheirModel(LlavaForConditionalGeneration):
    config_class = TheirConfig
"""
OPTIONS: dict[str, Any] = {
    **{"scheme": "W4A16", "group_size": 32, "iters": 2, "nsamples": 4, "seqlen": 48},
    **{"batch_size": 2, "algorithm": "signround", "calibration": "image"},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    """A home directory in which the code says that it ran."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    return tmp_path / "home"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = make_tiny("llava", tmp_path / "source")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")  # under the names of the class itself
    (folder / "modeling_theirs.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "TheirConfig", "AutoModelForImageTextToText": "TheirModel"}
    config |= {"model_type": "theirs", "architectures": ["TheirModel"]}
    config["auto_map"] = {auto: f"modeling_theirs.{name}" for auto, name in classes.items()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_does_not_run_without_consent(source, home, tmp_path) -> None:
    data = write_samples(tmp_path / "samples", 4)
    job = AutoRound(source, dataset=data, **OPTIONS)
    with pytest.raises(TunerError, match="type 'theirs'.*trust it.*trust_remote_code=True"):
        job.quantize_and_save(tmp_path / "out")
    assert not list(home.iterdir())
    assert not (tmp_path / "out").exists()


def test_with_consent_it_is_tuned_with_images_and_opened_again(source, home, tmp_path) -> None:
    data = write_samples(tmp_path / "samples", 5)
    job = AutoRound(source, dataset=data, trust_remote_code=True, **OPTIONS)
    written = job.quantize_and_save(tmp_path / "out")
    assert (home / "ran.txt").exists()
    assert (written.path / "modeling_theirs.py").read_text() == CODE
    opened = transformers.AutoModelForImageTextToText.from_pretrained(
        written.path, trust_remote_code=True, dtype=torch.float32
    )
    layer = opened.get_submodule("model.language_model.layers.0.mlp.up_proj")
    assert isinstance(layer, QuantLinear)
    inputs = Inputs.from_pretrained(written.path, trust_remote_code=True)
    batch = inputs.build(read_samples(data)[4])
    with torch.no_grad():
        one, other = (m.eval()(**batch).logits for m in (written.model.float(), opened))
    assert torch.allclose(one, other, atol=1e-4 * float(one.abs().max()))
