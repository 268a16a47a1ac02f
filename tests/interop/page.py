"""docs/interop.md from the outcomes that a work directory holds.

python tests/interop/page.py --work DIR
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_scores import TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Mapping

COLUMNS = (
    *("auto_round", "gptqmodel", "compressed_tensors", "transformers"),
    *("mlx", "gguf", "llama.cpp", "vllm"),
)
_HERE = ("torch", "transformers", "compressed-tensors", "gguf", "xllamacpp")
_INTRO = """# Who reads what

Written by `tests/interop/run.py`, not by hand. Model: the embedded one, rounded to nearest.
{versions}

`equal (x)`: each layer of the reader, applied to the identity, gives our dequantized weight within
one rounding of bfloat16 (x is the largest difference seen, relative to the largest weight).
`agrees`: llama.cpp's log-probabilities of the next token (it quantizes activations to 8 bits), and
its tokens. `vllm`: its config classes, asked for every layer under the name that vLLM gives it
(`accepts`: same bits, groups and symmetry as stored, and a scheme class for it); kernels need a
GPU. What it rejects, `ar verify` says too. `reader fails on its own checkpoint too`: auto-round
wrote the same scheme and format, and could not open that either.
"""
_SCORES = """
## GGUF in llama.cpp, over a text

Every GGUF type of a model, in llama.cpp (llama-cpp-python {version}) and as Transformers computes
with our dequantized weights in float32: mean KL divergence of the next token over {tokens} tokens,
share of equal most likely tokens, and whether llama.cpp's tokenizer gives the model's ids. For
scale: KL of the same dequantized model from the float one. The first row is the float model as
16-bit GGUF: what two implementations differ by. llama.cpp quantizes activations to 8 bits in
blocks of 32 or 256 before it multiplies, which costs a KL of this size whatever the weights; more
than {tolerance} counts as a difference.

| model | type | KL llama.cpp to ours | equal first | tokenizer | KL ours to float |
|---|---|---|---|---|---|
"""


_FOREIGN = """
## Checkpoints that others made, opened here

Written by `tests/interop/foreign.py`: made and run by the project named, then run by ar-kernels
(backend `dense`, same type) on the same machine. `same (x)`: x is ||ours - theirs|| / ||theirs||
over the logits of 48 tokens, quantized activations included. NVFP4 differs: on normal random
input its formula equals our quantized activations to the bit, and so do the weights of 8 layers;
rounding the activations' tensor scales to bfloat16 moves the logits as far (8e-2), so any last
place may do it. Which one does was not found. Static FP8 activations differ in
bfloat16; with a model in float32 our logits equal those of compressed-tensors to the bit, so it is
the type that they are quantized in (ours: float32). compressed-tensors divides by the scale in
bfloat16, with the scale in bfloat16 too, before it rounds to FP8: 3% of the codes become others,
and a layer is off the exact product by 6.7e-3, ours by 1.8e-3 (what rounding its output costs).
Beside the same model in float32 our logits in bfloat16 have a KL of .0028, theirs .0032, so ours
stay as they are. auto-round's were not tried in float32.

| checkpoint | made by | quantized layers | type | outcome |
|---|---|---|---|---|
"""


def page(work: Path, pythons: Mapping[str, str | None]) -> tuple[str, list[str]]:
    """Return the page, and the rows that are a fault of ours."""
    results = json.loads((work / "interop.json").read_text())
    lines = [_INTRO.format(versions=_versions(pythons))]
    lines += [f"| scheme | format | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    bad = []
    for row in results.values():
        cells = [row.get(reader, "").replace("|", "/") for reader in COLUMNS]
        lines.append(f"| {row['scheme']} | `{row['format']}` | {' | '.join(cells)} |")
        wrong = [c for c in cells if c.startswith(("differs", "fails"))]
        bad += [f"{row['scheme']} {row['format']}: {c}" for c in wrong]
    scores = sorted((work / "scores").glob("*.json"))
    text = "\n".join(lines) + "\n"
    if scores:
        found = [json.loads(path.read_text()) for path in scores]
        text += _scores(found)
        bad += [f"{s['model']} {r['type']}" for s in found for r in s["rows"] if not fine(r)]
    foreign = work / "foreign.json"
    if foreign.is_file():
        text += foreign_section(json.loads(foreign.read_text()))
    return text, bad


def foreign_section(outcomes: Mapping[str, Any]) -> str:
    """Return the section on checkpoints that others made."""
    out = _FOREIGN
    for name, row in outcomes.items():
        layers = f"{row['layers']} ({', '.join(row['kinds'])})" if "layers" in row else ""
        kind = str(row.get("dtype", "")).removeprefix("torch.")
        out += f"| {name} | {row['by']} | {layers} | {kind} | {row['outcome']} |\n"
    return out


def fine(row: Mapping[str, Any]) -> bool:
    """Tell whether llama.cpp computes what we do."""
    return row["kl"] <= TOLERANCE and bool(row["tokenizer"])


def _scores(found: list[dict[str, Any]]) -> str:
    out = _SCORES.format(
        version=found[0]["version"], tokens=found[0]["tokens"], tolerance=TOLERANCE
    )
    for one in found:
        for row in one["rows"]:
            agrees = "agrees" if row["tokenizer"] else "DIFFERS"
            mark = "" if fine(row) else " (differs)"
            out += (
                f"| {one['model']} | {row['type']} | {row['kl']:.1e}{mark} | {row['top1']:.1%} | "
                f"{agrees} | {row['lost']:.1e} |\n"
            )
    return out


def _versions(pythons: Mapping[str, str | None]) -> str:
    here = [f"{name} {v}" for name in _HERE if (v := _version(name))]
    out = [f"Here: {', '.join(here)}."]
    for name, python in pythons.items():
        if python:
            code = f"import importlib.metadata as m; print(m.version({name!r}))"
            done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
            out.append(f"{name} {done.stdout.strip()} in an environment of its own.")
    return " ".join(out)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    for kind in ("auto-round", "gptqmodel", "mlx"):
        parser.add_argument(f"--{kind}", metavar="PYTHON")
    given = parser.parse_args()
    environments = {"auto-round": given.auto_round, "gptqmodel": given.gptqmodel}
    environments |= {"mlx": given.mlx}
    written, faults = page(given.work, environments)
    (Path(__file__).parents[2] / "docs" / "interop.md").write_text(written, encoding="utf-8")
    print("\n".join(faults))
