"""A head rounded while loading."""

from __future__ import annotations

import pytest
import torch

from ar_kernels import KernelError
from ar_kernels.hf import ask_for
from ar_kernels.hf.head import ENV, RoundedHead
from ar_kernels.native import library

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


AUTO_ROUND = {"quant_method": "auto-round"}
GPTQ = {"quant_method": "gptq"}
NATIVE = pytest.mark.skipif(library.missing() is not None, reason="no native library")
IDS = torch.arange(24).reshape(2, 12)


@NATIVE
def test_only_who_asks_gets_one(tmp_path, monkeypatch, write, opened) -> None:
    reference = write(tmp_path, GPTQ, tied=True)
    plain = opened(tmp_path, dtype=torch.float32)
    assert not isinstance(plain.lm_head, RoundedHead)
    asked = opened(
        tmp_path, dtype=torch.float32, quantization_config=ask_for(method="gptq", head_bits=8)
    )
    assert isinstance(asked.lm_head, RoundedHead)
    assert asked.lm_head.weight is asked.model.embed_tokens.weight
    with torch.no_grad():
        logits, expected = asked(IDS).logits, reference(IDS).logits
    assert 1e-4 < (logits - expected).norm() / expected.norm() < 1e-2
    monkeypatch.setenv(ENV, "4")
    assert opened(tmp_path, dtype=torch.float32).lm_head.bits == 4
    monkeypatch.setenv(ENV, "four")
    with pytest.raises(KernelError, match="is no number of bits"):
        opened(tmp_path, dtype=torch.float32)


@NATIVE
@pytest.mark.parametrize("tied", [True, False])
def test_the_checkpoint_s_head_is_saved(tmp_path, tied: bool, write, opened) -> None:
    write(tmp_path / "a", AUTO_ROUND, tied=tied)
    asked = opened(tmp_path / "a", dtype=torch.float32, quantization_config=ask_for(head_bits=4))
    asked.save_pretrained(tmp_path / "b")
    with torch.no_grad():
        logits, again = (opened(tmp_path / name, dtype=torch.float32)(IDS).logits for name in "ab")
    assert torch.equal(logits, again)
