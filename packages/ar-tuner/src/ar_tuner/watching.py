"""See, or change, what layers of a block are given: linear layers, and single experts.

Linear layers have hooks. Experts in one parameter have none, since no module is called for one of
them; there the products themselves are watched (a `TorchFunctionMode`, for the time of a call, in
the thread that runs the block), and the place of a factor's memory tells which expert it is of.
Transformers' fused kernels would show all experts' tokens at once, so its plain loop runs
meanwhile.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from ar_tuner.parts import WeightRef

    Watch = Callable[[Sequence[WeightRef], Tensor], Tensor | None]

_PRODUCTS = frozenset(
    {
        functional.linear,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.Tensor.mm,
        torch.Tensor.bmm,
    }
)
_PLAIN = "eager"
_MANY = 3


@contextlib.contextmanager
def watching(block: nn.Module, refs: Sequence[WeightRef], watch: Watch) -> Iterator[None]:
    """Call `watch` whenever layers of a block are given something, as long as the context lasts.

    Args:
        block: the block; it may run with replaced parameters.
        refs: the layers.
        watch: called with layers that are given the same (the projections of one expert), and
            with that, [..., I]; a tensor that it returns is what they are given instead. Tokens
            that are not an expert's are left out where the model pads with zeros.
    """
    experts = [ref for ref in refs if not ref.whole]
    with contextlib.ExitStack() as stack:
        for ref in refs:
            if ref.whole:
                module = block.get_submodule(ref.module)
                stack.callback(module.register_forward_pre_hook(_hook(ref, watch)).remove)
        if experts:
            holders = _holders(block, experts)
            stack.enter_context(_plain_loop([h.module for h in holders]))
            stack.enter_context(_Listening(holders, watch))
        yield


def _hook(ref: WeightRef, watch: Watch) -> Callable[..., tuple[Tensor, ...] | None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:  # noqa: ARG001
        changed = watch((ref,), args[0])
        return None if changed is None else (changed, *args[1:])

    return hook


@dataclass(frozen=True)
class _Holder:
    """A parameter that holds experts: by expert, the layers that are watched."""

    module: nn.Module
    leaf: str
    experts: dict[int, tuple[WeightRef, ...]]

    def expert_of(self, factor: Tensor) -> int | None:
        """Return which expert a factor is, -1 for all of them at once, None for something else."""
        stored: Tensor = getattr(self.module, self.leaf)
        if stored.untyped_storage().data_ptr() != factor.untyped_storage().data_ptr():
            return None
        if factor.ndim == _MANY and factor.numel() == stored.numel():
            return -1
        away = factor.storage_offset() - stored.storage_offset()
        if factor.numel() != stored[0].numel() or away % stored.stride(0):
            return None
        index = away // stored.stride(0)
        return index if 0 <= index < stored.shape[0] else None


def _holders(block: nn.Module, refs: Sequence[WeightRef]) -> list[_Holder]:
    grouped: dict[str, dict[int, list[WeightRef]]] = {}
    for ref in refs:
        assert ref.expert is not None
        grouped.setdefault(ref.parameter, {}).setdefault(ref.expert, []).append(ref)
    return [
        _Holder(
            block.get_submodule(name.rpartition(".")[0]),
            name.rpartition(".")[2],
            {expert: tuple(members) for expert, members in experts.items()},
        )
        for name, experts in grouped.items()
    ]


@contextlib.contextmanager
def _plain_loop(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Have experts run in Transformers' plain loop."""
    configs: dict[int, Any] = {}
    for module in modules:
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            configs[id(config)] = config
    before = {key: config._experts_implementation for key, config in configs.items()}  # noqa: SLF001
    try:
        for config in configs.values():
            config._experts_implementation = _PLAIN  # noqa: SLF001
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]  # noqa: SLF001


class _Listening(TorchFunctionMode):
    """Watches products with experts."""

    def __init__(self, holders: Sequence[_Holder], watch: Watch) -> None:
        super().__init__()
        self._holders = holders
        self._watch = watch

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],  # noqa: ARG002
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return what the function gives, its first factor being what `watch` makes of it."""
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], torch.Tensor):
            for holder in self._holders:
                expert = holder.expert_of(args[1])
                if expert is not None:
                    args = (self._given(holder, expert, args[0]), *args[1:])
                    break
        return func(*args, **(kwargs or {}))

    def _given(self, holder: _Holder, expert: int, x: Tensor) -> Tensor:
        if expert >= 0:
            refs = holder.experts.get(expert)
            changed = None if refs is None else self._watch(refs, x)
            return x if changed is None else changed
        out = x
        for index, refs in holder.experts.items():
            routed = x[index].detach().ne(0).any(-1)
            changed = self._watch(refs, x[index][routed])
            if changed is not None:
                places = routed.nonzero().squeeze(-1) + index * x.shape[1]
                flat = out.reshape(-1, x.shape[-1])
                out = flat.index_copy(0, places, changed.to(x.dtype)).reshape(x.shape)
        return out
