"""What a user may ask of a quantization, checked before any work."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ar_schemes import unknown_name
from ar_tuner.errors import TunerError
from ar_tuner.recipes import RECIPES, Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_SCALE_TYPES = ("float16", "bfloat16", "float32")
_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Settings:
    """Settings of one quantization; the names are those of auto-round where it has them.

    None means: as the recipe says.

    Attributes:
        recipe: `best`, `default`, `light` or `rtn`.
        iters, nsamples, seqlen, batch_size, lr, minmax_lr: override the recipe's.
        bits, group_size, sym: override the scheme's.
        scale_dtype: type that scales of integers are stored in; None: float16.
        layer_config: layer name or pattern to a scheme name or a flat dict.
        ignore_layers: names or parts of names that stay in 16 bit (text: comma separated).
        quant_lm_head: quantize the output head.
        to_quant_block_names: paths of the block lists, instead of finding them.
        enable_quanted_input: tune blocks on the output of the quantized blocks before.
        enable_minmax_tuning: tune the clip factors.
        scale_init: `search` (searched scales) or `minmax` (SignRound as published).
        not_use_best_mse: return the last iterate, not that of the least minibatch loss.
        device_map: `cpu`, `cuda`, `cuda:1`, ...
        model_dtype: `auto` (as stored), `bfloat16`, `float16` or `float32`.
        run_dir: where the run keeps its state; default beside the output.
        resume: go on with an interrupted run.
        overwrite: replace an output directory that is not empty.
        max_shard_size: `5GB`, or bytes.
    """

    recipe: str = "default"
    iters: int | None = None
    nsamples: int | None = None
    seqlen: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    minmax_lr: float | None = None
    seed: int = 42
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    scale_dtype: str | None = None
    layer_config: Mapping[str, Any] = field(default_factory=dict)
    ignore_layers: tuple[str, ...] | str = ()
    quant_lm_head: bool = False
    to_quant_block_names: tuple[str, ...] | str | None = None
    enable_quanted_input: bool = True
    enable_minmax_tuning: bool = True
    scale_init: str = "search"
    not_use_best_mse: bool = True
    device_map: str = "cpu"
    model_dtype: str = "auto"
    trust_remote_code: bool = False
    allow_download: bool = False
    run_dir: str | Path | None = None
    resume: bool = False
    overwrite: bool = False
    max_shard_size: str | int = "5GB"

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise TunerError(unknown_name("recipe", self.recipe, RECIPES))
        if self.scale_init not in ("search", "minmax"):
            raise TunerError(unknown_name("scale_init", self.scale_init, ("search", "minmax")))
        if self.scale_dtype not in (None, *_SCALE_TYPES):
            raise TunerError(unknown_name("scale_dtype", str(self.scale_dtype), _SCALE_TYPES))
        limits = {"iters": 0, "nsamples": 1, "seqlen": 2, "batch_size": 1}
        for name, least in limits.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                msg = f"{name} {value!r} is not allowed: use a whole number of at least {least}"
                raise TunerError(msg)
        for name in ("lr", "minmax_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                msg = f"{name} {value!r} is not allowed: use a number above 0 and at most 1"
                raise TunerError(msg)
        _ = self.shard_bytes

    @property
    def chosen(self) -> Recipe:
        """The recipe with the user's numbers in it."""
        recipe = RECIPES[self.recipe]
        given = {
            name: getattr(self, name)
            for name in ("iters", "nsamples", "seqlen", "batch_size", "lr", "minmax_lr")
            if getattr(self, name) is not None
        }
        return dataclasses.replace(recipe, **given)

    @property
    def ignored(self) -> tuple[str, ...]:
        """The patterns of `ignore_layers`."""
        return _listed(self.ignore_layers)

    @property
    def block_paths(self) -> tuple[str, ...] | None:
        """The paths of `to_quant_block_names`."""
        return None if self.to_quant_block_names is None else _listed(self.to_quant_block_names)

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return bytes_of("max_shard_size", self.max_shard_size)

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint says of its making."""
        recipe = self.chosen
        return {
            "recipe": recipe.name,
            "iters": recipe.iters,
            "nsamples": recipe.nsamples,
            "seqlen": recipe.seqlen,
            "batch_size": recipe.batch_size,
            "lr": recipe.lr,
            "seed": self.seed,
        }


def bytes_of(name: str, value: str | int) -> int:
    """Return a size in bytes: a number, or text such as `5GB`, `500MB`, `2GiB`.

    Raises:
        TunerError: no size, or one below a byte; `name` says what it was for.
    """
    text = str(value).strip().upper()
    unit = next((u for u in ("KIB", "MIB", "GIB", "KB", "MB", "GB") if text.endswith(u)), "")
    number = text.removesuffix(unit).strip()
    try:
        size = int(float(number) * _SIZES.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        msg = (
            f"{name} {value!r} is not allowed: "
            "use a number of bytes or a size like 5GB, 500MB, 2GiB"
        )
        raise TunerError(msg)
    return size


def make_settings(given: Mapping[str, Any]) -> Settings:
    """Return settings from keyword arguments.

    Raises:
        TunerError: an unknown keyword (with the nearest names), or a value out of range.
    """
    known = [f.name for f in dataclasses.fields(Settings)]
    for name in given:
        if name not in known:
            raise TunerError(unknown_name("argument", name, known))
    return Settings(**given)


def _listed(value: tuple[str, ...] | str) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(p.strip() for p in parts if p.strip())
