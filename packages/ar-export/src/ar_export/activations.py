"""Whether the layers of an opened checkpoint quantize their inputs as its config says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_export.findings import Finding
from ar_kernels import QuantLinear
from ar_kernels.layer_tensors import ranges_of
from ar_kernels.numerics.activation import fake_quant_activation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ar_export.formats.base import Readable
    from ar_kernels import QuantizedWeight
    from ar_schemes import TensorSpec

_ROWS = 8
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Largest difference of a layer's outputs, relative to the largest of them: the inputs are
quantized alike, so only sums are made in another order."""


def check_activations(found: Readable, model: nn.Module) -> tuple[int, list[Finding]]:
    """Return how many layers with quantized inputs were compared, and what is wrong with them.

    Each layer is given the same random tokens as the dequantized weight of the files, their values
    quantized by the scheme and the ranges of the files. Layers that the model holds under another
    name are left out.
    """
    compared, out = 0, []
    generator = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        entry = found.quantized.get(name)
        wanted = None if entry is None else entry.scheme.activation
        if wanted is None or not isinstance(layer, QuantLinear):
            continue
        compared += 1
        if layer.activation != wanted:
            what = f"its inputs are opened as {layer.activation}, the config says {wanted}"
            out.append(Finding("error", what, name))
            continue
        x = torch.randn(_ROWS, layer.columns, generator=generator).to(layer.device, layer.dtype)
        with torch.inference_mode():
            theirs, ours = _expected(x, found.weight(name), wanted, layer.bias), layer(x).float()
        difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        if not difference <= _TOLERANCE.get(layer.dtype, 1e-2):
            what = f"with {wanted} inputs its outputs differ by {difference:.1e} of their range"
            out.append(Finding("error", what, name))
    return compared, out


def _expected(x: Tensor, weight: QuantizedWeight, spec: TensorSpec, bias: Tensor | None) -> Tensor:
    """Return what a layer should give for x, float32."""
    ranges = {key: value.to(x.device) for key, value in ranges_of(weight.extra, spec).items()}
    given = fake_quant_activation(
        x, spec, static=ranges.get("static"), zero=ranges.get("static_zero")
    )
    dense = weight.to(x.device).dequantize(torch.float32)
    out = given.to(x.dtype).float() @ dense.t()
    return out if bias is None else out + bias.float()
