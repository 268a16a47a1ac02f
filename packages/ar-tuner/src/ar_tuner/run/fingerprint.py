"""What makes two runs the same: settings, plan, data and source weights."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.names import source_files, source_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from ar_schemes import LayerPlan

_SAMPLES = 64


def fingerprint(
    settings: Mapping[str, Any],
    plan: LayerPlan,
    rows: Sequence[Tensor] | None,
    source: Path | None,
    model: nn.Module,
) -> dict[str, str]:
    """Return one digest per part, so that a difference can be named.

    Weights are identified by the size of the source's files and, for every tensor in them (in
    memory, for a model that was given), its shape and a sample of its values: reading every byte
    of a large model again would cost more than it protects from.
    """
    layers = [[r.layer.name, r.layer.rows, r.layer.columns, r.written.to_dict()] for r in plan.rows]
    parts: dict[str, Any] = {
        "settings": dict(settings),
        "plan": layers,
        "calibration": None if rows is None else _all_digest(rows),
        "source": None if source is None else _files(source),
        "weights": _sampled(model.state_dict().items() if source is None else _stored(source)),
        "torch": torch.__version__.split("+")[0],
    }
    return {name: _digest(value) for name, value in parts.items()}


def model_digest(model: nn.Module, source: Path | None) -> str:
    """Return what identifies the weights of a model: see `fingerprint`."""
    return _digest(
        [None if source is None else _files(source), _sampled(model.state_dict().items())]
    )


def rows_digest(rows: Tensor) -> str:
    """Return what identifies token rows: all of them."""
    return _digest(_tensor_digest(rows))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _all_digest(tensors: Sequence[Tensor]) -> str | list[str]:
    digests = [_tensor_digest(tensor) for tensor in tensors]
    return digests[0] if len(digests) == 1 else digests


def _tensor_digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    return hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).hexdigest()


def _files(source: Path) -> list[tuple[str, int]]:
    return sorted((p.name, p.stat().st_size) for p in set(source_files(source).values()))


def _stored(source: Path) -> Iterator[tuple[str, Tensor]]:
    files = source_files(source)
    return source_tensors(files, files)


def _sampled(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, list[int], str]]:
    out = []
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        out.append((name, list(tensor.shape), _tensor_digest(flat[::step][:_SAMPLES].cpu())))
    return out
