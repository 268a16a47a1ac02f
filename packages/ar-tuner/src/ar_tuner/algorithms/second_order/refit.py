"""Least-squares scales for codes that stay: one group after the other, errors carried on."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from ar_kernels import data_type
from ar_kernels.numerics import Params, map_groups, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from ar_schemes import TensorSpec


def refits(spec: TensorSpec, params: Params) -> bool:
    """Tell whether scales can be refitted one by one: those of a super group cannot."""
    plain = all(v.shape == params.scale.shape or v.numel() == 1 for v in params.extra.values())
    return spec.super_group is None and plain


def refit(
    goal: Tensor, values: Tensor, spec: TensorSpec, params: Params, *, gram: Tensor
) -> tuple[Tensor, Params]:
    """Return (values, params) with scales fitted to the codes, J no larger than before.

    The step of a group's scale is that of J's parabola in it, rounded as stored; a group whose
    rounded step does not lower J keeps its scale.

    Args:
        goal: what J measures the distance to, [O, I].
        values: on the grid of `params`, [O, I].
        spec: representation.
        params: parameters.
        gram: H in storage order.
    """
    values = values.clone()
    pull = (goal - values) @ gram
    _, width = spec.granularity.region(*values.shape)
    changed = []
    for group in range(params.scale.shape[-1]):
        where = slice(group * width, (group + 1) * width)
        own = map_groups(params, functools.partial(torch.narrow, dim=-1, start=group, length=1))
        new, own = _one(values[:, where], pull[:, where], spec, own, gram[where, where])
        pull.addmm_(new - values[:, where], gram[where], alpha=-1)
        values[:, where] = new
        changed.append(own)
    scale = torch.cat([p.scale for p in changed], dim=-1)
    extra = {
        name: torch.cat([p.extra[name] for p in changed], dim=-1)
        if value.shape == params.scale.shape
        else value
        for name, value in params.extra.items()
    }
    return values, Params(scale, params.zero_point, extra)


def _one(
    values: Tensor, pull: Tensor, spec: TensorSpec, params: Params, gram: Tensor
) -> tuple[Tensor, Params]:
    """Return the values [O, n] and parameters of one group, refitted."""
    kind = data_type(spec.data_type)
    rows = values.shape[0] // params.scale.shape[-2]

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(rows, dim=-2).expand(values.shape)

    def summed(x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True).unflatten(0, (-1, rows)).sum(1)

    minimum = params.extra.get("minimum")
    slope = values if minimum is None else values - spread(minimum)
    bend = summed((slope @ gram) * slope)
    step = torch.where(bend > 0, summed(slope * pull) / bend, 0.0)
    fitted = kind.rescale(params, spec, 1 + step)
    ratio = torch.where(params.scale == 0, 1.0, fitted.scale / params.scale)
    wide = map_groups(fitted, spread)
    wanted = slope * spread(ratio)
    wanted = wanted if minimum is None else wanted + spread(minimum)
    new = nearest(wanted, spec, wide, kind=kind)
    moved = new - values
    gain = summed(moved * (2 * pull - moved @ gram))
    better = gain > 0

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(better, new, old) if new.shape == better.shape else old

    extra = {k: chosen(v, params.extra[k]) for k, v in fitted.extra.items()}
    kept = Params(chosen(fitted.scale, params.scale), params.zero_point, extra)
    return torch.where(spread(better), new, values), kept
