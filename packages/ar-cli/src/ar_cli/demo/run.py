"""`ar quantize --demo`: float, round-to-nearest and tuned, side by side."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from ar_cli.commands.quantize import next_commands, quantize_one
from ar_cli.output import print_json, print_table, size

MODEL = Path(__file__).with_name("model")
TEXT = Path(__file__).with_name("eval.txt")
DEFAULTS = {"nsamples": 128, "seqlen": 256}
"""Shorter samples than the recipes': with the default recipe's 200 steps, a minute on two cores."""
SHARED = (
    *("bits", "group_size", "sym", "layer_config", "ignore_layers", "quant_lm_head"),
    *("device_map", "model_dtype"),
)
"""Settings that decide what each layer becomes: the same for both columns."""


def run_demo(  # noqa: PLR0913
    output: Path,
    format: str,  # noqa: A002
    scheme: str | None,
    dataset: str | None,
    settings: dict[str, Any],
    *,
    as_json: bool,
) -> int:
    """Quantize the embedded model, verify, compare, and return the exit status."""
    rtn_settings = {k: v for k, v in settings.items() if k in SHARED}
    tuned_settings = {**DEFAULTS, **settings}
    tuned = quantize_one(str(MODEL), output, format, scheme, dataset, tuned_settings)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "rtn"
        rtn = quantize_one(
            str(MODEL),
            folder,
            format,
            scheme,
            None,
            {**rtn_settings, "recipe": "rtn"},
            checked=False,
            listener=lambda _: None,
        )
        scores = _scores({"round to nearest": folder, "tuned": output})
    for row, facts in ((scores[1], rtn), (scores[2], tuned)):
        row |= {"bytes": facts["bytes"], "seconds": facts["seconds"]}
    scores[0] |= {"bytes": tuned["bytes_before"], "seconds": None}
    if as_json:
        print_json({**tuned, "scores": scores})
    else:
        _show(scores, tuned)
    return 0 if tuned["verified"] else 1


def _scores(candidates: dict[str, Path]) -> list[dict[str, Any]]:
    from ar_cli.opening import open_model, open_tokenizer
    from ar_tuner.evaluate import compare, windows

    ids = windows(open_tokenizer(MODEL), TEXT.read_text(encoding="utf-8"), seqlen=256, tokens=40960)
    reference = open_model(MODEL, "float32")
    out: list[dict[str, Any]] = []
    for name, path in candidates.items():
        found = compare(reference, open_model(path, "float32"), ids)
        if not out:
            out.append({"model": "float", "perplexity": found.ppl_ref, "kl": None, "top1": None})
        out.append({"model": name, "perplexity": found.ppl, "kl": found.kl, "top1": found.top1})
    return out


def _show(scores: list[dict[str, Any]], tuned: dict[str, Any]) -> None:
    columns = ("model", "perplexity", "KL", "top-1", "size", "seconds")
    print_table(
        columns,
        [
            (
                row["model"],
                f"{row['perplexity']:.3f}",
                "-" if row["kl"] is None else f"{row['kl']:.5f}",
                "-" if row["top1"] is None else f"{row['top1']:.4f}",
                size(row["bytes"]),
                "-" if row["seconds"] is None else f"{row['seconds']:.1f}",
            )
            for row in scores
        ],
    )
    verdict = "verified: bits and logits" if tuned["verified"] else "NOT verified"
    click.echo(f"\n{tuned['scheme']} {tuned['format']} in {tuned['output']}, {verdict}")
    for finding in tuned["findings"]:
        click.echo(f"{finding['level']}: {finding['where']}: {finding['what']}", err=True)
    next_commands(tuned)
