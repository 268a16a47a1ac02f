"""A whole model as a function of its parameters, quantized or float, with gradients."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ar_kernels.hf.decoding import rms_norms
from ar_kernels.native import library
from ar_tuner.activations import quantized_activations, static_ranges
from ar_tuner.norms import fast_norms
from ar_tuner.short import ShortRows
from ar_tuner.walk import without_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_kernels.hf.decoding import RmsNorm
    from ar_tuner.blocks import Block
    from ar_tuner.others import Inputs
    from ar_tuner.pipeline import Job
    from ar_tuner.stages import Parameter

    Context = contextlib.AbstractContextManager[None]


def whole_model(
    job: Job,
    weights: Mapping[str, QuantizedWeight],
    floats: Mapping[str, Tensor],
    *,
    flat: bool = False,
) -> Callable[[Mapping[str, Parameter], Tensor | Inputs, bool], Tensor]:
    """Return the function of `ModelTask.logits`.

    Args:
        job: the walk that is done; its model holds the dequantized weights.
        weights: quantized weights by layer name; they carry the ranges of activations.
        floats: float parameters by name, in place when the float model is asked for.
        flat: blocks of the quantized model keep nothing for the backward pass, and parameters may
            be functions.
    """

    norms = [] if library.missing() else rms_norms(job.model)

    def logits(
        replaced: Mapping[str, Parameter],
        rows: Tensor | Inputs,
        quantized: bool,  # noqa: FBT001
    ) -> Tensor:
        if isinstance(rows, torch.Tensor):
            inputs = dict(job.adapter.inputs(job.model, rows))
        else:
            inputs = dict(job.as_given(rows))
        with contextlib.ExitStack() as stack:
            if quantized and flat:
                replaced = stack.enter_context(_recomputed(job, weights, replaced, norms))
            elif quantized:
                for block in job.blocks:
                    stack.enter_context(_activations(block, job, weights))
            stack.enter_context(_faster(norms))
            names = {k: _made(v) for k, v in replaced.items()}
            output: Any = functional_call(
                job.model, names if quantized else {**floats, **names}, (), inputs
            )
        found: Tensor = output.logits
        return found

    return logits


def _made(value: Parameter) -> Tensor:
    return value if isinstance(value, torch.Tensor) else value()


def _activations(block: Block, job: Job, weights: Mapping[str, QuantizedWeight]) -> Context:
    """Return the context in which the activations of a block are quantized as they will be."""
    targets = job.targets(block)
    if all(t.scheme.activation is None for t in targets):
        return contextlib.nullcontext()
    mine = {t.ref.layer: weights[t.ref.layer] for t in targets}
    return quantized_activations(block.module, targets, static_ranges(mine))


@contextlib.contextmanager
def _faster(norms: Sequence[RmsNorm]) -> Iterator[None]:
    """Have attention of short rows and norms computed by ar-kernels; may be nested."""
    with ShortRows(), fast_norms(norms):
        yield


@contextlib.contextmanager
def _recomputed(
    job: Job,
    weights: Mapping[str, QuantizedWeight],
    replaced: Mapping[str, Parameter],
    norms: Sequence[RmsNorm],
) -> Iterator[Mapping[str, Parameter]]:
    """Have blocks compute with what is replaced in them, again in the backward pass.

    Yields what is replaced outside of the blocks.
    """
    with contextlib.ExitStack() as stack:
        rest = dict(replaced)
        for block in job.blocks:
            prefix = f"{block.name}."
            inside = {
                k.removeprefix(prefix): rest.pop(k) for k in list(rest) if k.startswith(prefix)
            }
            stack.enter_context(_one_recomputed(block, job, weights, inside, norms))
        yield rest


@contextlib.contextmanager
def _one_recomputed(
    block: Block,
    job: Job,
    weights: Mapping[str, QuantizedWeight],
    replaced: Mapping[str, Parameter],
    norms: Sequence[RmsNorm],
) -> Iterator[None]:
    module = block.module
    own, plain = "forward" in module.__dict__, module.forward
    depth = 0

    def compute(*args: object, **kwargs: object) -> object:
        nonlocal depth
        depth += 1
        try:
            # in the backward pass nothing around the model's call is left
            with _faster(norms), _activations(block, job, weights):
                made = {name: _made(value) for name, value in replaced.items()}
                return functional_call(module, made, args, kwargs)
        finally:
            depth -= 1

    def forward(*args: Any, **kwargs: Any) -> object:
        if depth:  # `compute` calls the module, whose forward is this one
            return plain(*args, **kwargs)
        kwargs = without_cache(kwargs)
        if not torch.is_grad_enabled():
            return compute(*args, **kwargs)
        found: object = checkpoint(
            compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )
        return found

    module.forward = forward
    try:
        yield
    finally:
        if own:
            module.forward = plain
        else:
            del module.forward
