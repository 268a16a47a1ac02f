"""Norms of a model compute by ar-kernels for the time of a call, and as before after it."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from ar_kernels.hf.decoding import rms_norms
from ar_kernels.native import library, norming
from ar_tuner.norms import fast_norms
from ar_tuner.testing import tiny_model

pytestmark = pytest.mark.skipif(
    library.missing() is not None, reason="the native library is not built"
)


def test_logits_and_gradients_stay_and_weights_may_be_replaced(monkeypatch) -> None:
    model = tiny_model("qwen3").float()
    norms = rms_norms(model)
    assert len(norms) > 4
    calls = []
    plain = norming.norm
    monkeypatch.setattr(norming, "norm", lambda *a: calls.append(a[0].shape) or plain(*a))
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    name = f"{norms[0].name}.weight"
    gain = (model.get_parameter(name).detach() * 1.5).requires_grad_()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        logits = functional_call(model, {name: gain}, (ids,)).logits
        return logits.detach(), torch.autograd.grad(logits.square().sum(), gain)[0]

    expected = run()
    assert not calls
    with fast_norms(norms):
        found = run()
    assert len(calls) == len(norms)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all("forward" not in one.module.__dict__ for one in norms)
    run()
    assert len(calls) == len(norms)


def test_what_is_not_served_goes_its_own_way() -> None:
    model = tiny_model("qwen3").half()
    norm = rms_norms(model)[0]
    x = torch.randn(3, norm.module.weight.shape[0]).half()
    expected = norm.module(x)
    with fast_norms([norm]):
        assert torch.equal(norm.module(x), expected)
