"""What a user may ask of a quantization, checked before any work."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ar_schemes import unknown_name
from ar_tuner.algorithms.base import TuneSettings
from ar_tuner.checks import NOT_DONE, SCALES, check_tuning, check_whole, refuse_undone
from ar_tuner.errors import TunerError
from ar_tuner.recipes import RECIPES, SPELLINGS, Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ar_tuner.devices import DeviceMap

_CALIBRATIONS = ("text", "image", "mixed")
_SCALE_TYPES = ("float16", "bfloat16", "float32")
_SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIGNROUND = (
    *("lr", "minmax_lr", "enable_minmax_tuning", "scale_init", "not_use_best_mse"),
    *("validation_rows", "dynamic_max_gap", "optimizer", "enable_adam", "momentum"),
    *("lr_scheduler", "gradient_accumulate_steps", "nblocks"),
)
"""Settings that only SignRound has."""


@dataclass(frozen=True)
class Settings:
    """Settings of one quantization; the names are those of auto-round where it has them.

    None means: as the recipe says.

    Attributes:
        recipe: `best`, `default`, `light`, `fast`, `rtn` or `opt_rtn`.
        algorithm: what quantizes a block; None: `signround` where one of its own settings is
            given (`lr`, `momentum`, `nblocks`, ...), else what the recipe says.
        distill: refine the whole model afterwards against the float model's predictions; `scales`:
            its scales and norm gains alone, in little memory; None: as the recipe says (but not
            after an algorithm that was asked for), codes too where memory allows.
        stage: another stage than `distill`, by name.
        fold: scale the input channels of layers and divide what makes them (a norm, rows of the
            layer before) by the same; None: where activations share powers of two (MXFP4), before
            second order.
        token_weights: second order counts errors as the model's predictions depend on them.
        block_steps: steps that the codes and scales of a finished block take on its own error.
        clip_activations: search static ranges of activations by the error of what is clipped and
            rounded, instead of taking the largest magnitude; None: those of integers.
        iters, nsamples, seqlen, batch_size, lr, minmax_lr: override the recipe's.
        bits, group_size, sym: override the scheme's.
        scale_dtype: type that scales of integers are stored in; None: float16.
        layer_config: layer name, part of one or regular expression, to a scheme name, a flat
            dict, a number of bits, or `source` (see `keep_source`).
        ignore_layers: names or parts of names that stay in 16 bit (text: comma separated).
        keep_source: layers that are not quantized are written as a quantized source stores them,
            instead of as floats; `layer_config` says so of single layers with the word `source`.
        quant_lm_head: quantize the output head, tuned on the model's probabilities.
        quant_nontext_module: quantize the vision tower and the projector, too.
        calibration: `text`, `image` or `mixed`; None: mixed where the data holds images.
        image_folder: folders in which relative names of images are looked for (text: comma
            separated).
        to_quant_block_names: paths of the block lists, instead of finding them.
        enable_quanted_input: tune blocks on the output of the quantized blocks before.
        enable_minmax_tuning: tune the clip factors.
        scale_init: `search` (searched scales) or `minmax` (SignRound as published).
        not_use_best_mse: return the last iterate, not that of the least minibatch loss.
        validation_rows: with `not_use_best_mse=False`, choose the iterate by its error on so many
            rows that are not tuned on, instead of by minibatch losses.
        dynamic_max_gap: with `not_use_best_mse=False`, stop a block after so many steps without a
            better iterate; 0 or less: never.
        enable_alg_ext: SignRoundV2: searched scales, outliers left out of the loss, frozen scales
            of GGUF K types.
        optimizer: `sign` or `adam`; `enable_adam` is another word for the latter.
        momentum: share of the earlier gradients in a signed step.
        lr_scheduler: how steps shrink: `linear`, `cosine` or `constant`.
        gradient_accumulate_steps: minibatches per step.
        nblocks: consecutive blocks that are tuned as one.
        disable_opt_rtn: without steps, round with plain scales (True) or with searched ones
            (False: even 8-bit integers); None: searched but for 8-bit integers.
        enable_deterministic_algorithms: let PyTorch use deterministic algorithms only.
        device_map: where blocks compute: `cpu`, `cuda`, `cuda:1`, the number of an accelerator,
            several (`0,1`), `auto` (all of them) or a dict from module names; None: the first
            accelerator (the CPU where there is none), or where a given model is.
        low_gpu_mem_usage: calibration states wait in RAM instead of on the device.
        low_cpu_mem_usage: blocks of a model in a directory are in RAM only while their turn lasts.
        enable_torch_compile: tune with compiled blocks.
        model_dtype: `auto` (as stored), `bfloat16`, `float16` or `float32`.
        run_dir: where the run keeps its state; default beside the output.
        resume: go on with an interrupted run.
        overwrite: replace an output directory that is not empty.
        max_shard_size: `5GB`, or bytes.
    """

    recipe: str = "default"
    algorithm: str | None = None
    distill: bool | str | None = None
    stage: str | None = None
    iters: int | None = None
    nsamples: int | None = None
    seqlen: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    minmax_lr: float | None = None
    seed: int = 42
    fold: bool | None = None
    token_weights: bool = False
    block_steps: int = 0
    clip_activations: bool | None = None
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    scale_dtype: str | None = None
    layer_config: Mapping[str, Any] = field(default_factory=dict)
    ignore_layers: tuple[str, ...] | str = ()
    keep_source: bool = False
    quant_lm_head: bool = False
    quant_nontext_module: bool = False
    calibration: str | None = None
    image_folder: tuple[str, ...] | str | Path = ()
    to_quant_block_names: tuple[str, ...] | str | None = None
    enable_quanted_input: bool = True
    enable_minmax_tuning: bool = True
    scale_init: str = "search"
    not_use_best_mse: bool = True
    validation_rows: int = 0
    dynamic_max_gap: int = -1
    enable_alg_ext: bool = False
    optimizer: str = "sign"
    enable_adam: bool = False
    momentum: float = 0.0
    lr_scheduler: str = "linear"
    gradient_accumulate_steps: int = 1
    nblocks: int = 1
    disable_opt_rtn: bool | None = None
    enable_deterministic_algorithms: bool = False
    device_map: DeviceMap = None
    low_gpu_mem_usage: bool = False
    low_cpu_mem_usage: bool = True
    enable_torch_compile: bool = False
    model_dtype: str = "auto"
    trust_remote_code: bool = False
    allow_download: bool = False
    run_dir: str | Path | None = None
    resume: bool = False
    overwrite: bool = False
    max_shard_size: str | int = "5GB"

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", SPELLINGS.get(str(self.recipe), str(self.recipe)))
        if self.scale_dtype is not None:
            kind = str(self.scale_dtype).removeprefix("torch.")
            object.__setattr__(self, "scale_dtype", _SHORT.get(kind, kind))
        if self.recipe not in RECIPES:
            raise TunerError(unknown_name("recipe", self.recipe, RECIPES))
        if self.scale_dtype not in (None, *_SCALE_TYPES):
            raise TunerError(unknown_name("scale_dtype", str(self.scale_dtype), _SCALE_TYPES))
        limits = {"iters": 0, "nsamples": 1, "seqlen": 2, "batch_size": 1}
        for name, least in limits.items():
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least)
        for name in ("lr", "minmax_lr"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= 1):
                msg = f"{name} {value!r} is not allowed: use a number above 0 and at most 1"
                raise TunerError(msg)
        if self.calibration not in (None, *_CALIBRATIONS):
            raise TunerError(unknown_name("calibration", str(self.calibration), _CALIBRATIONS))
        check_tuning(self)
        _ = self.shard_bytes

    @property
    def chosen(self) -> Recipe:
        """The recipe with the user's numbers in it."""
        recipe = RECIPES[self.recipe]
        given = {
            name: getattr(self, name)
            for name in (
                *("iters", "nsamples", "seqlen", "batch_size", "lr", "minmax_lr"),
                "disable_opt_rtn",
            )
            if getattr(self, name) is not None
        }
        if self.fold and recipe.name == "rtn":  # which needs none otherwise
            given.setdefault("nsamples", RECIPES["opt_rtn"].nsamples)
        asked = self.algorithm
        if asked is None and recipe.iters and any(_given(self, n) for n in _SIGNROUND):
            asked = "signround"
        if asked is not None:
            given |= {"tuned_by": asked, "stage": None}
        if self.distill is not None:
            given |= {"stage": "distill" if self.distill else None, "flat": self.distill == SCALES}
        if self.stage is not None:
            given["stage"] = self.stage
        recipe = dataclasses.replace(recipe, **given)
        return recipe if recipe.iters else dataclasses.replace(recipe, stage=None)

    def tuning(self) -> TuneSettings:
        """Return the numbers of the tuning loop."""
        recipe = self.chosen
        return TuneSettings(
            iters=recipe.iters,
            batch_size=recipe.batch_size,
            accumulate=self.gradient_accumulate_steps,
            lr=recipe.lr,
            minmax_lr=recipe.minmax_lr,
            lr_scheduler=self.lr_scheduler,
            optimizer="adam" if self.enable_adam else self.optimizer,
            momentum=self.momentum,
            seed=self.seed,
            scale_init=self.scale_init,
            loss="suppressed" if self.enable_alg_ext else "mse",
            frozen_super_scales=self.enable_alg_ext,
            keep="last" if self.not_use_best_mse else "best",
            validation_rows=self.validation_rows,
            patience=max(0, self.dynamic_max_gap),
            minmax_tuning=self.enable_minmax_tuning,
            search_wide=recipe.disable_opt_rtn is False,
            block_steps=self.block_steps,
            clip_activations=self.clip_activations,
        )

    @property
    def ignored(self) -> tuple[str, ...]:
        """The patterns of `ignore_layers`."""
        return _listed(self.ignore_layers)

    @property
    def image_folders(self) -> tuple[str, ...]:
        """The folders of `image_folder`."""
        given = self.image_folder
        return _listed(str(given) if isinstance(given, (str, Path)) else tuple(map(str, given)))

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
            "algorithm": recipe.algorithm,
            "stage": recipe.stage,
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


def _given(settings: Settings, name: str) -> bool:
    """Tell whether a setting differs from its default."""
    default = next(f.default for f in dataclasses.fields(Settings) if f.name == name)
    return bool(getattr(settings, name) != default)


def make_settings(given: Mapping[str, Any]) -> Settings:
    """Return settings from keyword arguments; None means the default.

    Raises:
        TunerError: an unknown keyword (with the nearest names), or a value out of range.
    """
    known = [f.name for f in dataclasses.fields(Settings)]
    for name in given:
        if name not in known and name not in NOT_DONE:
            raise TunerError(unknown_name("argument", name, known))
    refuse_undone(given)
    return Settings(**{k: v for k, v in given.items() if k in known and v is not None})


def _listed(value: tuple[str, ...] | str) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(p.strip() for p in parts if p.strip())
