"""Decoder blocks of the usual kind run as one step when a model decodes on the CPU.

Usual: a norm, attention with rotated queries and keys (their heads normed or not), a residual
sum, a norm, a gated perceptron, a residual sum. Told by the names of a block's modules, and then by
trying: a block is taken only if our step gives what the block itself does.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ar_kernels.hf.attention import NAME
from ar_kernels.hf.chain import Chain, Given
from ar_kernels.hf.growing import LayerMemory
from ar_kernels.hf.taken import Taken
from ar_kernels.linear import QuantLinear
from ar_kernels.native import library, steps
from ar_kernels.native.layer import Parts
from ar_kernels.native.modules import NativeNorm
from ar_kernels.native.watched import WatchedModules

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_PERCEPTRON = ("gate_proj", "up_proj", "down_proj")
_SPOKEN = (
    *("hidden_states", "attention_mask", "position_ids", "past_key_values", "use_cache"),
    "position_embeddings",
)
_MOST = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""How far our step may be from the block on random numbers, relative: rounding, where the block
rounds between its operations, but no other formula. Seen: 1.5e-7, 6e-4, 6e-3."""
MOST_SEQUENCES = 4


class NativeBlock(nn.Module):
    """Mixed into a block's own class: one token of each sequence at a time goes our way."""

    ar_taken: Taken
    ar_chain: Chain
    ar_place: int
    self_attn: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what the block returns."""
        if past_key_values is not None and position_embeddings is not None:
            out = self._fast(
                hidden_states, attention_mask, past_key_values, position_embeddings, kwargs
            )
            if out is not None:
                return out
        return super().forward(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )

    def _fast(
        self,
        x: Tensor,
        mask: Tensor | None,
        cache: Any,
        turning: tuple[Tensor, Tensor],
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Return the output, None where this is not for us."""
        if self.training or not _is_one_token(x):
            return None
        if any(value is not None and value is not False for value in kwargs.values()):
            return None
        given = Given(mask, *turning, cache)
        place, chain = self.ar_place, self.ar_chain
        if place and (out := chain.output(x, place, given)) is not None:
            return out
        taken = self.ar_taken
        if not taken.is_as_it_was() or not _is_ours(self.self_attn) or not _fit(x, given, taken):
            return None
        if not place and (out := chain.output(x, place, given)) is not None:
            return out
        chain.note(place, given)
        rows, parts = len(x), taken.parts
        step = taken.step(rows, x.dtype)
        if not step.busy.acquire(blocking=False):
            return None
        try:
            shape = rows, parts.kv_heads, 1, parts.width
            memory = LayerMemory(cache, self.self_attn.layer_idx, shape, x.dtype)
            cos, sin = given.cos.contiguous(), given.sin.contiguous()
            return step.run(x.contiguous(), (cos, sin), mask, memory)
        finally:
            step.busy.release()


def _is_one_token(x: Tensor) -> bool:
    """Tell whether x is a plain tensor [B, 1, I] of few sequences, without gradients."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or x.dim() != 3:  # noqa: PLR2004
        return False
    rows, new, _ = x.shape
    if new != 1 or not 0 < rows <= MOST_SEQUENCES or not x.is_cpu:
        return False
    return not (torch.is_grad_enabled() and x.requires_grad or is_in_torch_dispatch_mode())


def _fit(x: Tensor, given: Given, taken: Taken) -> bool:
    """Tell whether mask and position are of the kinds that our step takes."""
    mask, cos, parts = given.mask, given.cos, taken.parts
    if mask is not None and not (mask.dtype == torch.bool and mask.dim() == 4):  # noqa: PLR2004
        return False
    if cos.dtype != x.dtype or cos.shape[-1] != parts.width or cos.shape[0] not in (1, len(x)):
        return False
    return x.dtype == parts.linears[0].dtype


def take_blocks(model: nn.Module) -> int:
    """Let the blocks that we can run as one step do so, and return how many."""
    count = 0
    for block in list(model.modules()):
        parts = parts_of(block)
        if parts is None:
            continue
        kind: Any = type(block)
        attention, perceptron = block.get_submodule("self_attn"), block.get_submodule("mlp")
        block.ar_taken = Taken(  # type: ignore[assignment]
            parts,
            WatchedModules(
                (
                    *_found(block, _BLOCK),
                    *_found(attention, (*_ATTENTION, *_HEAD_NORMS)),
                    *_found(perceptron, _PERCEPTRON),
                )
            ),
        )
        block.ar_chain, block.ar_place = Chain(), 0  # type: ignore[assignment]
        block.__class__ = _mixed(kind)
        if _agrees(block, kind, parts):
            count += 1
        else:
            block.__class__ = kind
            del block.ar_taken, block.ar_chain, block.ar_place
    _link(model)
    return count


def _link(model: nn.Module) -> None:
    """Chain blocks of one kind that follow one another in a list."""
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList):
            for _, run in itertools.groupby(blocks, _kind):
                taken: list[Any] = list(run)
                if not isinstance(taken[0], NativeBlock):
                    continue
                layers = [block.self_attn.layer_idx for block in taken]
                chain = Chain([block.ar_taken for block in taken], layers)
                for place, block in enumerate(taken):
                    block.ar_chain, block.ar_place = chain, place


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Return what the blocks of a chain have in common; those that are not taken: nothing."""
    if not isinstance(block, NativeBlock):
        return (None,)
    parts = block.ar_taken.parts
    first = parts.linears[0]
    return parts.heads, parts.kv_heads, parts.width, first.columns, first.dtype


def _found(owner: nn.Module, names: tuple[str, ...]) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Return where a module holds children: (its table, name, child) of those that it has."""
    held = vars(owner)["_modules"]
    return [(held, name, held[name]) for name in names if name in held]


@functools.cache
def _mixed(kind: Any) -> Any:
    """Return a class of blocks with ours in front; named as it was, in print-outs too."""
    return type(kind.__name__, (NativeBlock, kind), {"__module__": kind.__module__})


def parts_of(block: nn.Module) -> Parts | None:
    """Return the parts of a block of the usual kind, None for any other."""
    children = dict(block.named_children())
    if children.keys() != set(_BLOCK) or list(block.parameters(recurse=False)):
        return None
    spoken = inspect.signature(type(block).forward).parameters
    if not set(_SPOKEN) <= spoken.keys():
        return None
    attention, perceptron = children["self_attn"], children["mlp"]
    inside, gated = dict(attention.named_children()), dict(perceptron.named_children())
    if not _is_silu(gated.pop("act_fn", None)) or gated.keys() != set(_PERCEPTRON):
        return None
    normed = set(_HEAD_NORMS) <= inside.keys()
    if inside.keys() != {*_ATTENTION, *(_HEAD_NORMS if normed else ())}:
        return None
    outer: Any = tuple(inside[name] for name in _ATTENTION)
    inner: Any = tuple(gated[name] for name in _PERCEPTRON)
    norms: Any = (children[_BLOCK[0]], children[_BLOCK[2]])
    head_norms: Any = tuple(inside[name] for name in _HEAD_NORMS) if normed else ()
    linears = (*outer, *inner)
    if not all(isinstance(m, NativeNorm) for m in norms + head_norms):
        return None
    if any(not isinstance(m, QuantLinear) or m.packed_blob() is None for m in linears):
        return None
    width, scale = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if not isinstance(width, int) or not isinstance(scale, float) or width % (2 * steps.WIDTH):
        return None
    if not isinstance(getattr(attention, "layer_idx", None), int) or not _is_ours(attention):
        return None
    heads, kv_heads = linears[0].rows // width, linears[1].rows // width
    made = Parts(norms, head_norms or None, outer, inner, heads, kv_heads, width, scale)
    return made if _fits(made) else None


def _is_silu(act: nn.Module | None) -> bool:
    """Tell whether an activation computes x / (1 + e^-x)."""
    x = torch.linspace(-8, 8, 65)
    return act is not None and torch.allclose(act(x), functional.silu(x), atol=1e-6)


def _is_ours(attention: Any) -> bool:
    """Tell whether a block's attention is asked for under our name."""
    return getattr(getattr(attention, "config", None), "_attn_implementation", None) == NAME


def _fits(parts: Parts) -> bool:
    """Tell whether the shapes of a block's parts fit each other and the kernels."""
    q, k, v, o = parts.attention
    gate, up, down = parts.perceptron
    hidden, inner, width = q.columns, gate.rows, parts.width
    shapes = [(one.rows, one.columns) for one in parts.linears]
    wanted = [(parts.heads * width, hidden), *[(parts.kv_heads * width, hidden)] * 2]
    wanted += [(hidden, parts.heads * width), *[(inner, hidden)] * 2, (hidden, inner)]
    kinds = {m.dtype for m in parts.linears} | {m.weight.dtype for m in parts.norms}
    kinds |= {m.weight.dtype for m in parts.head_norms or ()}
    wide = all(m.weight.shape[0] == hidden for m in parts.norms)
    wide &= all(m.weight.shape[0] == width for m in parts.head_norms or ())
    fits = len(kinds) == 1 and kinds <= library.DTYPES.keys() and parts.heads % parts.kv_heads == 0
    sizes = hidden % steps.WIDTH == inner % steps.WIDTH == 0 and width <= steps.MOST_WIDTH
    return fits and wide and sizes and shapes == wanted


def _agrees(block: Any, kind: Any, parts: Parts) -> bool:
    """Tell whether our step gives what the block does, on random numbers and a short cache."""
    from transformers import DynamicCache

    dtype, drawn = parts.linears[0].dtype, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn)

    # small beside what the block adds, which is then not lost in rounding
    x = 0.02 * random(2, 1, parts.linears[0].columns).to(dtype)
    angles = 3 * random(2, 1, parts.width)
    turning = angles.cos().to(dtype), angles.sin().to(dtype)
    past = [random(2, parts.kv_heads, 5, parts.width).to(dtype) for _ in range(2)]
    outs = []
    with torch.inference_mode():
        for ours in (True, False):
            cache = DynamicCache()
            cache.update(*(t.clone() for t in past), block.self_attn.layer_idx)
            forward = block._fast if ours else functools.partial(kind.forward, block)  # noqa: SLF001
            if ours:
                out = forward(x, None, cache, turning, {})
            else:
                out = forward(x, past_key_values=cache, position_embeddings=turning)
            if not isinstance(out, torch.Tensor) or out.shape != x.shape:
                return False
            held = cache.layers[block.self_attn.layer_idx]
            outs.append((out - x, held.keys[:, :, -1], held.values[:, :, -1]))
    off = [(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(*outs, strict=True)]
    return all(bool(o < _MOST[dtype]) for o in off)
