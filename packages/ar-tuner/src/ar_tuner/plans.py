"""What is done to every plan before it is used: types of scales, and whether it can be computed."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from ar_kernels import data_types
from ar_schemes import LayerPlan
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from ar_schemes import Scheme

_EXPERT = re.compile(r"^(.*\bexperts)\.\d+\.(.+)$")
_DOWN = ("down_proj", "w2", "fc2")


def with_scale_dtype(plan: LayerPlan, dtype: str | None) -> LayerPlan:
    """Return the plan with scales of integers stored in another type."""
    if dtype is None:
        return plan

    def changed(which: Scheme) -> Scheme:
        if which.weight is None or which.weight.data_type != "int":
            return which
        return dataclasses.replace(which, weight=which.weight.with_(scale_dtype=dtype))

    rows = tuple(dataclasses.replace(row, scheme=changed(row.scheme)) for row in plan.rows)
    return LayerPlan(rows=rows, default=changed(plan.default))


def check_computable(plan: LayerPlan) -> None:
    """Refuse a plan that quantizes nothing, or a layer whose scheme nothing here computes.

    Raises:
        TunerError: with the scheme, the layer and the reason.
    """
    if not plan.quantized:
        msg = f"scheme {plan.default.name} quantizes no layer of this model: see `ar plan`"
        raise TunerError(msg)
    for row in plan.quantized:
        spec = row.scheme.weight
        assert spec is not None
        kind = data_types().get(spec.data_type)
        why: str | None = f"no installed package knows the data type {spec.data_type!r}"
        why = why if kind is None else kind.refuses(spec)
        act = row.scheme.activation
        if why is None and act is not None:
            other = data_types().get(act.data_type)
            why = f"no installed package knows the activation data type {act.data_type!r}"
            why = why if other is None else other.refuses(act)
        if row.layer.copies > 1:
            why = row.layer.keep or "it is one tensor of fused experts whose layout is not known"
        if why is not None:
            msg = f"scheme {row.scheme.name} (layer {row.layer.name}) cannot be computed: {why}"
            raise TunerError(msg)
    _check_uniform(plan)


def _check_uniform(plan: LayerPlan) -> None:
    """Refuse a list of experts that do not all get the same.

    Kernels run a projection of all experts as one, gate and up as one, and the model holds them
    so; only the down projection may differ.
    """
    lists: dict[tuple[str, str], dict[str, str]] = {}
    for row in plan.rows:
        found = _EXPERT.match(row.layer.name)
        if found is not None and row.layer.role == "experts":
            kind = "down" if found[2] in _DOWN else "gate and up"
            spec = row.scheme.weight, row.scheme.activation
            lists.setdefault((found[1], kind), {}).setdefault(str(spec), row.layer.name)
    for (name, kind), members in lists.items():
        if len(members) > 1:
            some = ", ".join(list(members.values())[:3])
            msg = (
                f"the {kind} projections of {name} get {len(members)} different schemes (see "
                f"{some}), but no engine runs experts of one layer differently: let rules mean "
                f"all of them, such as {name.rpartition('.')[2]!r}"
            )
            raise TunerError(msg)
