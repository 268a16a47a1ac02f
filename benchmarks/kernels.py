"""Quantized linear layers on the CPU: ours beside torch's own and the reference implementation's.

    python benchmarks/kernels.py [--quick] [--peer-python PEER/bin/python] [--threads N]
        [--shapes 4096x4096 ...] [--rows 1 4 16 512] [--page docs/benchmarks.md] [--json FILE]

For every shape (inputs x features) and number of rows M it prints, in one run: milliseconds of a
call (median, and the fastest tenth), the bytes of the packed weight read per second beside what
the memory gives a plain read loop in the same minute, the speed against `F.linear` in bf16, and
||y - y64|| / ||y64|| against a float64 product with the same dequantized weight.

Calls go round over copies of the weight that together exceed the caches, so weights come from
memory, as in decoding. Everybody's copies, and what the plain loop reads, lie in large pages.
Implementations take turns in short rounds: whatever else the machine does meets all of them alike.
`--peer-python` names an interpreter with `auto-round-lib`, which runs the same shapes in a process
of its own right after each of ours. All processors are used.

`--page` writes the tables between a page's markers for the instruction set in use; `--json` keeps
rows for later calls, so that shapes may be measured one at a time.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

import ar_kernels
from ar_kernels.backends import Need, PackedWeight
from ar_kernels.backends.base import BindingBackend
from ar_kernels.native import library
from ar_kernels.native.arena import Region, large_pages, room_of
from ar_kernels.native.product import read_bandwidth
from ar_schemes import Granularity, Span, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from ar_kernels.backends.base import BoundProduct

MAIN = {"square": (4096, 4096), "wide": (2048, 8192)}
MODELS = {
    "Qwen3-0.6B q": (1024, 2048),
    "Qwen3-0.6B k, v": (1024, 1024),
    "Qwen3-0.6B o": (2048, 1024),
    "Qwen3-0.6B gate, up": (1024, 3072),
    "Qwen3-0.6B down": (3072, 1024),
    "Llama-3-8B k, v": (4096, 1024),
    "Llama-3-8B gate, up": (4096, 14336),
    "Llama-3-8B down": (14336, 4096),
}
"""Linear layers by inputs and features; q and o of Llama-3-8B are `square`."""
CACHES = 192 << 20
"""Bytes that copies of a weight must exceed."""
_CHANNEL = Granularity(Span.CHANNEL)


def _groups(size: int) -> Granularity:
    return Granularity(Span.GROUP, (size,))


SPECS = {
    "W4 g128": TensorSpec(),
    "W4 g128 asym": TensorSpec(symmetric=False),
    "W4 g32": TensorSpec(granularity=_groups(32)),
    "W3 g128": TensorSpec(bits=3),
    "W2 g128": TensorSpec(bits=2),
    "W8 g128": TensorSpec(bits=8),
    "FP8 channel": TensorSpec("fp", 8, _CHANNEL, scale_dtype="float32"),
    "MXFP4": TensorSpec("mx_fp", 4, _groups(32), scale_dtype="e8m0"),
    "NVFP4": TensorSpec("nv_fp", 4, _groups(16), scale_dtype="float8_e4m3fn"),
}
"""Representations; all at the main shapes, the first at those of models."""


@dataclass(frozen=True)
class Candidate:
    """An implementation of one layer.

    Attributes:
        name: what the table calls it.
        bytes: of the weight with its parameters.
        calls: one function of x for every copy of the weight.
        dtype: of x.
        exact: the weight it should multiply by, float64 [features, inputs].
    """

    name: str
    bytes: int
    calls: list[Callable[[Tensor], Tensor]]
    dtype: torch.dtype
    exact: Tensor


def main() -> None:
    """Measure, print, and write where asked."""
    args = _arguments()
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    kept = [] if args.json is None or not args.json.is_file() else _read(args.json)
    for name, (inputs, features) in _shapes(args).items():
        rows = list(_measured(args, name, inputs, features))
        print(_table(rows), "\n", flush=True)
        kept = [r for r in kept if (r["inputs"], r["features"]) != (inputs, features)] + rows
        if args.json is not None:
            args.json.write_text("\n".join(map(json.dumps, kept)) + "\n", encoding="utf-8")
    if args.page is not None:
        _write(args.page, _table(kept))


def _write(page: Path, table: str) -> None:
    """Put a table between a page's markers for the instruction set in use."""
    begin, end = (f"<!-- kernels {library.best_isa()}: {part} -->" for part in ("begin", "end"))
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    if not found:
        sys.exit(f"{page} has no line {begin}")
    tail = rest.partition(end)[2]
    page.write_text(f"{head}{begin}\n\n{table}\n\n{end}{tail}", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="main shapes, a tenth of the time")
    parser.add_argument("--shapes", nargs="+", metavar="INPUTSxFEATURES")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 512])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--peer-python")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _shapes(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    known = MAIN if args.quick else {**MAIN, **MODELS}
    if not args.shapes:
        return known
    wanted = [tuple(int(n) for n in text.split("x")) for text in args.shapes]
    named = {(k, n): name for name, (k, n) in {**MODELS, **MAIN}.items()}
    return {named.get((k, n), "shape"): (k, n) for k, n in wanted}


def _measured(
    args: argparse.Namespace, name: str, inputs: int, features: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for every implementation and number of rows of one shape."""
    is_main = (inputs, features) in MAIN.values()
    weight = torch.randn(features, inputs) * 0.02
    made = candidates(weight, list(SPECS) if is_main else list(SPECS)[:1])
    seconds = 0.05 if args.quick else 0.4
    for rows in args.rows:
        x = torch.randn(rows, inputs)
        times, read = _rounds(made, x, seconds)
        theirs = _peer(args, inputs, features, rows, seconds)
        base = statistics.median(times["bf16 F.linear"])
        common = {"shape": name, "inputs": inputs, "features": features, "rows": rows}
        for one in made:
            spent = sorted(times[one.name])
            seen = x.to(one.dtype)
            expected = seen[:16].double() @ one.exact.t()
            found = one.calls[0](seen)[:16].double()
            yield {
                **common,
                **_row(one.name, spent, one.bytes, base, read),
                "error": float((found - expected).norm() / expected.norm()),
            }
        for kind, row in theirs.items():
            yield {
                **common,
                **_row(f"auto-round-lib {kind}", sorted(row["times"]), row["bytes"], base, read),
                "error": row["error"],
            }


def _row(name: str, spent: list[float], size: int, base: float, read: float) -> dict[str, Any]:
    median = statistics.median(spent)
    return {
        "name": name,
        "median": median,
        "fast": spent[len(spent) // 10],
        "rate": size / median / 1e9,
        "share": size / median / read,
        "speed": base / median,
        "read": read / 1e9,
    }


def _rounds(
    made: list[Candidate], x: Tensor, seconds: float
) -> tuple[dict[str, list[float]], float]:
    """Return (seconds of each call by implementation, bytes per second that memory gives)."""
    times: dict[str, list[float]] = {one.name: [] for one in made}
    reads: list[float] = []
    buffer = large_pages(2 * CACHES).fill_(1)
    inputs = {one.name: x.to(one.dtype) for one in made}
    for one in made:
        one.calls[0](inputs[one.name])
    rounds = 4
    for turn in range(rounds):
        reads += [read_bandwidth(buffer) for _ in range(3)]
        for one in made:
            seen, spent = inputs[one.name], times[one.name]
            until, i = time.perf_counter() + seconds / rounds, turn
            while True:
                call = one.calls[i % len(one.calls)]
                began = time.perf_counter()
                call(seen)
                now = time.perf_counter()
                spent.append(now - began)
                i += 1
                if now > until:
                    break
    return times, statistics.median(reads)


def candidates(weight: Tensor, specs: list[str]) -> list[Candidate]:
    """Return every implementation of a layer with this weight, the yardsticks first."""
    made = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        dense = weight.to(dtype)
        calls = [
            lambda x, w=copy: functional.linear(x, w)
            for copy in _copies(dense, dense.numel() * dense.itemsize)
        ]
        size = dense.numel() * dense.itemsize
        made.append(Candidate(f"{name} F.linear", size, calls, dtype, dense.double()))
    made.append(_aten(weight))
    made += [_ours(weight, name, torch.bfloat16) for name in specs]
    made += [_ours(weight, specs[0], dtype) for dtype in (torch.float16, torch.float32)]
    return made


def _copies(tensor: Tensor, size: int) -> list[Tensor]:
    """Return copies of a weight, one behind the other in large pages as in opened models."""
    count, weight = CACHES // size + 1, tensor.view(-1).view(torch.uint8)
    region = Region(count * room_of(weight))
    return [region.take(weight).view(tensor.dtype).view(tensor.shape) for _ in range(count)]


def _ours(weight: Tensor, name: str, dtype: torch.dtype) -> Candidate:
    spec = SPECS[name]
    numbers = ar_kernels.data_type(spec.data_type)
    quantized = numbers.quantize(weight, spec, numbers.parameters(weight, spec))
    backend = ar_kernels.backend("cpu_native")
    packed = backend.pack(quantized, Need(spec, *weight.shape, "cpu", dtype))
    blob = packed.buffers["blob"]
    packs = [PackedWeight({"blob": b}, packed.meta) for b in _copies(blob, blob.numel())]
    assert isinstance(backend, BindingBackend)
    bound = [(p, backend.bind(p.buffers, p.meta, dtype)) for p in packs]

    def run(x: Tensor, packed: PackedWeight, quick: BoundProduct | None) -> Tensor:
        """Multiply as a layer does."""
        found = None if quick is None else quick(x, packed.buffers)
        return backend.linear(x, packed, None) if found is None else found

    calls = [functools.partial(run, packed=p, quick=q) for p, q in bound]
    label = name if dtype == torch.bfloat16 else f"{name}, {str(dtype).removeprefix('torch.')} x"
    return Candidate(f"ar {label}", blob.numel(), calls, dtype, quantized.dequantize(torch.float64))


def _aten(weight: Tensor) -> Candidate:
    """Return torch's int4 product: symmetric groups of 128, scales in bf16."""
    aten = functools.partial(getattr, torch.ops.aten)
    multiply = aten("_weight_int4pack_mm_for_cpu")
    spec = SPECS["W4 g128"]
    numbers = ar_kernels.data_type("int")
    quantized = numbers.quantize(weight, spec, numbers.parameters(weight, spec))
    packed = aten("_convert_weight_to_int4pack_for_cpu")(quantized.codes.int(), 1)
    scale = quantized.scale.bfloat16().t().contiguous()
    both = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()
    size = packed.numel() + both.numel() * 2
    calls = [lambda x, w=w: multiply(x, w, 128, both) for w in _copies(packed, size)]
    return Candidate(
        "aten int4pack g128", size, calls, torch.bfloat16, quantized.dequantize(torch.float64)
    )


def _peer(
    args: argparse.Namespace, inputs: int, features: int, rows: int, seconds: float
) -> dict[str, Any]:
    """Return the reference implementation's times for one shape, by kind of weight."""
    if args.peer_python is None:
        return {}
    program = Path(__file__).with_name("kernels_peer.py")
    numbers = (inputs, features, rows, torch.get_num_threads(), seconds, CACHES)
    done = subprocess.run(
        [args.peer_python, str(program), *map(str, numbers)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"auto-round-lib failed: {done.stderr[-400:]}", file=sys.stderr)
        return {}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| inputs x features | M | implementation | ms | fastest tenth | GB/s | of read | x bf16 "
        "| error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['inputs']}x{r['features']} | {r['rows']} | {r['name']} "
            f"| {r['median'] * 1e3:.3f} | {r['fast'] * 1e3:.3f} | {r['rate']:.1f} "
            f"| {r['share']:.2f} | {r['speed']:.2f} | {r['error']:.1e} |"
        )
    reads = sorted(r["read"] for r in rows)
    if reads:
        lines += [
            "",
            f"ISA {library.best_isa()}, {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}; memory read at {reads[0]:.0f} to {reads[-1]:.0f} GB/s.",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
