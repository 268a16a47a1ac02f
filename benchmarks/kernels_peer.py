"""Times of auto-round-lib's CPU kernel for one layer; run by kernels.py in another environment.

    python kernels_peer.py INPUTS FEATURES ROWS THREADS SECONDS CACHES

Symmetric int4 in groups of 128, compute type "auto", activations in float32 (its layers convert to
that). Prints JSON: by kind of weight, the seconds of each call, bytes of the packed weight, and the
relative error against float64.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

import auto_round_kernel as peer
import torch

GROUP = 128


def main() -> None:
    """Pack a random weight, time calls over copies that exceed the caches, print."""
    inputs, features, rows, threads = (int(n) for n in sys.argv[1:5])
    seconds, caches = float(sys.argv[5]), int(sys.argv[6])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (inputs, features), dtype=torch.int8)
    scale = torch.rand(inputs // GROUP, features) * 0.01 + 0.001
    kind = ("auto", "int4", "fp32", False)
    nothing = torch.empty(0, dtype=torch.int8)
    repack = vars(peer)["_repack_quantized_weight_core"]
    blob = repack(codes, scale, nothing, GROUP, *kind)
    copies = _copies(blob, caches // blob.numel() + 1)
    x, bias = torch.randn(rows, inputs), torch.zeros(features)
    dense = codes.double() * scale.double().repeat_interleave(GROUP, 0)

    def call(one: torch.Tensor) -> torch.Tensor:
        return peer.woqgemm(x, one, bias, features, inputs, GROUP, *kind)

    expected = x.double() @ dense
    error = float((call(blob).double() - expected).norm() / expected.norm())
    times, until, i = [], time.perf_counter() + seconds, 0
    while time.perf_counter() < until or len(times) < 5:
        began = time.perf_counter()
        call(copies[i % len(copies)])
        times.append(time.perf_counter() - began)
        i += 1
    row = {"times": times, "bytes": blob.numel(), "error": error}
    print(json.dumps({"int4 g128, float32 x": row}))


def _copies(blob: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Return copies of a weight, one behind the other in large pages, as ours lie."""
    page, align, huge_page = 2 << 20, 64, 14
    room = -(-blob.nbytes // align) * align
    whole = torch.empty(count * room + page, dtype=torch.uint8)
    begin = -whole.data_ptr() % page
    home = whole[begin : begin + count * room]
    size = ctypes.c_size_t(count * room // page * page)
    ctypes.CDLL(None).madvise(ctypes.c_void_p(home.data_ptr()), size, huge_page)
    places = (home[i * room : i * room + blob.nbytes] for i in range(count))
    return [place.view(blob.dtype).view(blob.shape).copy_(blob) for place in places]


if __name__ == "__main__":
    main()
