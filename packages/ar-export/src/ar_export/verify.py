"""Check a checkpoint: structure, every layer's bits, and its logits in the real reader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_export.activations import check_activations
from ar_export.errors import ExportError
from ar_export.findings import Finding
from ar_export.formats.packed import suffixes_of
from ar_export.lint import lint
from ar_export.opening import open_model
from ar_export.reader import open_checkpoint, read_json
from ar_kernels import QuantLinear, equal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from ar_export.formats.base import Readable
    from ar_kernels import QuantizedWeight

    Expected = Mapping[str, QuantizedWeight] | Callable[[str], QuantizedWeight]

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest difference of logits, relative to their largest magnitude, by type of the model: sums
are made in another order, and bfloat16 keeps eight bits of each."""
_PACKED = (
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale"),
    *(".weight_scale_inv", ".weight_zero_point", ".weight_global_scale", ".input_scale"),
)


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and what was found.

    Attributes:
        layers: quantized layers.
        tensors: tensors in the files.
        compared: layers whose bits were compared.
        logits: largest difference of logits, relative to their range, None: not compared.
        findings: what is wrong or worth knowing.
        activations: layers whose outputs were compared with their inputs quantized.
    """

    layers: int
    tensors: int
    compared: int
    logits: float | None
    findings: tuple[Finding, ...]
    activations: int = 0

    @property
    def ok(self) -> bool:
        """True when nothing is wrong."""
        return all(f.level != "error" for f in self.findings)


def verify(
    path: Path, *, expected: Expected | None = None, against: nn.Module | None = None
) -> VerifyReport:
    """Return what is wrong with a checkpoint.

    Args:
        path: its directory.
        expected: the weights it should hold, by layer name; compared to the bit.
        against: a model with the same (dequantized) weights; the checkpoint is opened by
            Transformers and its logits are compared, with activations as they are on both sides;
            then each layer with quantized inputs alone, on its own.

    A checkpoint that cannot even be opened gives one finding, not an exception.
    """
    try:
        found = open_checkpoint(path)
    except ExportError as error:
        return VerifyReport(0, 0, 0, None, (Finding("error", str(error), str(path)),))
    findings = [*_structure(found), *lint(found)]
    compared = 0
    for name in found.quantized:
        try:
            weight = found.weight(name)
        except ExportError as error:
            findings.append(Finding("error", str(error), name))
            continue
        if not torch.isfinite(weight.scale.float()).all():
            findings.append(Finding("error", "scales hold NaN or infinite values", name))
        wanted = _wanted(expected, name)
        if wanted is not None:
            compared += 1
            if not equal(wanted, weight):
                what = "the stored bits are not those that were tuned"
                findings.append(Finding("error", what, name))
    difference, activations = None, 0
    if against is not None and not any(f.level == "error" for f in findings):
        parameter = next(against.parameters())
        reopened = open_model(path, parameter.dtype).to(parameter.device)
        activations, problem = check_activations(found, reopened)
        difference, more = _logits(path, against, reopened)
        findings += [*problem, *more]
    return VerifyReport(
        *(len(found.quantized), len(found.names), compared, difference, tuple(findings)),
        activations,
    )


def _wanted(expected: Expected | None, name: str) -> QuantizedWeight | None:
    if expected is None:
        return None
    return expected(name) if callable(expected) else expected.get(name)


def _structure(found: Readable) -> Iterator[Finding]:
    """Yield what names and configs give away."""
    known: set[str] = set()
    packed = found.quantization_config is not None  # other files hold a tensor per name
    for name, entry in found.quantized.items():
        mine = {f"{name}.{suffix}" for suffix in suffixes_of(entry)}
        known |= mine
        if packed and f"{name}.weight" in found.files and f"{name}.weight" not in mine:
            yield Finding("error", "both packed and float weights are stored", name)
    for key, fact in found.facts.items():
        codes = packed and _is_codes(key, fact.dtype)
        if key not in known and (codes or key.endswith(_PACKED)):
            yield Finding("error", "a packed tensor that belongs to no quantized layer", key)
    if found.config.get("tie_word_embeddings") and "lm_head.weight" in found.files:
        yield Finding("warning", "the head is tied, yet stored a second time", "lm_head.weight")
    side = found.path / "quantization_config.json"
    wanted = found.quantization_config
    if wanted is not None and side.is_file():
        try:
            same = read_json(side) == wanted
        except ExportError as error:
            yield Finding("error", str(error), side.name)
        else:
            if not same:
                yield Finding("error", "differs from the one in config.json", side.name)
    if found.quantization_config is not None and not found.quantized:
        yield Finding("error", "the config names a quantization, but no layer is quantized", "")


def _is_codes(key: str, dtype: torch.dtype) -> bool:
    """Tell whether a tensor holds codes under the name of a float weight."""
    return key.endswith(".weight") and (dtype.itemsize == 1 or not dtype.is_floating_point)


def _logits(path: Path, against: nn.Module, reopened: nn.Module) -> tuple[float, list[Finding]]:
    """Return the largest relative difference of logits, and a finding if it is too large.

    Weights are compared: activations stay as they are on both sides.
    """
    parameter = next(against.parameters())
    for module in reopened.modules():
        if isinstance(module, QuantLinear):
            module.leave_activations()
    config: Any = against.config
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 256))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 32), generator=generator).to(parameter.device)
    with torch.inference_mode():
        ours: Tensor = against(input_ids=ids, use_cache=False).logits.float()
        theirs: Tensor = reopened(input_ids=ids, use_cache=False).logits.float()
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    allowed = _TOLERANCE.get(parameter.dtype, 1e-2)
    if difference <= allowed:
        return difference, []
    what = f"logits differ by {difference:.2e} of their range, more than {allowed:.0e}"
    return difference, [Finding("error", what, str(path))]
