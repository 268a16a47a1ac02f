from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ar_kernels import data_type
from ar_schemes import LayerInfo, LayerRules, make_plan, scheme

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Request:
    """A request as the tuner makes it."""

    output: Path
    plan: Any
    format: str = "auto_round"
    source: Path | None = None
    config: dict[str, Any] = field(default_factory=lambda: {"model_type": "x", "dtype": "bfloat16"})
    blocks: tuple[str, ...] = ("model.layers",)
    facts: dict[str, Any] = field(default_factory=lambda: {"iters": 3, "lr": None})
    max_shard_bytes: int = 10**9
    side: Any = None
    overwrite: bool = False


LAYERS = (
    LayerInfo("model.layers.0.q_proj", 64, 128, "model.layers.0"),
    LayerInfo("model.layers.0.down_proj", 32, 64, "model.layers.0"),
    LayerInfo("lm_head", 96, 64, None, role="lm_head"),
)


def plan_of(name: str = "W4A16", **rules: Any) -> Any:
    base = scheme(name).with_overrides({"group_size": 32, "sym": rules.pop("sym", None)})
    return make_plan(LAYERS, LayerRules(base, **rules))


def weights_of(plan: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    out = {}
    for row in plan.quantized:
        float_weight = torch.randn(row.layer.rows, row.layer.columns, generator=generator)
        spec = row.scheme.weight
        kind = data_type(spec.data_type)
        params = kind.parameters(float_weight, spec)
        out[row.layer.name] = kind.quantize(float_weight, spec, params)
    return out


@pytest.fixture
def make(tmp_path):
    """Write a checkpoint of random weights and return (path, weights)."""
    from ar_export.sink import ar_open_sink

    def write(name: str = "W4A16", *, rules: dict[str, Any] | None = None, **changes: Any):
        plan = plan_of(name, **(rules or {}))
        request = Request(tmp_path / changes.pop("folder", "out"), plan, **changes)
        sink = ar_open_sink(request)
        weights = weights_of(plan)
        for layer, weight in weights.items():
            sink.put(layer, weight)
        sink.put_tensor("model.norm.weight", torch.ones(64, dtype=torch.bfloat16))
        sink.put_tensor("model.layers.0.q_proj.bias", torch.zeros(64))
        return sink.commit(), weights

    return write


@pytest.fixture
def request_for(tmp_path):
    """Make a request for `tmp_path/out`."""

    def ask(name: str = "W4A16", *, rules: dict[str, Any] | None = None, **changes: Any) -> Request:
        return Request(
            changes.pop("output", tmp_path / "out"), plan_of(name, **(rules or {})), **changes
        )

    return ask


@pytest.fixture
def random_weights():
    """Return the function from a plan to random quantized weights."""
    return weights_of
