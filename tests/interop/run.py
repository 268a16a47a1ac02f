"""Every scheme in every format, opened by every reader at hand; writes docs/interop.md.

    python tests/interop/run.py --work DIR [--model DIR] [--auto-round PYTHON] [--gptqmodel PYTHON]

PYTHON is the interpreter of an environment with that reader. A reader that is not given is
reported as not run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import torch

import ar_cli
from ar_export import open_checkpoint, open_dequantized
from ar_export.matrix import support_matrix
from ar_schemes import schemes
from ar_tuner import AutoRound

ROOT = Path(__file__).parents[2]
DEMO = Path(ar_cli.__file__).parent / "demo" / "model"
PROBE = Path(__file__).with_name("probe.py")
FORMATS = ("auto_round", "auto_gptq", "auto_awq", "llm_compressor", "fp8", "gguf")
READERS = {
    "auto_round": ("auto_round",),
    "gptqmodel": ("auto_gptq", "auto_awq"),
    "compressed_tensors": ("llm_compressor",),
    "gguf": ("gguf",),
    "llama.cpp": ("gguf",),
}
_LIKE = re.compile(r"^W\d+A16G(32|64)$|_W8A8$")
"""Schemes that differ from others by the group size or the name only."""
CLOSE = 2**-7
"""Largest difference relative to the largest weight: readers compute in float16 or bfloat16."""


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """Return (scheme, format, options) of everything that is carried."""
    out: list[tuple[str, str, dict[str, Any]]] = []
    for name, row in support_matrix().items():
        for form in FORMATS:
            if row.get(form) is not None or schemes()[name].roles or _LIKE.search(name):
                continue
            spelled = form
            if form == "gguf":
                if not name.startswith("GGUF:"):
                    continue
                spelled = f"gguf:{name.removeprefix('GGUF:').lower()}"
            elif name.startswith("GGUF:"):
                continue
            out.append((name, spelled, {}))
            if name in ("W2A16", "W4A16", "W8A16"):
                out.append((name, spelled, {"sym": False}))
    return out


def main() -> int:
    """Quantize, read, compare, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--auto-round", dest="auto_round")
    parser.add_argument("--gptqmodel")
    args = parser.parse_args()
    made = {}
    for name, form, options in cases():
        label = f"{name}{'-asym' if options else ''}-{form}".replace(":", "_")
        path = args.work / label
        settings = {"recipe": "rtn", "nsamples": 4, "seqlen": 32, "overwrite": True, **options}
        AutoRound(args.model, scheme=name, **settings).quantize_and_save(path, form)
        made[label] = (name + (" asym" if options else ""), form, path)
    pythons = {
        "auto_round": args.auto_round,
        "gptqmodel": args.gptqmodel,
        "compressed_tensors": sys.executable,
    }
    results = {label: {"scheme": s, "format": f} for label, (s, f, _) in made.items()}
    for reader, forms in READERS.items():
        mine = {k: v[2] for k, v in made.items() if v[1].partition(":")[0] in forms}
        outcomes = read(reader, mine, pythons.get(reader), args.work)
        for label, outcome in outcomes.items():
            results[label][reader] = outcome
    (args.work / "interop.json").write_text(json.dumps(results, indent=1))
    (ROOT / "docs" / "interop.md").write_text(page(results, args.model.name), encoding="utf-8")
    bad = [v for r in results.values() for v in r.values() if v.startswith(("differs", "fails"))]
    return 1 if bad else 0


def read(
    reader: str, directories: dict[str, Path], python: str | None, work: Path
) -> dict[str, str]:
    """Return what a reader makes of each directory."""
    if reader == "gguf":
        return {label: decode(path) for label, path in directories.items()}
    if reader == "llama.cpp":
        return {label: run(path) for label, path in directories.items()}
    if python is None:
        return dict.fromkeys(directories, "not run")
    out = work / f"probe-{reader}"
    command = [python, str(PROBE), reader, str(out), *map(str, directories.values())]
    subprocess.run(command, check=False, capture_output=True)
    return {label: judge(path, out / f"{path.name}.pt") for label, path in directories.items()}


def judge(path: Path, probed: Path) -> str:
    """Return how far a reader's weights are from ours."""
    if not probed.is_file():
        return "fails: the reader ended without an answer"
    theirs = torch.load(probed, weights_only=True)
    if isinstance(theirs, str):
        return f"fails: {theirs}"
    found, worst = open_checkpoint(path), 0.0
    for name in found.quantized:
        ours = found.weight(name).dequantize()
        worst = max(worst, float((theirs[name] - ours).abs().max() / ours.abs().max()))
    return f"{'equal' if worst <= CLOSE else 'differs'} ({worst:.0e})"


def decode(path: Path) -> str:
    """Return whether the gguf package decodes exactly our weights."""
    import gguf

    found = open_checkpoint(path)
    stored = found.stored  # type: ignore[attr-defined]
    for name in found.quantized:
        tensor = stored[f"{name}.weight"]
        theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if not torch.equal(theirs, found.weight(name).dequantize()):
            return f"differs: {name}"
    return "equal to the bit"


def run(path: Path) -> str:
    """Return how far llama.cpp's probabilities are from ours, and whether it tokenizes alike."""
    try:
        import xllamacpp
    except ImportError:
        return "not run"
    from transformers import AutoTokenizer

    params = xllamacpp.CommonParams()
    params.model.path = str(next(path.glob("*.gguf")))
    params.n_ctx, params.warmup = 256, False
    server = xllamacpp.Server(params)
    text = (ROOT / "README.md").read_text(encoding="utf-8")[:400]
    ids = AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False).input_ids
    body = json.dumps({"content": text, "add_special": False}).encode()
    asked = urllib.request.Request(
        f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked) as answer:
        if json.loads(answer.read())["tokens"] != ids:
            return "differs: other tokens"
    ids = ids[:128]
    made = server.handle_completions(
        {"prompt": ids, "n_predict": 1, "logprobs": 20, "temperature": 0}
    )
    top = made["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    model = open_dequantized(open_checkpoint(path), torch.float32)
    with torch.inference_mode():
        ours = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
    worst = max(abs(float(ours[t["id"]]) - t["logprob"]) for t in top)
    worst /= float(ours.max() - ours.min())
    return f"{'agrees' if worst < 0.05 else 'differs'} (logits {worst:.0e}, same tokens)"


def page(results: dict[str, dict[str, str]], model: str) -> str:
    """Return docs/interop.md."""
    versions = []
    for name in ("torch", "transformers", "compressed-tensors", "gguf", "xllamacpp"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    lines = [
        "# Who reads what",
        "",
        "Written by `tests/interop/run.py`, not by hand. Model: the embedded one, rounded to "
        f"nearest (`{model}`). auto-round is 0.16.1, gptqmodel 7.7.0, each in its own environment.",
        f"Here: {', '.join(versions)}.",
        "",
        "`equal (x)`: each layer of the reader, applied to the identity, gives our dequantized "
        "weight within one rounding of bfloat16 (x is the largest difference seen, relative "
        "to the largest weight). `agrees`: llama.cpp's log-probabilities (it quantizes "
        "activations to 8 bits) "
        "and tokens. Not read here: engines that need a GPU (vLLM, SGLang).",
        "",
        f"| scheme | format | {' | '.join(READERS)} |",
        f"|---|---|{'---|' * len(READERS)}",
    ]
    for row in results.values():
        cells = " | ".join(row.get(reader, "").replace("|", "/") for reader in READERS)
        lines.append(f"| {row['scheme']} | `{row['format']}` | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
