"""A head that computes with its weight in 12 bits, as long as that is the weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ar_kernels.hf import ask_for, decoding
from ar_kernels.hf.compact_head import CompactHead
from ar_kernels.hf.head import ENV, RoundedHead
from ar_kernels.native import compact, library
from ar_kernels.native.modules import NativeLinear

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    library.missing() is not None, reason="the native library is not built"
)
AUTO_ROUND = {"quant_method": "auto-round"}
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(autouse=True)
def _heads_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "WORTH", 1e9)


def head_of(features: int = 70, columns: int = 128) -> CompactHead:
    torch.manual_seed(0)
    given = nn.Linear(columns, features, bias=False).bfloat16().requires_grad_(False)
    made = CompactHead.compacting(NativeLinear.of(given))
    assert made is not None
    return made


def is_right(head: nn.Linear) -> bool:
    x = torch.randn(1, head.in_features).bfloat16()
    expected = nn.functional.linear(x.double(), head.weight.detach().double())
    return bool((head(x) - expected).norm() < 5e-3 * expected.norm())


@pytest.mark.parametrize("tied", [True, False])
def test_a_bf16_head_is_compact_unasked(tmp_path, monkeypatch, tied, write, opened) -> None:
    write(tmp_path, AUTO_ROUND, tied=tied)
    monkeypatch.setenv(ENV, "16")
    plain = opened(tmp_path, dtype=torch.bfloat16)
    monkeypatch.delenv(ENV)
    model = opened(tmp_path, dtype=torch.bfloat16)
    assert type(plain.lm_head) is NativeLinear
    assert type(model.lm_head) is CompactHead
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert "12 bits" in repr(model.lm_head)
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.inference_mode():
        both = [m(IDS[:1, :4], logits_to_keep=1).logits for m in (plain, model)]
        assert torch.allclose(*both, rtol=1e-2, atol=1e-2)
        assert torch.equal(*(m(IDS).logits for m in (plain, model)))  # many rows
    model.save_pretrained(tmp_path / "b")
    again = opened(tmp_path / "b", dtype=torch.bfloat16)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_other_heads_stay(tmp_path, monkeypatch, write, opened) -> None:
    write(tmp_path, AUTO_ROUND)
    wide = opened(tmp_path, dtype=torch.float32)
    assert type(wide.lm_head) is NativeLinear
    asked = ask_for(head_bits=8)
    rounded = opened(tmp_path, dtype=torch.bfloat16, quantization_config=asked)
    assert type(rounded.lm_head) is RoundedHead
    own = opened(tmp_path, dtype=torch.bfloat16, quantization_config=ask_for(head_bits=16))
    assert type(own.lm_head) is NativeLinear
    monkeypatch.setattr(compact, "WORTH", 0.85)
    assert type(opened(tmp_path, dtype=torch.bfloat16).lm_head) is NativeLinear  # 64 columns
    monkeypatch.setenv(decoding.ENV, "plain")
    assert type(opened(tmp_path, dtype=torch.bfloat16).lm_head) is nn.Linear


def test_it_goes_on_with_a_weight_nobody_touched() -> None:
    head = head_of()
    for _ in range(3):
        assert is_right(head)
    assert head.blob is not None


@pytest.mark.parametrize("how", ["in place", "data", "another", "loaded"])
def test_a_changed_weight_is_seen(how: str) -> None:
    head = head_of()
    if how == "in place":
        head.weight.add_(1)
    elif how == "data":  # as adapters are merged
        head.weight.data += torch.randn_like(head.weight)
    elif how == "another":
        head.weight = nn.Parameter(torch.randn_like(head.weight), requires_grad=False)
    else:
        head.load_state_dict({"weight": torch.randn_like(head.weight)})
    assert is_right(head)
    assert head.blob is None
    assert "12 bits" not in repr(head)


def test_copies_and_casts_compute_with_their_own_weight() -> None:
    head = head_of()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):  # noqa: S301 - our own
        other.weight.data.mul_(2)
        assert is_right(other)
    wide = copy.deepcopy(head).float()
    assert wide.blob is None
    x = torch.randn(1, 128)
    expected = x @ head.weight.float().t()
    assert torch.allclose(wide(x), expected, atol=1e-4)
    assert is_right(head)
    assert head.blob is not None


def test_gradients_and_autocast_go_by_the_weight() -> None:
    head = head_of()
    x = torch.randn(2, 128, dtype=torch.bfloat16, requires_grad=True)
    head(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(x).dtype == torch.bfloat16
    graph = torch.compile(head, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(graph(x), head(x), rtol=2e-2, atol=2e-2)
