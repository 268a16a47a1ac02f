"""Steps of a family's check that write a checkpoint and read it back."""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from ar_kernels.hf.plain import plain_opening
from ar_tuner.errors import TunerError
from ar_tuner.experts import own_wiring

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    Shapes = dict[str, tuple[int, ...]]

_PACKED = (
    *("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape"),
    *("weight_zero_point", "weight_scale_inv", "weight_global_scale", "input_global_scale"),
)
_EXPERT = re.compile(r"\.\d+\.[^.]+\.weight$")
_FUSED = 3


def shapes(folder: Path) -> Shapes:
    """Return the shape of every tensor in the safetensors files of a folder."""
    out: Shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                out[name] = tuple(file.get_slice(name).get_shape())
    return out


def audit(source: Path, made: Path, model: nn.Module) -> None:
    """Compare the tensors of a quantized checkpoint with those it was made from, by name.

    The names have to be the same but for the endings that quantized weights have. Experts that the
    source holds in one tensor may be there one by one, and so may what the model cuts apart.

    Raises:
        TunerError: names that are missing or in excess, all of them.
    """
    had, apart = shapes(source), cut_names(model)
    has = {_plain(name) for name in shapes(made)}
    missing, extra = set(had) - has, has - set(had)
    for joined, parts in apart.items():
        if joined in missing and parts <= extra:
            missing -= {joined}
            extra -= parts
    fused: dict[str, list[str]] = {}
    for name in missing:
        if len(had[name]) == _FUSED:
            fused.setdefault(name.removesuffix(".weight").rpartition(".")[0], []).append(name)
    for parent, names in fused.items():
        single = {k for k in extra if k.startswith(f"{parent}.") and _EXPERT.search(k)}
        if len(single) >= sum(had[name][0] for name in names):
            missing -= set(names)
            extra -= single
    if missing or extra:
        msg = f"missing {len(missing)}: {sorted(missing)[:4]}; in excess {len(extra)}: "
        msg += f"{sorted(extra)[:4]}"
        raise TunerError(msg)


def cut_names(model: nn.Module) -> dict[str, set[str]]:
    """Return the tensors of files that a model cuts into several, with the names of those."""
    pieces = own_wiring(model).pieces.values()
    return {
        piece.sources[0]: set(piece.targets)
        for piece in pieces
        if len(piece.sources) == 1 and len(piece.targets) > 1
    }


def reload(folder: Path, kind: Any) -> nn.Module:
    """Return the model of a quantized checkpoint as Transformers opens it.

    Raises:
        TunerError: tensors that it lacks, or does not know.
    """
    import torch

    import ar_kernels  # noqa: F401 - teaches Transformers the formats

    model, report = plain_opening(kind)(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    wrong = {
        key: sorted(report[key])[:4]
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report.get(key)
    }
    if wrong:
        msg = f"the checkpoint does not fit the model: {wrong}"
        raise TunerError(msg)
    return model.eval()


def in_tiles(weight: Tensor, size: int = 128) -> tuple[Tensor, Tensor]:
    """Return a matrix [O, I] as FP8 codes, and a scale for each tile, as DeepSeek's files hold it.

    The last tiles may hang over the edge: scales are float32 [ceil(O / size), ceil(I / size)].
    """
    import torch

    rows, columns = (math.ceil(n / size) for n in weight.shape)
    scales, codes = torch.empty(rows, columns), torch.empty_like(weight)
    for i, j in itertools.product(range(rows), range(columns)):
        place = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
        scales[i, j] = weight[place].abs().max() / 448
        codes[place] = weight[place] / scales[i, j]
    return codes.to(torch.float8_e4m3fn), scales


def _plain(name: str) -> str:
    layer, _, ending = name.rpartition(".")
    return f"{layer}.weight" if ending in _PACKED else name
