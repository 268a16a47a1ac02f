"""Every GGUF type of a model in llama.cpp itself, against our dequantized weights.

    python tests/interop/gguf_scores.py --model DIR --text FILE --llama PYTHON --work DIR

PYTHON is the interpreter of an environment with llama-cpp-python, torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import ar_cli

DEMO = Path(ar_cli.__file__).parent / "demo" / "model"
TOLERANCE = 1e-3
"""Largest KL of llama.cpp's next-token distribution from ours."""
TOKENS, SEQLEN = 2048, 256
VARIANTS = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q2_k_s", "q2_k_mixed", "q3_k_s", "q3_k_m"),
    *("q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
)


def score(model: Path, text: Path, python: str, work: Path) -> None:
    """Write WORK/<name of the model>.json with a row for every type."""
    work.mkdir(parents=True, exist_ok=True)
    name = "embedded" if model == DEMO else model.name
    folder = work / name
    pairs = [["float", str(model), str(written(model, folder / "float"))]]
    for variant in VARIANTS:
        pairs.append([variant, *map(str, quantized(model, folder, variant))])
    job = {"reference": str(model), "text": str(text), "pairs": pairs}
    job |= {"tokens": TOKENS, "seqlen": SEQLEN}
    (folder / "job.json").write_text(json.dumps(job))
    command = [python, str(Path(__file__).with_name("llama_scores.py")), str(folder / "job.json")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found |= {"model": name}
    (work / f"{name}.json").write_text(json.dumps(found, indent=1))


def written(model: Path, out: Path) -> Path:
    """Return the float model as a GGUF file."""
    from safetensors.torch import load_file

    from ar_export.sink import ar_open_sink
    from ar_export.testing import ExampleRequest
    from ar_schemes import LayerPlan, scheme

    config = json.loads((model / "config.json").read_text())
    plan = LayerPlan(rows=(), default=scheme("BF16"))
    sink = ar_open_sink(ExampleRequest(out, plan, "gguf", model, config, overwrite=True))
    assert sink is not None
    for key, tensor in load_file(model / "model.safetensors").items():
        if not (key == "lm_head.weight" and config.get("tie_word_embeddings")):
            sink.put_tensor(key, tensor)
    return next(sink.commit().glob("*.gguf"))


def quantized(model: Path, folder: Path, variant: str) -> tuple[Path, Path]:
    """Return the dequantized model, and the GGUF file of a type, rounded to nearest."""
    import torch

    from ar_export import open_checkpoint, open_dequantized
    from ar_tuner import AutoRound

    options = {"recipe": "rtn", "nsamples": 4, "seqlen": 32, "overwrite": True}
    path = folder / variant
    AutoRound(model, **options).quantize_and_save(path, f"gguf:{variant}")
    plain = folder / f"{variant}-floats"
    open_dequantized(open_checkpoint(path), torch.float32).save_pretrained(plain)
    return plain, next(path.glob("*.gguf"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "text", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--llama", required=True, metavar="PYTHON")
    given = parser.parse_args()
    score(given.model, given.text, given.llama, given.work.resolve())
