"""Runs a plan on tensors. Importing this module imports Triton."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl

from ar_kernels.triton import kernels
from ar_kernels.triton.plan import Launch, Plan, arch_of, expansion, plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_kernels.triton.configs import Arch
    from ar_kernels.triton.packing import Packing

_DOT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def linear(
    x: Tensor, packing: Packing, buffers: Mapping[str, Tensor], bias: Tensor | None
) -> Tensor:
    """Return x [..., I] times a packed weight [O, I] transposed, plus bias [O]: [..., O].

    No synchronisation with the host; sizes depend on shapes alone, so that graphs can be
    captured.
    """
    flat = x.reshape(-1, packing.columns).contiguous()
    rows = flat.shape[0]
    out = torch.empty(rows, packing.rows, dtype=x.dtype, device=x.device)
    if rows:
        arch, processors = device_facts(x.device.type, x.device.index)
        dot = "fp32" if arch.name == "interpreter" else _DOT[x.dtype]
        steps = plan(packing, rows, arch, processors, bias=bias is not None, dot=dot)
        with _on(x.device):
            _run(steps, flat, packing, buffers, bias, out)
    return out.reshape(*x.shape[:-1], packing.rows)


def tl_type(name: str) -> Any:
    """Return Triton's type of a name: `fp16`, `bf16` or `fp32`."""
    return {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}[name]


def dense(packing: Packing, buffers: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return the weight transposed, [I, O]."""
    device = buffers["words"].device
    out = torch.empty(packing.columns, packing.rows, dtype=dtype, device=device)
    with _on(device):
        launch = expansion(packing, device_facts(device.type, device.index)[0])
        _start(launch, *_weight(buffers), out, packing.rows, packing.columns, packing.groups)
    return out


@functools.cache
def device_facts(kind: str, index: int | None) -> tuple[Arch, int]:
    """Return the architecture of a device and its number of processors."""
    if kind == "cpu":
        arch = arch_of("cpu", "")
        return arch, arch.processors
    if kind == "xpu":
        found: Any = torch.xpu.get_device_properties(index)
        arch = arch_of("xpu", "")
        return arch, int(getattr(found, "gpu_subslice_count", arch.processors))
    found = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    version = found.gcnArchName if hip else f"{found.major}{found.minor}"
    return arch_of("hip" if hip else "cuda", version), found.multi_processor_count


def _run(
    steps: Plan,
    x: Tensor,
    packing: Packing,
    buffers: Mapping[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
) -> None:
    rows, n = out.shape
    if steps.main.kernel == "expand":
        torch.mm(x, dense(packing, buffers, x.dtype), out=out)
        if bias is not None:
            out.add_(bias)
        return
    whole = buffers.get("whole")
    target = out
    if steps.join is not None:
        target = torch.empty(steps.splits, rows, n, dtype=torch.float32, device=x.device)
    sizes = (rows, n, packing.columns, packing.tiles, packing.groups, steps.chunk)
    _start(steps.main, x, *_weight(buffers), bias, target, *sizes)
    if steps.join is not None:
        _start(steps.join, target, whole, bias, out, rows * n, n)


def _weight(buffers: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(buffers.get(name) for name in ("words", "high", "scale", "zero", "whole"))


def _start(launch: Launch, *args: Any) -> None:
    constants: dict[str, Any] = dict(launch.constants)
    if "DOT" in constants:
        constants["DOT"] = tl_type(constants["DOT"])
    kernel = getattr(kernels, launch.kernel)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    kernel[launch.grid](*args, **constants, **options)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which Triton launches on a device."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)
