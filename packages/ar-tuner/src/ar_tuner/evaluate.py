"""What quantization cost: perplexity, KL divergence and top-1 agreement on held-out text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Scores:
    """A candidate beside its reference.

    Attributes:
        ppl_ref, ppl: perplexity of reference and candidate.
        kl: mean over predicted tokens of KL(reference || candidate), in nats.
        top1: share of predicted tokens where both put the same token first.
        tokens: number of predicted tokens.
    """

    ppl_ref: float
    ppl: float
    kl: float
    top1: float
    tokens: int


def windows(tokenizer: Any, text: str, *, seqlen: int, tokens: int | None = None) -> Tensor:
    """Return a text as rows of token ids [N, seqlen], no overlap, the remainder left out.

    Raises:
        TunerError: the text is shorter than one row.
    """
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    usable = len(ids) if tokens is None else min(len(ids), tokens)
    rows = usable // seqlen
    if rows == 0:
        msg = f"the text holds {len(ids)} tokens, less than one window of {seqlen}"
        raise TunerError(msg)
    return ids[: rows * seqlen].view(rows, seqlen)


def compare(reference: nn.Module, candidate: nn.Module, ids: Tensor, *, batch: int = 8) -> Scores:
    """Return how a candidate differs from its reference on rows of token ids [N, T]."""
    kl = same = nll_reference = nll = 0.0
    count = 0
    with torch.inference_mode():
        for rows in ids.split(batch):
            ours, theirs = _log_probs(reference, rows), _log_probs(candidate, rows)
            targets = rows[:, 1:, None].to(ours.device)
            theirs = theirs.to(ours.device)
            kl += float((ours.exp() * (ours - theirs)).sum())
            same += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
            nll_reference -= float(ours.gather(-1, targets).sum())
            nll -= float(theirs.gather(-1, targets).sum())
            count += targets.numel()
    return Scores(
        ppl_ref=math.exp(nll_reference / count),
        ppl=math.exp(nll / count),
        kl=kl / count,
        top1=same / count,
        tokens=count,
    )


def perplexity(model: nn.Module, ids: Tensor, *, batch: int = 8) -> float:
    """Return the perplexity of a model on rows of token ids [N, T]."""
    nll, count = 0.0, 0
    with torch.inference_mode():
        for rows in ids.split(batch):
            scores = _log_probs(model, rows)
            targets = rows[:, 1:, None].to(scores.device)
            nll -= float(scores.gather(-1, targets).sum())
            count += targets.numel()
    return math.exp(nll / count)


def _log_probs(model: nn.Module, rows: Tensor) -> Tensor:
    device = next(model.parameters()).device
    logits = model(input_ids=rows.to(device), use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.float(), -1)
