"""What layouts check before they unpack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_kernels.layouts.base import Layout
    from ar_schemes import TensorSpec


def require(
    layout: Layout, tensors: Mapping[str, Tensor], spec: TensorSpec, rows: int, columns: int
) -> None:
    """Raise unless the tensors are those of a weight [rows, columns] of this spec.

    Raises:
        KernelError: the layout cannot hold such a weight, or a tensor is missing or has another
            shape or type.
    """
    require_holds(layout, spec, rows, columns)
    for suffix, fact in layout.facts(spec, rows, columns).items():
        found = tensors.get(suffix)
        if found is None or tuple(found.shape) != fact.shape or found.dtype != fact.dtype:
            have = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            msg = (
                f"{layout.name}: {suffix} of {spec} [{rows}, {columns}] must be {fact.dtype} "
                f"{list(fact.shape)}, found {have}"
            )
            raise KernelError(msg)


def require_holds(layout: Layout, spec: TensorSpec, rows: int, columns: int) -> None:
    """Raise unless the layout can hold such a weight.

    Raises:
        KernelError: it cannot.
    """
    why = layout.refuses(spec, rows, columns)
    if why is not None:
        raise KernelError(why)
