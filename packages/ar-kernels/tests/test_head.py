"""Output heads in fewer bits, made while a model is opened."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ar_kernels import KernelError
from ar_kernels.hf.head import ENV, GROUPS, RoundedHead, asked_bits, round_head
from ar_kernels.native import library

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    library.missing() is not None, reason="the native library is not built"
)
# round to nearest of normal weights, in groups: a quarter of the step's size for each bit less
OFF = {4: 0.12, 5: 0.06, 6: 0.03, 8: 0.01}


@pytest.mark.parametrize("bits", GROUPS)
@pytest.mark.parametrize("inputs", [256, 96, 80])
def test_a_rounded_head_is_near_the_float_one(bits: int, inputs: int) -> None:
    torch.manual_seed(0)
    given = nn.Linear(inputs, 70)
    head = RoundedHead.rounding(given, bits)
    x = torch.randn(3, inputs)
    expected = given(x)
    assert 0 < (head(x) - expected).norm() < OFF[bits] * expected.norm()
    assert head.weight is given.weight
    assert list(head.state_dict()) == ["weight", "bias"]
    x.requires_grad_()
    head(x).sum().backward()
    assert x.grad is not None
    assert f"computed in {bits} bits" in repr(head)


def test_parts_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    given = nn.Linear(64, 300, bias=False)
    whole = RoundedHead.rounding(given, 8)
    monkeypatch.setattr("ar_kernels.hf.head._ROWS", 128)
    parts = RoundedHead.rounding(given, 8)
    assert parts.meta == whole.meta
    assert torch.equal(parts.blob, whole.blob)


def test_heads_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(KernelError, match="a head of 3 bits"):
        RoundedHead.rounding(nn.Linear(64, 8), 3)
    with pytest.raises(KernelError, match="multiples of 16"):
        RoundedHead.rounding(nn.Linear(40, 8), 8)


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=8,
    )
    model = transformers.LlamaForCausalLM(config)
    monkeypatch.setattr("ar_kernels.hf.head.library.missing", lambda: "a compiler")
    with pytest.raises(KernelError, match="missing: a compiler"):
        round_head(model, 8)


def test_the_width_is_asked_for_here_or_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_bits(None) is None
    monkeypatch.setenv(ENV, "6")
    assert asked_bits(None) == 6
    assert asked_bits(8) == 8
    monkeypatch.setenv(ENV, "six")
    with pytest.raises(KernelError, match=r"no number of bits: use one of \[4, 5, 6, 8, 16\]"):
        asked_bits(None)
