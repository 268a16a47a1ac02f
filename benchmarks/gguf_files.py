"""GGUF files beside llama.cpp's own quantizer, both scored by llama.cpp.

    python benchmarks/gguf_files.py MODEL --calibration FILE --text FILE --out DIR \
        --llama-python LLAMA/bin/python [--types q4_k_m q3_k_m q2_k] [--page FILE]

The environment of `--llama-python` holds llama-cpp-python, torch and transformers. llama.cpp
quantizes a float16 file of the model twice: without an importance matrix, and with one made on the
very calibration rows that ours are tuned on (mean squares of every linear layer's inputs, which is
what llama.cpp's own `imatrix` program collects). Ours is the default recipe. All files are opened
by llama.cpp; KL is from the float model as Transformers computes it, in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Sequence

PEER = """
import ctypes, json, sys
import numpy as np
import torch, llama_cpp
from llama_cpp import Llama
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
job = json.loads(sys.argv[1])
llama_cpp.llama_backend_init()
TYPES = {n: getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{n.upper()}") for n in job["types"]}

def quantize(ftype, out, matrix):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, 2
    if matrix:
        rows = [(k.encode(), v.astype(np.float32)) for k, v in matrix.items()]
        made = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()
        for place, (name, values) in zip(made, rows):
            place.name, place.size = name, values.size
            place.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = made
    return llama_cpp.llama_model_quantize(job["float"].encode(), out.encode(), ctypes.byref(params))

with safe_open(job["matrix"], "np") as file:
    matrix = {k: file.get_tensor(k) for k in file.keys()}
pairs = list(job["pairs"])
for name, ftype in TYPES.items():
    for label, used in (("llama.cpp", None), ("llama.cpp imatrix", matrix)):
        out = f"{job['out']}/{name}-{label.replace(' ', '-')}.gguf"
        if quantize(ftype, out, used) == 0:  # some types it makes with a matrix only
            pairs.append([name, label, out])
tokenizer = AutoTokenizer.from_pretrained(job["model"])
text = open(job["text"], encoding="utf-8").read()
ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
size = job["seqlen"]
rows = [ids[i:i + size] for i in range(0, min(job["tokens"], len(ids)) // size * size, size)]
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
with torch.inference_mode():
    floats = [torch.log_softmax(model(torch.tensor([r])).logits[0, :-1], -1) for r in rows]
for name, label, path in pairs:
    llama = Llama(path, n_ctx=size, n_batch=size, logits_all=True, verbose=False, n_threads=2)
    kl = same = count = 0.0
    for row, wanted in zip(rows, floats):
        llama.reset()
        llama.eval(row)
        scores = torch.from_numpy(np.array(llama.scores[:len(row) - 1], dtype=np.float32))
        found = torch.log_softmax(scores, -1)
        kl += float((wanted.exp() * (wanted - found)).sum())
        same += float((wanted.argmax(-1) == found.argmax(-1)).sum())
        count += len(row) - 1
    llama.close()
    import os
    print("ROW " + json.dumps({"type": name, "by": label, "kl": kl / count, "top1": same / count,
                               "bytes": os.path.getsize(path)}), flush=True)
"""
BEGIN, END = "<!-- gguf: begin -->", "<!-- gguf: end -->"


def main() -> None:
    """Quantize on both sides, score, print the table."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    pairs, seconds = [], {}
    for name in args.types:
        began = time.perf_counter()
        pairs.append([name, "ar", str(_ours(args, name))])
        seconds[name] = time.perf_counter() - began
    job = {
        "model": args.model,
        "text": str(args.text),
        "out": str(args.out),
        "float": str(_float_file(args)),
        "matrix": str(_importance(args)),
        "types": args.types,
        "pairs": pairs,
        "seqlen": args.seqlen,
        "tokens": args.tokens,
    }
    command = [args.llama_python, "-c", PEER, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    rows = [json.loads(s[4:]) for s in done.stdout.splitlines() if s.startswith("ROW ")]
    table = _table(args.types, rows)
    print(table)
    print("seconds of ours:", {k: round(v, 1) for k, v in seconds.items()})
    if args.page is not None:
        text = args.page.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        tail = rest.partition(END)[2]
        args.page.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "q3_k_m", "q2_k"])
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--page", type=Path)
    return parser.parse_args()


def _ours(args: argparse.Namespace, name: str) -> Path:
    """Return our file of a type, default recipe; made in a process of its own."""
    out = args.out / f"{name}-ar"
    if out.is_dir():  # of an earlier call
        return next(out.rglob("*.gguf"))
    program = (
        "import json, sys; from ar_tuner import AutoRound; a = json.loads(sys.argv[1]);"
        "AutoRound(a['model'], dataset=a['calibration'], nsamples=a['nsamples'],"
        " seqlen=a['seqlen'], overwrite=True)"
        ".quantize_and_save(a['out'], format='gguf:' + a['type'])"
    )
    request = {k: getattr(args, k) for k in ("model", "calibration", "nsamples", "seqlen")}
    request |= {"out": str(out), "type": name}
    subprocess.run([sys.executable, "-c", program, json.dumps(request)], check=True)
    return next(out.rglob("*.gguf"))


def _float_file(args: argparse.Namespace) -> Path:
    """Return the model as a float16 GGUF file."""
    from safetensors.torch import load_file

    from ar_export.sink import ar_open_sink
    from ar_export.testing import ExampleRequest
    from ar_schemes import LayerPlan, scheme

    model = Path(args.model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    plan = LayerPlan(rows=(), default=scheme("BF16"))
    sink = ar_open_sink(
        ExampleRequest(args.out / "float", plan, "gguf", model, config, overwrite=True)
    )
    assert sink is not None
    for key, tensor in load_file(model / "model.safetensors").items():
        if not (key == "lm_head.weight" and config.get("tie_word_embeddings")):
            sink.put_tensor(key, tensor)
    return next(sink.commit().glob("*.gguf"))


def _importance(args: argparse.Namespace) -> Path:
    """Return a file of the mean squares of every linear layer's inputs, by GGUF tensor name."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ar_tuner import AutoRound

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    job = AutoRound(
        args.model, dataset=args.calibration, nsamples=args.nsamples, seqlen=args.seqlen
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = job.calibration_rows(tokenizer, model).walk
    kind = getattr(gguf.MODEL_ARCH, model.config.model_type.upper())
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    sums: dict[str, torch.Tensor] = {}
    seen: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(_: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, torch.zeros(x.shape[-1])) + x.square().sum(0)
            seen[name] = seen.get(name, 0) + x.shape[0]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            known = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            module.register_forward_pre_hook(watch(known or name))
    with torch.inference_mode():
        for some in rows.split(8):
            model(some)
    path = args.out / "importance.safetensors"
    save_file({k: v / seen[k] for k, v in sums.items()}, path)
    return path


def _table(types: Sequence[str], rows: list[dict[str, Any]]) -> str:
    lines = [
        "| type | made by | KL | ratio | top-1 | bytes |",
        "|---|---|---|---|---|---|",
    ]
    for name in types:
        found = {r["by"]: r for r in rows if r["type"] == name}
        mine = found["ar"]["kl"]
        for label, row in found.items():
            ratio = "" if label == "ar" else f"{mine / row['kl']:.2f}"
            lines.append(
                f"| {name.upper()} | {label} | {row['kl']:.5f} | {ratio} | {row['top1']:.4f} "
                f"| {row['bytes']} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
