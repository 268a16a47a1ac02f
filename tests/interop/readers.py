"""Ask each reader for a checkpoint's weights, and compare them with ours."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from typing import TYPE_CHECKING, Any

import torch

from ar_export import lint, open_checkpoint, open_dequantized
from ar_export.lint.layers import float_linears

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CLOSE = 2**-7
"""Largest difference relative to the largest weight: readers compute in float16 or bfloat16."""
CLOSE_LOGITS = 0.05
"""Largest difference of log-probabilities relative to their range, for 8-bit activations."""
_TEXT = "def add(a, b):\n    return a + b  # it's 12345 \u00e9\u00df\n\n\nclass Foo:\n    pass\n"


def layers_of(path: Path) -> dict[str, Any]:
    """Return bits, group size and symmetry of each linear layer, None for floats."""
    found = open_checkpoint(path)
    out: dict[str, Any] = dict.fromkeys(float_linears(found))
    if found.config.get("tie_word_embeddings"):
        out["lm_head"] = None
    for name, entry in found.quantized.items():
        flat = entry.scheme.to_dict()
        out[name] = {key: flat[key] for key in ("bits", "group_size", "sym")}
    return out


def probed(
    reader: str, python: str, probe: Path, directories: Mapping[str, Path], work: Path
) -> dict[str, str]:
    """Return how far the weights of a reader, in a process of its own, are from ours."""
    out = work / f"probe-{reader}"
    out.mkdir(parents=True, exist_ok=True)
    names = {path.name: quantized_names(path) for path in directories.values()}
    (out / "layers.json").write_text(json.dumps(names))
    for path in directories.values():
        (out / f"{path.name}.pt").unlink(missing_ok=True)
    command = [python, str(probe), reader, str(out), *map(str, directories.values())]
    done = subprocess.run(command, check=False, capture_output=True, env=quiet())
    (out / "log.txt").write_bytes(done.stdout + done.stderr)
    return {label: judge(path, out / f"{path.name}.pt") for label, path in directories.items()}


def quantized_names(path: Path) -> list[str]:
    """Return the layers to compare: quantized ones, or every linear layer of a float checkpoint."""
    found = open_checkpoint(path)
    return [n for n in found.quantized if "embed" not in n] or list(float_linears(found))


def judge(path: Path, result: Path) -> str:
    """Return how far a reader's weights are from ours."""
    if not result.is_file():
        return "fails: the reader ended without an answer"
    theirs = torch.load(result, weights_only=True)
    if isinstance(theirs, str):
        return f"fails: {theirs}"
    found, worst = open_checkpoint(path), 0.0
    for name, weight in theirs.items():
        quantized = name in found.quantized
        ours = found.weight(name).dequantize() if quantized else found.tensor(f"{name}.weight")
        ours = ours.float()
        worst = max(worst, float((weight - ours).abs().max() / ours.abs().max()))
    if worst == 0:
        return "equal to the bit"
    return f"{'equal' if worst <= CLOSE else 'differs'} ({worst:.0e})"


def vllm(python: str, script: Path, directories: Mapping[str, Path], work: Path) -> dict[str, str]:
    """Return what vLLM's config classes make of checkpoints, beside what our lint says of them."""
    file = work / "vllm-layers.json"
    file.write_text(json.dumps({path.name: layers_of(path) for path in directories.values()}))
    command = [python, str(script), str(file), *map(str, directories.values())]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=quiet())
    (work / "vllm.log").write_text(done.stdout + done.stderr)
    said = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    out = {}
    for label, path in directories.items():
        answer = said.get(path.name, "fails: it ended without an answer")
        noted = [f.what for f in lint(open_checkpoint(path)) if "vLLM" in f.what]
        if answer == "accepts" and noted:
            answer = f"differs: accepts, but lint says {noted[0]}"
        elif answer.startswith("rejects") and noted:
            answer = f"rejects, as lint says: {noted[0].partition(': ')[2] or noted[0]}"
        elif answer.startswith("rejects"):
            answer = f"fails: {answer}, and lint is silent"
        out[label] = answer
    return out


def quiet() -> dict[str, str]:
    """Return the environment of readers: no network, none of our packages in their way."""
    drop = ("PYTHONPATH",)
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    return kept | {"HF_HUB_OFFLINE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def decoded(path: Path) -> str:
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


def served(path: Path) -> str:
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
    ids = AutoTokenizer.from_pretrained(path)(_TEXT, add_special_tokens=False).input_ids
    if tokenized(server.listening_address, _TEXT) != ids:
        return "differs: other tokens"
    asked = {"prompt": ids[:128], "n_predict": 1, "logprobs": 20, "temperature": 0}
    made = server.handle_completions(asked)
    top = made["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    model = open_dequantized(open_checkpoint(path), torch.float32)
    with torch.inference_mode():
        ours = torch.log_softmax(model(torch.tensor([ids[:128]])).logits[0, -1], -1)
    worst = max(abs(float(ours[t["id"]]) - t["logprob"]) for t in top)
    worst /= float(ours.max() - ours.min())
    return f"{'agrees' if worst < CLOSE_LOGITS else 'differs'} (logits {worst:.0e}, same tokens)"


def tokenized(address: str, text: str) -> list[int]:
    """Return a server's tokens of a text."""
    body = json.dumps({"content": text, "add_special": False}).encode()
    asked = urllib.request.Request(
        f"{address}/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked) as answer:
        tokens: list[int] = json.loads(answer.read())["tokens"]
    return tokens
