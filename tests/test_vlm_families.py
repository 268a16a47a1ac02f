"""Small models of families that see, on their whole way with images: tuned, written, read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from ar_tuner import AutoRound
from ar_tuner.testing import tiny_model
from ar_vlm import VlmError
from ar_vlm.testing import FAMILIES, check, check_images, missing_package
from ar_vlm.testing.further import FURTHER

TRIED = (*FURTHER, "qwen3_vl", "mllama")


@pytest.mark.parametrize("family", TRIED)
def test_a_family_is_tuned_with_images_and_sees_after_reading_back(family, tmp_path: Path) -> None:
    if (needed := missing_package(family)) is not None:
        pytest.skip(f"the image processor of {family} needs {needed}")
    record = check_images(family, tmp_path)
    assert record.blocks == 4
    assert record.worst <= 1e-4 < record.changed


def test_a_model_that_does_not_look_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(check, "_grey", dict)
    with pytest.raises(VlmError, match="llava: the logits do not depend on the image"):
        check_images("llava", tmp_path)


def test_logits_that_differ_are_refused(tmp_path: Path, monkeypatch) -> None:
    plain = check.reload

    def source_again(path, kind):
        return plain(path.parent / "source", kind)

    monkeypatch.setattr(check, "reload", source_again)
    with pytest.raises(VlmError, match="llava: logits differ by"):
        check_images("llava", tmp_path)


def test_families_that_need_torchvision_say_so() -> None:
    needing = {name for name, family in FAMILIES.items() if family.torchvision}
    assert needing == {
        *("cohere2_vision", "llama4", "phi4_multimodal", "kimi_k25", "molmo2", "lfm2_vl"),
    }
    assert {missing_package(name) for name in FAMILIES if name not in needing} == {None}


def test_the_page_has_every_family() -> None:
    page = (Path(__file__).parents[1] / "docs" / "images.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    needs = {row[0].removeprefix("| "): row[2].strip() for row in rows if len(row) > 5}
    del needs["family"]
    assert needs == {
        name: "torchvision" if family.torchvision else "" for name, family in FAMILIES.items()
    }
    assert "fails" not in page


def test_voices_go_along_with_the_weights(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("qwen2_5_omni").save_pretrained(source)
    torch.save({"Chelsie": {"bos_token": 1}}, source / "spk_dict.pt")
    job = AutoRound(source, recipe="rtn", group_size=32, model_dtype="float32")
    made = job.quantize_and_save(tmp_path / "made").path
    kind = transformers.Qwen2_5OmniForConditionalGeneration
    opened = kind.from_pretrained(made, local_files_only=True)  # its own: it wants the voices
    assert opened.speaker_map == {"Chelsie": {"bos_token": 1}}
