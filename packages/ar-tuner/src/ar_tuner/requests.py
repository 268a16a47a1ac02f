"""What a run asks of its directory and of the sinks."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from ar_tuner.blocks import list_of
from ar_tuner.compiling import Compiled
from ar_tuner.loading import read_config
from ar_tuner.renaming import plan_in_files
from ar_tuner.sink import SinkRequest
from ar_tuner.source import without_quantization

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ar_schemes import LayerPlan
    from ar_tuner.api import AutoRound, Prepared


def run_settings(request: AutoRound, format: str) -> dict[str, Any]:  # noqa: A002
    """Return the settings that a run and its resumption must have in common, plain values."""
    plain = dataclasses.asdict(request.settings)
    for name in ("run_dir", "resume", "overwrite", "allow_download", "low_cpu_mem_usage"):
        plain.pop(name)
    plain |= {"scheme": request.scheme.name, "format": format, "device_map": str(request.devices)}
    plain["enable_torch_compile"] = isinstance(request.forward(), Compiled)
    return json.loads(json.dumps(plain, default=str))


def sink_request(
    request: AutoRound,
    plan: LayerPlan,
    output: Path,
    format: str,  # noqa: A002
    prepared: Prepared | None,
) -> SinkRequest:
    """Return what a format's sink needs to know of a run."""
    config: dict[str, Any] = {}
    if request.source is not None:
        config = without_quantization(read_config(request.source))
    elif request.given is not None:
        described: Any = request.given.config
        config = json.loads(json.dumps(described.to_dict(), default=str))
        config["architectures"] = [type(request.given).__name__]
    model = request.blueprint().model if request.given is None else request.given
    source = None if request.source is None else request.blueprint().source
    named = plan_in_files(plan, request.wiring(model), source)
    return SinkRequest(
        format=format,
        output=output,
        source=request.source,
        config=config,
        plan=named.as_written(),
        blocks=_block_lists(named),
        facts=request.settings.facts(),
        max_shard_bytes=request.settings.shard_bytes,
        side=None if request.source is not None or prepared is None else _side(prepared),
        overwrite=request.settings.overwrite,
    )


def _block_lists(plan: LayerPlan) -> tuple[str, ...]:
    # layers that are not in the model have blocks of their own, which are no block lists
    quantized = {r.layer.block for r in plan.quantized}
    blocks = (b for r in plan.rows if (b := r.layer.block) is not None and b in quantized)
    return tuple(dict.fromkeys(list_of(b) for b in blocks))


def _side(prepared: Prepared) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        if prepared.tokenizer is not None and hasattr(prepared.tokenizer, "save_pretrained"):
            prepared.tokenizer.save_pretrained(folder)
        generation = getattr(prepared.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)

    return write
