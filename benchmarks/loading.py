"""How much memory and time it takes to open a quantized checkpoint.

    python benchmarks/loading.py --out DIR [--layers 10] [--kinds gptq awq ...]

Random models of about 300 MB packed are written to DIR once and opened by `from_pretrained`, each
in a process of its own that has opened a tiny one before. The parent looks at the process while it
works. Anonymous memory is what the process holds; pages of mapped files (the checkpoint while it is
read) count in the resident set too, but the kernel takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HIDDEN, INNER, HEADS, GROUPED, HEAD = 2048, 6144, 16, 8, 128
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gptq": ("W4A16", "gptq", {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}),
    "awq": (
        "W4A16",
        "awq",
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    ),
    "fp8": ("FP8_BLOCK", "fp8_block", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "mxfp4": (
        "MXFP4",
        "ct_mxfp4",
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:llm_compressor",
            **{"bits": 4, "group_size": 32, "sym": True, "data_type": "mx_fp"},
        },
    ),
}
"""Kind to preset, layout and the config that goes with them."""
OPEN = """
import sys, time, torch, transformers, ar_kernels
def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
def memory(what):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))
small = opened(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = memory("VmRSS")
print("ready", flush=True)
sys.stdin.readline()
began = time.perf_counter()
model = opened(sys.argv[2])
took = time.perf_counter() - began
held = sum(t.nbytes for t in (*model.buffers(), *model.parameters()))
kinds = sorted({m.backend for m in model.modules() if hasattr(m, "backend")})
print("done", memory("VmHWM") - before, took, held, ",".join(kinds), flush=True)
sys.stdin.readline()
"""


def main() -> None:
    """Write what is missing, open each, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    print("| kind | packed MB | layer MB | held | peak, anonymous | peak, resident | s | backend |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in args.kinds:
        tiny = _written(args.out / f"{kind}-tiny", kind, 1, 8)
        path = _written(args.out / f"{kind}-{args.layers}", kind, args.layers, 1)
        packed = (path / "model.safetensors").stat().st_size
        found = _opened(tiny, path)
        sizes = [packed, packed // args.layers, found["held"], found["anonymous"], found["peak"]]
        cells = " | ".join(f"{size / 1e6:.0f}" for size in sizes)
        print(f"| {kind} | {cells} | {found['seconds']:.1f} | {found['backends']} |", flush=True)


def _written(out: Path, kind: str, layers: int, narrower: int) -> Path:
    """Return the directory of a checkpoint with random weights, written if it is not there."""
    if (out / "config.json").is_file():
        return out
    import safetensors.torch
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from ar_kernels import data_type, layout
    from ar_schemes import scheme

    preset, order, config = KINDS[kind]
    sizes = {
        "vocab_size": 4096,
        "hidden_size": HIDDEN // narrower,
        "intermediate_size": INNER // narrower,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS // narrower,
        "num_key_value_heads": GROUPED // narrower,
        "head_dim": HEAD,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, tie_word_embeddings=True))
    spec = scheme(preset).weight
    assert spec is not None
    spec = spec.with_(symmetric=order != "awq")
    numbers = data_type(spec.data_type)
    made: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, parameter in model.state_dict().items():
        name, shape = key.removesuffix(".weight"), tuple(parameter.shape)
        if key == "lm_head.weight":
            continue
        if not name.endswith("_proj"):
            tensors[key] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        if shape not in made:  # layers of one shape are alike: only sizes matter
            weight = torch.randn(shape)
            quantized = numbers.quantize(weight, spec, numbers.parameters(weight, spec))
            made[shape] = layout(order).pack(quantized)
        tensors |= {f"{name}.{suffix}": t.clone() for suffix, t in made[shape].items()}
    out.mkdir(parents=True)
    safetensors.torch.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    plain = model.config.to_dict() | {"dtype": "bfloat16", "quantization_config": config}
    plain["architectures"] = [type(model).__name__]
    (out / "config.json").write_text(json.dumps(plain))
    return out


def _opened(tiny: Path, path: Path) -> dict[str, Any]:
    """Return what a process needs to open a checkpoint, its memory seen from here."""
    command = [sys.executable, "-c", OPEN, str(tiny), str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        while child.stdout.readline().strip() != "ready":
            if child.poll() is not None:
                msg = f"{path} cannot be opened"
                raise SystemExit(msg)
        before = peak = _anonymous(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        done = _Line(child.stdout)
        while not done.here(0.002):
            peak = max(peak, _anonymous(child.pid))
        words = done.line.split()
        child.stdin.close()
    return {
        "peak": int(words[1]),
        "seconds": float(words[2]),
        "held": int(words[3]),
        "backends": words[4],
        "anonymous": peak - before,
    }


class _Line:
    """The next line of a pipe, waited for a little at a time."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.line = ""

    def here(self, seconds: float) -> bool:
        """Tell whether the line has come within a time."""
        import select

        if not select.select([self._pipe], [], [], seconds)[0]:
            return False
        self.line = self._pipe.readline()
        return True


def _anonymous(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
