"""What is put in the place of a model's float parts when it decodes on the CPU.

Beside the quantized layers, a decoding step spends its time in the output head, in norms made of
half a dozen small operations each, and in an attention kernel meant for long prompts. A model of a
quantized checkpoint gets ours for these: the same computation, rounded in other places.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ar_kernels.hf.compact_head import compact_head
from ar_kernels.hf.head import OWN, asked_bits, round_head
from ar_kernels.hf.memory import Returning, trim
from ar_kernels.linear import QuantLinear
from ar_kernels.native import arena, library, steps
from ar_kernels.native.modules import NativeLinear, NativeNorm, norm_formula

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

ENV = "AR_KERNELS_DECODING"
"""`plain` leaves a model's float parts as they are."""
_EVERY = 8 << 20
"""Bytes of weights after which memory that they moved out of is given back."""
_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_FORMS = (steps.ROUNDS_FIRST, steps.ADDS_ONE, steps.PLAIN)


def speed_up(
    model: Any, head_bits: int | None = None, returning: Returning | None = None
) -> dict[str, int]:
    """Put our float parts into a model on the CPU, and return how many of which.

    Nothing where the compiled kernels are missing or `AR_KERNELS_DECODING=plain` says so, except
    for a head that is asked for.

    Args:
        model: of transformers.
        head_bits: width to round a float output head to, 16: leave it; None: as the environment
            says, else it is made compact where it is bf16.
        returning: gives memory of the checkpoint's files back.

    Raises:
        KernelError: such a head cannot be made.
    """
    bits = asked_bits(head_bits)
    rounded = {}
    if bits is not None and bits != OWN and round_head(model, bits):
        rounded = {"rounded head": 1}
    if os.environ.get(ENV) == "plain" or library.missing() is not None:
        return rounded
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return rounded
    done = rounded | {
        "norms": _norms(model),
        "float layers": _layers(model),
        "attention": _attention(model),
    }
    if bits is None:
        done["compact head"] = int(compact_head(model, returning))
    _settle(model)
    if done["attention"]:
        from ar_kernels.hf import blocks

        done["blocks as one step"] = blocks.take_blocks(model)
    return {what: count for what, count in done.items() if count}


def _settle(model: nn.Module) -> None:
    """Move packed weights into large pages, in the order in which they are read.

    Not a float head: moving 311 MB gained nothing, and what is made compact lies in large pages.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    left = sum(arena.room_of(blob) for m in layers if (blob := m.packed_blob()) is not None)
    region, moved = arena.Region(0), 0
    for layer in layers:
        blob = layer.packed_blob()
        if blob is None:
            continue
        size = arena.room_of(blob)
        if not region.fits(blob):
            region = arena.Region(max(size, min(left, arena.REGION)))
        layer.settle(region.take(blob))
        left, moved = left - size, moved + size
        del blob
        if moved >= _EVERY:  # what was moved out of may go
            trim()
            moved = 0
    trim()


def _norms(model: nn.Module) -> int:
    """Replace RMS norms."""
    found = rms_norms(model)
    for one in found:
        weight = one.module.get_parameter("weight")
        model.set_submodule(one.name, NativeNorm(weight, one.epsilon, one.form))
    return len(found)


@dataclass(frozen=True)
class RmsNorm:
    """A norm of a model: its name, the module, what it adds to the mean square, and its form."""

    name: str
    module: nn.Module
    epsilon: float
    form: int


def rms_norms(model: nn.Module) -> list[RmsNorm]:
    """Return the RMS norms of a model on the CPU that compute one of the forms of `steps.norm`.

    Modules of one class, width and epsilon are tried once.
    """
    out = []
    forms: dict[tuple[object, ...], int | None] = {}
    for name, module in list(model.named_modules()):
        epsilon = _epsilon(module) if type(module).__name__.endswith("RMSNorm") else None
        if epsilon is None:
            continue
        weight = module.get_parameter("weight")
        key = (type(module), epsilon, weight.shape, weight.dtype)
        if key not in forms:
            forms[key] = norm_form(module, epsilon)
        form = forms[key]
        if form is not None:
            out.append(RmsNorm(name, module, epsilon, form))
    return out


def _epsilon(module: nn.Module) -> float | None:
    """Return the epsilon of what looks like a norm with one weight that we can take."""
    found = [e for key in _EPSILONS if isinstance(e := getattr(module, key, None), float)]
    held = dict(module.named_parameters())
    if len(found) != 1 or held.keys() != {"weight"}:
        return None
    weight = held["weight"]
    if weight.dtype not in library.DTYPES or not weight.is_cpu or _is_watched(module):
        return None
    takes = inspect.signature(module.forward).parameters
    wide = weight.dim() == 1 and weight.shape[0] % steps.WIDTH == 0
    return found[0] if wide and len(takes) == 1 and not list(module.buffers()) else None


def norm_form(module: nn.Module, epsilon: float) -> int | None:
    """Return the form of an RMS norm, found by trying it on random numbers; None: none of ours."""
    weight = module.get_parameter("weight")
    drawn = torch.Generator().manual_seed(0)
    mine, x = (torch.randn(n, len(weight), generator=drawn).to(weight.dtype) for n in (1, 8))
    x[4:] *= epsilon**0.5  # where epsilon counts
    tried = copy.deepcopy(module)
    tried.weight = nn.Parameter(mine[0])
    with torch.inference_mode():
        seen = tried(x)
        for form in _FORMS:
            if _same(seen, norm_formula(x, mine[0], epsilon, form)):
                return form
    return None


def _is_watched(module: nn.Module) -> bool:
    """Tell whether somebody hooked into a module, who would lose it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001 - no other way


def _same(seen: object, expected: Tensor) -> bool:
    return isinstance(seen, torch.Tensor) and torch.equal(seen, expected)


def _layers(model: nn.Module) -> int:
    """Replace float layers of exactly torch's class."""
    count = 0
    for name, module in list(model.named_modules()):
        ours = type(module) is nn.Linear and module.weight.dtype in library.DTYPES
        if ours and not _is_watched(module):
            model.set_submodule(name, NativeLinear.of(module))
            count += 1
    return count


def _attention(model: Any) -> int:
    """Ask the model for our attention where it has `sdpa` and nothing of its own for that name."""
    from ar_kernels.hf import attention

    if _attention_name(model) != "sdpa":
        return 0
    for kind in {type(m) for m in model.modules() if hasattr(m, "set_attn_implementation")}:
        home = sys.modules.get(kind.__module__)
        # some models treat `sdpa` by name, which another name would leave out
        if home is None or '"sdpa"' in _source(home.__name__):
            return 0
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return int(_attention_name(model) == attention.NAME)


def _attention_name(model: Any) -> str | None:
    name: str | None = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return name


@functools.cache
def _source(module: str) -> str:
    file = inspect.getsourcefile(sys.modules[module])
    return "" if file is None else inspect.getsource(sys.modules[module])
