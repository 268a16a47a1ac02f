"""FP8 in tiles of 128 x 128 that do not divide the weight: the last row and column are smaller.

DeepSeek has such layers (576 rows). A `QuantizedWeight` has equal tiles, so there they are as
large as divides both; neighbours repeat the scale of the tile in the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels.layouts.base import TensorFact
from ar_kernels.layouts.checks import require, require_holds
from ar_kernels.weight import KernelError, QuantizedWeight
from ar_schemes import Granularity, Span

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_schemes import TensorSpec

_TILE = 128


@dataclass(frozen=True)
class RaggedTiles:
    """Layouts `fp8_block_ragged` and `ct_float_ragged`.

    Attributes:
        name: identifier.
        scale: suffix of the scale.
    """

    name: str
    scale: str

    def refuses(self, spec: TensorSpec, rows: int, columns: int) -> str | None:
        """Return why a weight cannot be packed so, or None."""
        if (spec.data_type, spec.bits) != ("fp", 8):
            return f"{self.name} holds fp8, not {spec.data_type}{spec.bits}"
        if spec.granularity != even_tiles(rows, columns):
            wanted = even_tiles(rows, columns)
            return f"{self.name} of [{rows}, {columns}] has {wanted}, not {spec.granularity}"
        return None

    def facts(self, spec: TensorSpec, rows: int, columns: int) -> dict[str, TensorFact]:
        """Return the packed tensors' shapes and types without data."""
        tiles = (-(-rows // _TILE), -(-columns // _TILE))
        return {
            "weight": TensorFact((rows, columns), torch.float8_e4m3fn),
            self.scale: TensorFact(tiles, getattr(torch, spec.scale_dtype)),
        }

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the packed tensors.

        Raises:
            KernelError: the weight does not fit: a tile of the file would have several scales.
        """
        rows, columns = weight.shape[-2:]
        require_holds(self, weight.spec, rows, columns)
        down, across = self._places(weight.spec, rows, columns, weight.scale.device)
        tiles = self.facts(weight.spec, rows, columns)[self.scale].shape
        scale = torch.empty(tiles, dtype=weight.scale.dtype, device=weight.scale.device)
        scale[down[:, None], across] = weight.scale
        if not torch.equal(scale[down][:, across], weight.scale):
            msg = f"{self.name}: the scales differ inside a tile of {_TILE} x {_TILE}"
            raise KernelError(msg)
        return {
            "weight": weight.codes.contiguous().view(torch.float8_e4m3fn),
            self.scale: scale,
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, rows: int, columns: int
    ) -> QuantizedWeight:
        """Return the weight.

        Raises:
            KernelError: tensors are missing or do not fit.
        """
        require(self, tensors, spec, rows, columns)
        down, across = self._places(spec, rows, columns, tensors[self.scale].device)
        codes = tensors["weight"].contiguous().view(torch.uint8)
        scale = tensors[self.scale][down][:, across].contiguous()
        return QuantizedWeight(spec, codes, scale)

    def _places(
        self, spec: TensorSpec, rows: int, columns: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the tile of the file of each row and of each column of scales."""
        height, width = spec.granularity.size
        return (
            torch.arange(0, rows, height, device=device) // _TILE,
            torch.arange(0, columns, width, device=device) // _TILE,
        )


def even_tiles(rows: int, columns: int) -> Granularity:
    """Return the largest tiles that divide a weight and tiles of 128 x 128."""
    return Granularity(Span.TILE, (math.gcd(rows, _TILE), math.gcd(columns, _TILE)))


def is_ragged(spec: TensorSpec, rows: int, columns: int) -> bool:
    """Tell whether a spec has tiles of 128 x 128 that do not divide a weight."""
    whole = Granularity(Span.TILE, (_TILE, _TILE))
    return spec.granularity == whole and even_tiles(rows, columns) != whole


def evened(spec: TensorSpec, rows: int, columns: int) -> TensorSpec:
    """Return a spec with tiles that divide a weight, where they may hang over its edge in files."""
    if not is_ragged(spec, rows, columns):
        return spec
    return spec.with_(granularity=even_tiles(rows, columns))


FP8_RAGGED = RaggedTiles("fp8_block_ragged", "weight_scale_inv")
CT_RAGGED = RaggedTiles("ct_float_ragged", "weight_scale")
