"""What quantization cost: perplexity, KL divergence and top-1 agreement on held-out data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

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
    return compare_on(reference, candidate, ({"input_ids": rows} for rows in ids.split(batch)))


def compare_on(
    reference: nn.Module,
    candidate: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    never: Collection[int] = (),
) -> Scores:
    """Return how a candidate differs from its reference on model inputs, images among them.

    Args:
        reference: the float model.
        candidate: the quantized one.
        batches: keyword arguments of both models' forward; token ids are [B, T].
        never: tokens that no model is asked to predict, such as those that stand for images.

    Raises:
        TunerError: nothing is predicted, or a model gives no logits for each token.
    """
    kl = same = nll_reference = nll = 0.0
    count = 0
    with torch.inference_mode():
        for inputs in batches:
            ours, theirs = _log_probs(reference, inputs), _log_probs(candidate, inputs)
            theirs = theirs.to(ours.device)
            targets, wanted = _targets(inputs, ours.device, never)
            ours, theirs, targets = ours[wanted], theirs[wanted], targets[wanted][:, None]
            kl += float((ours.exp() * (ours - theirs)).sum())
            same += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
            nll_reference -= float(ours.gather(-1, targets).sum())
            nll -= float(theirs.gather(-1, targets).sum())
            count += targets.numel()
    if count == 0:
        raise TunerError(_NOTHING)
    return Scores(
        ppl_ref=math.exp(nll_reference / count),
        ppl=math.exp(nll / count),
        kl=kl / count,
        top1=same / count,
        tokens=count,
    )


def perplexity(model: nn.Module, ids: Tensor, *, batch: int = 8) -> float:
    """Return the perplexity of a model on rows of token ids [N, T]."""
    return perplexity_on(model, ({"input_ids": rows} for rows in ids.split(batch)))[0]


def perplexity_on(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, never: Collection[int] = ()
) -> tuple[float, int]:
    """Return the perplexity of a model on its inputs (see `compare_on`) and the tokens predicted.

    Raises:
        TunerError: nothing is predicted, or the model gives no logits for each token.
    """
    nll, count = 0.0, 0
    with torch.inference_mode():
        for inputs in batches:
            scores = _log_probs(model, inputs)
            targets, wanted = _targets(inputs, scores.device, never)
            nll -= float(scores[wanted].gather(-1, targets[wanted][:, None]).sum())
            count += int(wanted.sum())
    if count == 0:
        raise TunerError(_NOTHING)
    return math.exp(nll / count), count


def _targets(
    inputs: Mapping[str, Tensor], device: torch.device, never: Collection[int]
) -> tuple[Tensor, Tensor]:
    """Return the tokens to predict [B, T - 1], and which of them count."""
    targets = inputs["input_ids"][:, 1:].to(device)
    wanted = ~torch.isin(targets, torch.tensor(sorted(never), dtype=targets.dtype, device=device))
    mask = inputs.get("attention_mask")
    return targets, wanted if mask is None else wanted & mask[:, 1:].to(device).bool()


def _log_probs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    parameter = next(model.parameters())
    given = {
        k: v.to(parameter.device, parameter.dtype if v.is_floating_point() else None)
        for k, v in inputs.items()
    }
    logits: Tensor = model(**given, use_cache=False).logits
    if logits.shape[1] != given["input_ids"].shape[1]:
        msg = (
            f"the model gives {logits.shape[1]} logits for {given['input_ids'].shape[1]} tokens, "
            "so predictions cannot be told apart; it takes images in place of fewer tokens"
        )
        raise TunerError(msg)
    return torch.log_softmax(logits[:, :-1].float(), -1)


_NOTHING = "the samples hold no token that a model would be asked to predict"
