"""Round to nearest: the baseline, from the weights alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_kernels import KernelError, data_type
from ar_tuner.algorithms.base import BlockResult
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_tuner.algorithms.base import BlockTask, Target


class Rtn:
    """Algorithm `rtn`."""

    name = "rtn"
    needs_inputs = False

    def quantize(self, task: BlockTask) -> BlockResult:
        """Return each weight rounded to the nearest code of the scheme's own scale."""
        return BlockResult(nearest_of(task))


def nearest_of(task: BlockTask) -> dict[str, QuantizedWeight]:
    """Return every target of a block rounded to nearest, by layer name."""
    return {
        t.ref.layer: nearest(t, task.weight(t), shared=task.shared.get(t.ref.layer))
        for t in task.targets
    }


def nearest(
    target: Target, weight: Tensor, *, shared: Mapping[str, Tensor] | None = None
) -> QuantizedWeight:
    """Return a weight rounded to nearest under its scheme.

    `shared` holds parameters that it has in common with others, where the data type has any.

    Raises:
        TunerError: the weight has no such representation; names the layer.
    """
    spec = target.scheme.weight
    assert spec is not None
    kind = data_type(spec.data_type)
    # what "round to nearest" means for scales of two levels is a search, in every quantizer
    find = kind.search if spec.super_group is not None else kind.parameters
    weight = weight.contiguous()  # some are views of parameters that are stored turned over
    try:
        return kind.quantize(weight, spec, find(weight, spec, shared=shared))
    except KernelError as error:
        msg = f"layer {target.ref.layer}: {error}"
        raise TunerError(msg) from error
