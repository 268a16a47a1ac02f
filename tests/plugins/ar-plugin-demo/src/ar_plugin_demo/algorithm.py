"""An algorithm: searched scales, no tuning, no calibration."""

from __future__ import annotations

from ar_kernels import data_type
from ar_tuner import hookimpl
from ar_tuner.algorithms.base import BlockResult, BlockTask


class SearchOnly:
    """Round to nearest with the scale of least squared error."""

    name = "search_only"
    needs_inputs = False

    def quantize(self, task: BlockTask) -> BlockResult:
        """Return the quantized weights of a block."""
        out = {}
        for target in task.targets:
            spec = target.scheme.weight
            assert spec is not None
            weight = task.weight(target)
            kind = data_type(spec.data_type)
            out[target.ref.layer] = kind.quantize(weight, spec, kind.search(weight, spec))
        return BlockResult(out)


@hookimpl
def ar_register_algorithms() -> list[SearchOnly]:
    """Return the algorithm."""
    return [SearchOnly()]
