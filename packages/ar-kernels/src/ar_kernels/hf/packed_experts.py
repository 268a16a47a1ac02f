"""Experts with a linear layer for every part of every expert: how such a module computes.

What the class of the experts does between the projections is told by what Transformers notes on
it, else by trying: the class's own forward is run on a few small numbers.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ar_kernels.expert_ops import expert_linear
from ar_kernels.linear import QuantLinear

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UP, DOWN = "gate_up_proj", "down_proj"
_WIDTH, _INNER = 4, 3
"""Sizes that a formula is tried on."""
_CLOSE = 1e-4


class _Packed(nn.Module):
    """What experts with a linear layer per part have in common."""

    _up: tuple[str, ...]
    _up_parameter: str
    _down: str
    _experts: Sequence[nn.Module]
    _idle: bool = False
    # of the class it is mixed into
    _apply_gate: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]

    def _run(self, given: Tensor, expert: Tensor) -> Tensor:
        """Return what each token's expert gives, [T, I], for tokens [T, I] and experts int64 [T].

        Numbers beyond the last expert give something that means nothing.
        """
        count = self._count()
        made = self._inner([self._part(leaf, given, expert) for leaf in self._up], expert, count)
        return self._part(self._down, made, expert) + self._bias(DOWN, expert, count)

    def _count(self) -> int:
        return sum(hasattr(one, self._down) for one in self._experts)

    def _part(self, leaf: str, given: Tensor, expert: Tensor) -> Tensor:
        """Return the products of tokens with one part of their experts, [T, O]."""
        layers = [one.get_submodule(leaf) for one in self._experts[: self._count()]]
        first = layers[0]
        ready = [layer.ready() if isinstance(layer, QuantLinear) else None for layer in layers]
        here = [one for one in ready if one is not None]
        alike = len(here) == len(layers) and all(one[1:] == here[0][1:] for one in here)
        if not alike or not isinstance(first, QuantLinear):
            return _one_by_one(layers, given, expert)
        buffers = [tensor for one in here for tensor in one[0]]
        out = expert_linear(given.to(first.dtype), expert, buffers, *here[0][1:], first.rows)
        return out.to(given.dtype)

    def _inner(self, parts: list[Tensor], expert: Tensor, count: int) -> Tensor:
        """Return what the down projections are given, for the products of the other parts."""
        apart = len(parts) > 1 and not getattr(self, "is_concatenated", True)
        inner = torch.stack(parts, -1).flatten(-2) if apart else torch.cat(parts, -1)
        inner = inner + self._bias(self._up_parameter, expert, count)
        if not getattr(self, "has_gate", True):
            return self.act_fn(inner)
        if hasattr(self, "_apply_gate"):
            return self._apply_gate(inner)
        gate, up = inner.chunk(2, -1)
        return up * self.act_fn(gate)

    def _bias(self, parameter: str, expert: Tensor, count: int) -> Tensor | float:
        held = self._parameters.get(f"{parameter}_bias")
        return 0.0 if held is None else held[expert.clamp(max=count - 1)]


def _one_by_one(layers: list[nn.Module], given: Tensor, expert: Tensor) -> Tensor:
    """Return the products with experts stored in different ways, or with inputs of their own."""
    made = given.new_zeros(given.shape[0], int(getattr(layers[0], "out_features", 0)))
    for number in expert.unique().tolist():
        if number < len(layers):
            mine = expert == number
            made[mine] = layers[number](given[mine]).to(made.dtype)
    return made


class PackedExperts(_Packed):
    """Mixin for an experts class of transformers: one linear layer per part of each expert."""

    post_expert_norm: Callable[[Tensor], Tensor]

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *_: Any
    ) -> Tensor:
        """Return the experts' outputs [T, I], weighted and summed over the chosen ones.

        Args:
            hidden_states: [T, I].
            top_k_index: numbers of the chosen experts [T, k]; numbers beyond the last choose none,
                or give the token back (longcat's experts that compute nothing).
            top_k_weights: their weights [T, k].
        """
        tokens, many = top_k_index.shape
        expert = top_k_index.reshape(-1)
        tokens_of = hidden_states.repeat_interleave(many, 0)
        made = self._run(tokens_of, expert)
        if getattr(self, "has_post_expert_norm", False):
            made = self.post_expert_norm(made)
        beyond = top_k_index >= self._count()
        if self._idle:
            made = torch.where(beyond.reshape(-1, 1), tokens_of, made)
        else:
            top_k_weights = top_k_weights.masked_fill(beyond, 0)
        made = made * top_k_weights.reshape(-1, 1)
        return made.to(hidden_states.dtype).view(tokens, many, -1).sum(1)


class PackedSortedExperts(_Packed):
    """The same for experts that are given every token once for each of them (llama4).

    Tokens that are not an expert's come as zeros, and are not computed.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the experts' outputs [E * T, I], for tokens [E * T, I] sorted by expert."""
        count = self._count()
        number = torch.arange(count, device=hidden_states.device)
        idle = hidden_states.eq(0).all(-1)
        expert = number.repeat_interleave(len(hidden_states) // count).masked_fill(idle, count)
        return self._run(hidden_states, expert).masked_fill(idle[:, None], 0)


def pack(
    module: nn.Module,
    experts: Sequence[nn.Module],
    leaves: tuple[Sequence[str], str],
    together: str,
) -> None:
    """Let an experts module run with layers in place of its parameters, which are gone.

    Args:
        module: the experts module.
        experts: what holds the layers of each expert.
        leaves: names of the layers that come first, in the order of their rows, and of the last.
        together: the parameter that they were in.
    """
    kind: Any = type(module)
    module.__class__ = _packed_class(kind, takes_sorted(kind))
    module._up, module._down = tuple(leaves[0]), leaves[1]  # type: ignore[assignment]  # noqa: SLF001
    module._up_parameter = together  # type: ignore[assignment]  # noqa: SLF001
    module._experts = list(experts)  # type: ignore[assignment]  # noqa: SLF001 - not registered


def takes_sorted(kind: Any) -> bool:
    """Tell whether experts are given all tokens for each of them, and nothing else."""
    return len(inspect.signature(kind.forward).parameters) == 2  # noqa: PLR2004 - itself, tokens


def knows(module: nn.Module) -> bool:
    """Tell whether we can do what an experts module does, its parameters still there."""
    gated = hasattr(module, "_apply_gate") or not getattr(module, "has_gate", True)
    if gated or takes_sorted(type(module)):
        return True
    idle = _tried(module)
    if idle is not None:
        module._idle = idle  # type: ignore[assignment]  # noqa: SLF001
    return idle is not None


def _tried(module: nn.Module) -> bool | None:
    """Tell whether numbers beyond the last expert give a token back; None: another formula.

    The usual formula is down(act(gate) * up), gate above up. The class's own forward is run with
    as many experts as the module has, on parameters of a few numbers.
    """
    held = dict(module.named_parameters(recurse=False))
    if held.keys() != {UP, DOWN} or not hasattr(module, "act_fn"):
        return None
    (many, rows, columns), own = held[UP].shape, len(held[DOWN])
    if (columns, rows) != (held[DOWN].shape[1], 2 * held[DOWN].shape[2]):
        return None
    drawn = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=drawn, device="cpu", dtype=torch.float32)
    up, down = draw(many, 2 * _INNER, _WIDTH), draw(own, _WIDTH, _INNER)
    some = sorted({0, own // 2, own - 1, many - 1})
    index = torch.tensor([[n, some[(i + 1) % len(some)]] for i, n in enumerate(some)], device="cpu")
    tokens, weights = draw(len(some), _WIDTH), draw(len(some), 2).abs()
    tiny = copy.copy(module)
    tiny.__dict__["_parameters"] = {
        name: nn.Parameter(value, requires_grad=False) for name, value in ((UP, up), (DOWN, down))
    }
    try:
        theirs = type(module).forward(tiny, tokens, index, weights)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None
    for idle in (False, True):
        ours = torch.zeros(len(some), _WIDTH, device="cpu")
        for place in range(2):
            number = index[:, place]
            inner = torch.einsum("toi,ti->to", up[number], tokens)
            gate, wide = inner.chunk(2, -1)
            made = module.act_fn(gate) * wide  # type: ignore[operator]
            made = torch.einsum("toi,ti->to", down[number.clamp(max=own - 1)], made)
            beyond = (number >= own)[:, None]
            made = torch.where(beyond, tokens * idle, made)
            ours += made * weights[:, place, None]
        alike = torch.is_tensor(theirs) and theirs.shape == ours.shape
        if alike and torch.allclose(theirs, ours, atol=_CLOSE, rtol=_CLOSE):
            return idle
    return None


@functools.cache
def _packed_class(kind: Any, takes_sorted: bool) -> Any:
    packed = PackedSortedExperts if takes_sorted else PackedExperts
    return type(f"Packed{kind.__name__}", (packed, kind), {})
