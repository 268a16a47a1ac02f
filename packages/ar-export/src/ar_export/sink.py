"""The sink: takes weights from the tuner as they become final and makes a checkpoint of them.

Found by ar-tuner through its hook `ar_open_sink`; neither package imports the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from ar_export.errors import ExportError
from ar_export.folder import StagedFolder
from ar_export.formats.base import (
    AddsToConfig,
    AdjustsPlan,
    Container,
    ImpliesScheme,
    NamesConfigs,
    Request,
    SetsDtype,
)
from ar_export.formats.dtypes import config_dtype
from ar_export.joining import joiner_for
from ar_export.measure import plan_size, refusal
from ar_export.reader import format_of
from ar_export.registry import formats
from ar_export.side import copy_side_files, write_configs
from ar_export.source import open_source
from ar_export.writer import ShardWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from ar_export.formats.base import Format, Sink
    from ar_export.source import DequantizedSource
    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerPlan, PlanSize

tuner_hook = pluggy.HookimplMarker("ar_tuner")


class SinkRequest(Request, Protocol):
    """What the tuner asks for, whole."""

    @property
    def max_shard_bytes(self) -> int:
        """Size above which a further file is begun."""

    @property
    def side(self) -> Callable[[Path], None] | None:
        """Writes the side files of a model in memory."""

    @property
    def overwrite(self) -> bool:
        """Replace an output that is not empty."""


@tuner_hook
def ar_open_sink(request: SinkRequest) -> Sink | None:
    """Return the sink of one of our formats, or None.

    Raises:
        ExportError: layers the format cannot carry, or an output that cannot be written.
    """
    for found in formats().values():
        if request.format in found.spellings:
            check_plan(found, request)
            if isinstance(found, Container):
                return found.open_sink(request)
            return SafetensorsSink(found, request)
    return None


@tuner_hook
def ar_open_source(path: Path, config: Any) -> DequantizedSource | None:
    """Return a quantized checkpoint of one of our formats as floats, or None.

    Raises:
        ExportError: it is damaged.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or format_of(quantization) is None:
        return None
    return open_source(path)


@tuner_hook
def ar_scheme_for_format(format: str) -> str | None:  # noqa: A002 - the user's word
    """Return the preset that one of our formats implies, or None."""
    for found in formats().values():
        if format in found.spellings and isinstance(found, ImpliesScheme):
            return found.scheme_for(format)
    return None


@tuner_hook
def ar_adjust_plan(format: str, plan: LayerPlan, config: Any) -> LayerPlan | None:  # noqa: A002
    """Return the plan as one of our formats wants it, or None."""
    for found in formats().values():
        if format in found.spellings and isinstance(found, AdjustsPlan):
            return found.adjust(format, plan, config)
    return None


@tuner_hook
def ar_measure_plan(
    format: str,  # noqa: A002 - the user's word
    plan: LayerPlan,
    config: Any,
    floats: Mapping[str, tuple[tuple[int, ...], str]],
) -> PlanSize | None:
    """Return what a plan takes in the files of one of our formats, or None.

    Raises:
        ExportError: the plan as a whole cannot be written so.
    """
    for found in formats().values():
        if format in found.spellings:
            return plan_size(found, format, plan, config, floats)
    return None


def check_plan(found: Format, request: Request) -> None:
    """Refuse a plan that the format cannot carry, all layers in one message.

    Raises:
        ExportError: there are such layers.
    """
    bad: dict[str, list[str]] = {}
    for row in request.plan.quantized:
        why = refusal(found, request.format, row)
        if why is not None:
            bad.setdefault(why, []).append(row.layer.name)
    if bad:
        lines = [f"  {why}: {', '.join(names)}" for why, names in bad.items()]
        count = sum(len(names) for names in bad.values())
        kept = {row.layer.name for row in request.plan.kept}
        away = "keep them in 16 bit (--ignore-layers)"
        if any(kept.intersection(names) for names in bad.values()):
            away = "have them dequantized (no keep_source)"
        msg = (
            f"format {request.format} cannot carry {count} layers of this plan:\n"
            + "\n".join(lines)
            + f"\nChoose another scheme or format, or {away}."
        )
        raise ExportError(msg)


def _refuse_kept(request: Request) -> None:
    """Refuse to write floats where layers are to stay as the source stores them."""
    kept = [row.layer.name for row in request.plan.kept]
    if kept:
        msg = (
            f"format {request.format} writes floats, so {len(kept)} layers cannot stay as the "
            f"source stores them: {', '.join(kept[:6])}. Choose another format, or leave out "
            "keep_source."
        )
        raise ExportError(msg)


class SafetensorsSink:
    """A sink for formats on safetensors files."""

    def __init__(self, found: Format, request: SinkRequest) -> None:
        self._format = found
        self._request = request
        self._folder = StagedFolder(request.output, overwrite=request.overwrite)
        self._folder.check()
        self._check_source()
        self._writer: ShardWriter | None = None
        self._dtype = config_dtype(request.config)
        self._config = found.config(request)
        if self._config is None:
            _refuse_kept(request)
        self._turned = {r.layer.name for r in request.plan.rows if r.layer.transposed}
        # floats are opened by Transformers, which knows single experts of some models only
        self._joiner = joiner_for(request.plan, request.config) if self._config is None else None

    def put(self, name: str, weight: QuantizedWeight) -> None:
        """Take the weight of a layer (name without `.weight`)."""
        parts = self._format.tensors(self._config, weight, self._dtype)
        if self._config is None and name in self._turned:  # floats lie as the model holds them
            parts = {suffix: tensor.t() for suffix, tensor in parts.items()}
        for suffix, tensor in parts.items():
            key = f"{name}.{suffix}"
            ready = {key: tensor} if self._joiner is None else self._joiner.take(key, tensor)
            for final, whole in ready.items():
                self._shards().add(final, whole)

    def put_tensor(self, name: str, tensor: Tensor) -> None:
        """Take a tensor that stays as it is."""
        self._shards().add(name, tensor)

    def commit(self) -> Path:
        """Write configs and side files, then make the checkpoint visible at once."""
        request = self._request
        folder = self._folder.path()
        self._shards().close()
        if request.source is not None:
            copy_side_files(request.source, folder, request.config)
        if request.side is not None:
            request.side(folder)
        config = dict(request.config)
        if isinstance(self._format, SetsDtype):
            config.pop("torch_dtype", None)
            config["dtype"] = self._format.dtype
        config.pop("quantization", None)
        if isinstance(self._format, AddsToConfig) and self._config is not None:
            config |= self._format.beside(self._config)
        names = self._format.config_names if isinstance(self._format, NamesConfigs) else ()
        write_configs(folder, config, self._config, names=names)
        return self._folder.commit()

    def abort(self) -> None:
        """Remove everything that was staged."""
        if self._writer is not None:
            self._writer.discard()
        self._folder.abort()

    def _shards(self) -> ShardWriter:
        if self._writer is None:
            self._writer = ShardWriter(
                self._folder.path(), max_shard_bytes=self._request.max_shard_bytes
            )
        return self._writer

    def _check_source(self) -> None:
        source, output = self._request.source, self._request.output.resolve()
        if source is None:
            return
        if output == source.resolve() or output in source.resolve().parents:
            msg = f"output {str(output)!r} would replace the source checkpoint {str(source)!r}"
            raise ExportError(msg)
