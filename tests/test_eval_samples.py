"""`ar eval` of models that see: text beside chats with images."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from ar_tuner import AutoRound, TunerError
from ar_tuner.evaluate import compare, compare_on, perplexity_on
from ar_vlm.testing import make_tiny, write_samples

if TYPE_CHECKING:
    from pathlib import Path

WORDS = "what is in the image ? a red blue green square circle on white background small large"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small llava, the same at 3 bits, and chats about drawn images."""
    folder = tmp_path_factory.mktemp("llava")
    source = make_tiny("llava", folder / "source")
    AutoRound(source, scheme="W3A16G32", recipe="rtn").quantize_and_save(folder / "small")
    written = write_samples(folder / "pictures", 3)
    written.rename(folder / "moved.jsonl")  # pictures are then found by --images alone
    (folder / "text.txt").write_text(WORDS * 20)
    return folder


def test_eval_scores_chats_with_images_beside_text(ar, llava) -> None:
    given = ("--text", llava / "text.txt", "--seqlen", 16, "--tokens", 64, "--json")
    chats = ("--samples", llava / "moved.jsonl", "--images", llava / "pictures")
    done = ar("eval", llava / "small", "--against", llava / "source", *given, *chats)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["samples_kl"] > 0
    assert 0 <= found["samples_top1"] <= 1
    assert found["samples_ppl_ref"] != found["samples_ppl"]
    assert found["kl"] > 0
    same = ar("eval", llava / "source", "--against", llava / "source", *given, *chats)
    assert json.loads(same.stdout)["samples_kl"] == pytest.approx(0, abs=1e-6)
    assert json.loads(same.stdout)["samples_top1"] == 1


def test_eval_alone_gives_the_perplexity_on_chats(ar, llava) -> None:
    given = ("--text", llava / "text.txt", "--seqlen", 16, "--tokens", 64, "--nsamples", 1)
    chats = ("--samples", llava / "moved.jsonl", "--images", llava / "pictures")
    done = ar("eval", llava / "small", *given, *chats)
    assert "image-text samples: perplexity" in done.stdout
    wrong = ar("eval", llava / "small", *given, "--samples", llava / "no.jsonl")
    assert wrong.returncode != 0
    assert "no.jsonl" in wrong.stderr


class Table(torch.nn.Module):
    """Predicts from the last token alone, by a table of logits."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(8, 8, generator=generator))

    def forward(self, input_ids, attention_mask=None, use_cache=False):  # noqa: ARG002
        return type("Out", (), {"logits": self.table[input_ids]})()


def test_tokens_that_stand_for_images_and_padding_are_not_predicted() -> None:
    ids = torch.tensor([[1, 7, 7, 2, 3, 4], [1, 2, 5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    one, two = Table(0), Table(1)
    found = compare_on(one, two, [{"input_ids": ids, "attention_mask": mask}], never={7})
    pairs = [(7, 2), (2, 3), (3, 4), (1, 2), (2, 5), (5, 6)]
    p, q = (torch.log_softmax(model.table.detach(), -1) for model in (one, two))
    kl = torch.stack([(p[a].exp() * (p[a] - q[a])).sum() for a, _ in pairs]).mean()
    nll = -torch.stack([q[a, b] for a, b in pairs]).mean()
    assert found.tokens == len(pairs)
    assert found.kl == pytest.approx(float(kl), rel=1e-5)
    assert found.ppl == pytest.approx(float(nll.exp()), rel=1e-5)
    assert perplexity_on(two, [{"input_ids": ids, "attention_mask": mask}], never={7}) == (
        pytest.approx(float(nll.exp()), rel=1e-5),
        len(pairs),
    )
    assert compare(one, two, ids).tokens == ids.shape[0] * (ids.shape[1] - 1)


def test_samples_without_a_token_to_predict_are_refused() -> None:
    ids = torch.tensor([[1, 7, 7]])
    with pytest.raises(TunerError, match="no token that a model would be asked to predict"):
        compare_on(Table(0), Table(1), [{"input_ids": ids}], never={7})
