"""The Triton backend without a GPU: interpreted, compiled ahead of time, planned."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ar_kernels.backends import Need
from ar_kernels.backends.cuda_triton import CUDA_TRITON, XPU_TRITON
from ar_kernels.triton import configs, words
from ar_kernels.triton.packing import Packing
from ar_kernels.triton.plan import arch_of, expansion, plan
from ar_schemes import Granularity, Span, TensorSpec, scheme

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
SPECS = {
    "int4": TensorSpec(),
    "int4-g32-asym": TensorSpec(granularity=Granularity(Span.GROUP, (32,)), symmetric=False),
    "int3": TensorSpec(bits=3),
    "int8-channel": TensorSpec(bits=8, granularity=Granularity(Span.CHANNEL), symmetric=False),
    "fp8": scheme("FPW8A16").weight,
    "nvfp4": scheme("NVFP4").weight,
}
TARGETS = ("sm80", "sm90", "sm100", "sm120", "gfx942")
ONE_ROW, TENSOR_CORES = ("int4", 1), ("nvfp4", 64)
MORE = (("int4-g32-asym", 16), ("fp8", 1), ("int8-channel", 200))
COMPILED = [(target, *case) for target in TARGETS for case in (ONE_ROW, TENSOR_CORES)]
COMPILED += [(target, *case) for target in ("sm90", "gfx942") for case in MORE]


@needs_triton
@pytest.mark.slow
def test_the_kernels_are_right_in_the_interpreter(tmp_path: Path) -> None:
    file = Path(__file__).with_name("triton_interpreted.py")
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}", str(file)]
    done = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("target", "name", "rows"), COMPILED)
def test_kernels_compile_ahead_of_time_and_fit_shared_memory(
    target: str, name: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from ar_kernels.triton.aot import compiled

    packing = Packing.of(SPECS[name], 4096, 4096)
    arch = configs.ARCHS[target]
    steps = plan(packing, rows, arch, arch.processors, bias=True, dot="bf16")
    made = compiled(steps.main, packing, target, dtype="bf16")
    assert made.size > 1000
    assert made.shared <= arch.shared


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["int3", "nvfp4"])
def test_expansion_and_joining_compile_ahead_of_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from ar_kernels.triton.aot import compiled

    packing = Packing.of(SPECS[name], 512, 4096)
    arch = configs.ARCHS["sm90"]
    join = plan(packing, 3, arch, arch.processors, bias=True, dot="fp16").join
    assert join is not None
    for launch in (expansion(packing, arch), join):
        assert compiled(launch, packing, "sm90", dtype="fp16").size > 1000


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_hold_the_codes_and_nothing_else(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (7, 300), dtype=torch.uint8)
    low, high = words.pack_words(codes, bits)
    assert torch.equal(words.unpack_words(low, high, bits, 300), codes)
    held = low.element_size() * 8 + (0 if high is None else high.element_size() * 8)
    assert held == words.fields(bits) * (8 if bits == 7 else bits)
    assert low.shape == (words.tiles(300, bits) * 16, 7)


def test_a_field_of_a_tile_is_a_run_of_16_columns() -> None:
    codes = (torch.arange(128) // 16).to(torch.uint8).expand(1, 128)
    low, high = words.pack_words(codes, 4)
    assert high is None
    assert low.flatten().tolist() == [0x76543210] * 16


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("arch", configs.ARCHS.values(), ids=configs.ARCHS)
def test_every_plan_covers_the_product_once(name: str, arch: configs.Arch) -> None:
    packing = Packing.of(SPECS[name], 1000, 2944)
    for rows in (1, 2, 16, 17, 33, 64, 65, arch.dense_rows - 1):
        steps = plan(packing, rows, arch, arch.processors, bias=False, dot="fp16")
        if steps.main.kernel == "expand":
            continue
        block_m = steps.main.constants.get("BLOCK_M", 1)
        blocks_n, *rest = steps.main.grid
        assert blocks_n * steps.main.constants["BLOCK_N"] >= 1000
        blocks_m = rest[0] if "BLOCK_M" in steps.main.constants else 1
        assert blocks_m * block_m >= rows
        assert steps.splits in rest
        assert (steps.splits - 1) * steps.chunk < packing.tiles <= steps.splits * steps.chunk
        assert (steps.join is None) == (steps.splits == 1)
        if not steps.main.constants.get("EARLY", 1):
            assert packing.together % steps.main.constants["BLOCK_FIELDS"] == 0


def test_many_tokens_are_a_dense_product() -> None:
    arch = configs.ARCHS["sm90"]
    packing = Packing.of(SPECS["int4"], 4096, 4096)
    steps = plan(packing, arch.dense_rows, arch, 132, bias=False, dot="bf16")
    assert steps.main == expansion(packing, arch)


@pytest.mark.parametrize(
    ("kind", "version", "expected"),
    [
        ("cuda", "90", "sm90"),
        ("cuda", "86", "sm80"),
        ("cuda", "103", "sm100"),
        ("cuda", "75", "sm80"),
        ("hip", "gfx950", "gfx942"),
        ("xpu", "", "xpu"),
        ("cpu", "", "interpreter"),
    ],
)
def test_an_unknown_architecture_takes_the_nearest_older_row(
    kind: str, version: str, expected: str
) -> None:
    assert arch_of(kind, version).name == expected


def test_each_backend_serves_its_own_device() -> None:
    need = Need(TensorSpec(), 128, 256, "cuda", torch.bfloat16)
    assert CUDA_TRITON.refuses(need) is None
    assert "runs on xpu" in str(XPU_TRITON.refuses(need))
    cpu = Need(TensorSpec(), 128, 256, "cpu", torch.bfloat16)
    assert "runs on cuda, the layer is on cpu" in str(CUDA_TRITON.refuses(cpu))
