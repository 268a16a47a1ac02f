"""Quantize a vision-language model with images, write it, read it back, ask it the same questions.

Everything is made on the spot: a small random model, a tokenizer trained on a few sentences, the
processor of its family, drawn pictures. With a model of your own, leave out `make_tiny` and
`write_samples` and name its directory and your samples.

    python quantize.py WORKDIR [FAMILY]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

import ar_kernels  # noqa: F401 - lets transformers open quantized checkpoints
from ar_tuner import AutoRound
from ar_vlm import Inputs, read_samples
from ar_vlm.testing import make_tiny, write_samples

TOKENS = 8
"""Length of an answer."""


def main(work: Path, family: str = "llava") -> dict[str, Any]:
    """Run the whole way in a folder and return what came out of it."""
    model = make_tiny(family, work / "model")
    shown = write_samples(work / "calibration", 16)
    asked = write_samples(work / "questions", 4, first=100)

    losses: list[tuple[str, float, float]] = []

    def listen(event: Any) -> None:
        if event.kind == "block_done" and event.loss_after is not None:
            losses.append((event.name, event.loss_before, event.loss_after))

    job = AutoRound(
        model,
        scheme="W4A16",
        group_size=32,
        dataset=str(shown),  # samples.jsonl; the pictures lie beside it
        calibration="mixed",  # one sample in four shows images, the rest is text
        quant_nontext_module=True,  # the vision tower and the projector, too
        nsamples=16,
        seqlen=64,
        batch_size=4,
        iters=20,
        on_event=listen,
        overwrite=True,
    )
    tuned, path = job.quantize_and_save(work / "quantized", format="auto_round")

    again = AutoModelForImageTextToText.from_pretrained(path).eval()
    inputs = Inputs.from_pretrained(path)
    batches = [inputs.build(sample) for sample in read_samples(asked)]
    return {
        "losses": losses,
        "layers": len(job.plan().quantized),
        "answers": [answer(tuned, batch) for batch in batches],
        "reloaded": [answer(again, batch) for batch in batches],
        "difference": max(difference(tuned, again, batch) for batch in batches),
    }


def answer(model: Any, batch: dict[str, torch.Tensor]) -> list[int]:
    """Return the tokens that a model answers a question with."""
    with torch.no_grad():
        found = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
    tokens: list[int] = found[0, batch["input_ids"].shape[1] :].tolist()
    return tokens


def difference(one: Any, other: Any, batch: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of the logits of two models."""
    with torch.no_grad():
        return float((one(**batch).logits - other(**batch).logits).abs().max())


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), *sys.argv[2:3])
    for name, before, after in found["losses"]:
        print(f"{name}: error {before:.3g} rounded to nearest, {after:.3g} tuned")
    print(f"{found['layers']} layers; largest difference of logits {found['difference']:.3g}")
    print("the same answers:", found["answers"] == found["reloaded"])
