"""Checkpoints that cannot be opened are refused with the reason."""

from __future__ import annotations

import json

import pytest

from ar_kernels import KernelError

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


AUTO_ROUND = {"quant_method": "auto-round"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing_format": "auto_round:mlx9"}, r"unknown packing_format .*auto_round:auto_gptq"),
        ({"data_type": "mx_fp", "act_bits": 4}, r"14 layers .*weight_packed of mx_fp4 .* nothing"),
        ({"act_bits": 4, "act_data_type": "nosuch"}, "cannot be opened.*'nosuch' of the activat"),
        ({"act_bits": 1}, "cannot be opened.*activations: int has 2 to 8 bits"),
        ({"act_bits": 8, "act_group_size": 48}, "14 layers.*group48 do not divide 64"),
        ({"act_bits": 8, "act_dynamic": False}, "14 layers.*static, but the files hold no range"),
        ({"bits": 8}, r"14 layers of .*qweight of int8 group32 must have shape"),
        ({"group_size": 64}, "14 layers"),
        ({"group_size": [128, 128], "data_type": "nosuch"}, "data type 'nosuch' is not known"),
        ({"extra_config": {"q_proj": {"bits": 16}}}, r"2 layers .*16 bit, the files hold packed"),
    ],
    ids=[
        "packing",
        "data-type",
        "act-type",
        "act-bits",
        "act-group",
        "act-range",
        "bits",
        "group-size",
        "tile",
        "float-but-packed",
    ],
)  # fmt: skip
def test_a_checkpoint_we_cannot_open_is_refused_with_the_reason(
    tmp_path, change, message, write, opened
) -> None:
    write(tmp_path, AUTO_ROUND)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(KernelError, match=f"(?s){message}"):
        opened(tmp_path)


def test_a_lost_tensor_is_found_before_loading(tmp_path, write, opened) -> None:
    write(tmp_path, AUTO_ROUND)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KernelError, match=r"layers\.1\.mlp\.up_proj: scales .* hold nothing"):
        opened(tmp_path)


def test_float_models_are_not_quantized_while_loading(tmp_path, model_of, opened) -> None:
    model_of("qwen3", tied=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        opened(tmp_path, quantization_config=transformers.AutoRoundConfig())
