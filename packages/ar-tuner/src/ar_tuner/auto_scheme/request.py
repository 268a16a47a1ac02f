"""`AutoScheme`: what a user may ask of a mixed precision, checked before any work."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ar_schemes import Scheme, scheme
from ar_tuner.errors import TunerError
from ar_tuner.settings import bytes_of

if TYPE_CHECKING:
    from pathlib import Path

    from ar_tuner.settings import Settings

DEFAULTS = {"nsamples": 64, "seqlen": 256, "batch_size": 1}
ENVIRONMENT = {name: f"AR_AUTO_SCHEME_{name.upper()}" for name in DEFAULTS}
"""Variables that replace a default; what is given as an argument wins over them."""


@dataclass(frozen=True)
class AutoScheme:
    """Chooses a scheme per layer: the least predicted loss within a budget.

    The first thirteen arguments are auto-round's.

    Attributes:
        avg_bits: bits per weight, scales and zero points as the format stores them included, on
            average over the layers in the blocks and the quantized ones outside. Several numbers
            make several plans from one scoring (`AutoRound.plans`).
        options: schemes to choose from: a list, or names separated by commas.
        shared_layers: lists of layer names or patterns; what a list matches in one block gets one
            scheme. None: the layers that engines fuse (q, k, v; gate, up). An empty list: none.
            The experts of a layer always share.
        method: scorer that predicts the loss, `fisher` (also named `default`) or `delta_loss`.
        ignore_scale_zp_bits: count the bits of the codes alone.
        batch_size: rows per gradient; each is one sample of the estimate.
        nsamples, seqlen: rows of text to score with, and their length in tokens.
        dataset: text to score with; None: that of the quantization.
        device_map: device to score on; None: where the model is.
        enable_torch_compile: compile the search for scales.
        low_gpu_mem_usage: keep the graph of one block alive at a time, not that of the model.
        low_cpu_mem_usage: keep the options of a block as codes, a quarter of their float size.
        target_size: size of the weight files instead of `avg_bits`: `3.2GB`, or bytes.
        calibrate: measure some predictions and scale those of each option by what was found.
        seed: of the sampled labels.
        cache: file that keeps the scores, None for one in the user's cache directory, or False.
    """

    avg_bits: float | Sequence[float] | None = None
    options: str | Sequence[str | Scheme | Mapping[str, Any]] = ()
    shared_layers: Sequence[Sequence[str]] | None = None
    method: str = "fisher"
    ignore_scale_zp_bits: bool = False
    batch_size: int | None = None
    nsamples: int | None = None
    seqlen: int | None = None
    dataset: Any = None
    device_map: str | None = None
    enable_torch_compile: bool | None = None
    low_gpu_mem_usage: bool = True
    low_cpu_mem_usage: bool = True
    target_size: str | int | None = None
    calibrate: bool = True
    seed: int = 42
    cache: str | Path | bool | None = None

    def __post_init__(self) -> None:
        if not self.schemes:
            msg = "AutoScheme needs options, such as options=('W2A16', 'W4A16', 'W8A16')"
            raise TunerError(msg)
        if (self.avg_bits is None) == (self.target_size is None):
            msg = "AutoScheme needs avg_bits or target_size, and not both"
            raise TunerError(msg)
        if self.avg_bits is not None and not self.targets:
            msg = "avg_bits is empty: give a number, or several"
            raise TunerError(msg)
        for bits in self.targets:
            if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0 < bits <= 32:
                msg = f"avg_bits {bits!r} is not allowed: use a number above 0 and at most 32"
                raise TunerError(msg)
        if isinstance(self.shared_layers, str) or any(
            isinstance(group, str) for group in self.shared_layers or ()
        ):
            msg = (
                f"shared_layers {self.shared_layers!r} is not allowed: use a list of lists of "
                "names, such as [['q_proj', 'k_proj', 'v_proj']]"
            )
            raise TunerError(msg)
        for name in DEFAULTS:
            _ = self.number(name)
        _ = self.target_bytes

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The options by name, in the order given, each once.

        Raises:
            SchemeError: an unknown name or impossible numbers.
            TunerError: a scheme that is itself a mix over layers.
        """
        parts = self.options.split(",") if isinstance(self.options, str) else self.options
        out: dict[str, Scheme] = {}
        for part in parts:
            if isinstance(part, str) and not part.strip():
                continue
            found = scheme(part.strip() if isinstance(part, str) else part)
            if found.roles:
                msg = (
                    f"option {found.name} is itself a mix over layers; name its parts instead: "
                    f"{', '.join(dict.fromkeys(found.roles.values()))}"
                )
                raise TunerError(msg)
            same = [s for s in out.values() if (s.weight, s.activation) == _numbers(found)]
            if not same:
                out[found.name] = found
        return out

    @property
    def targets(self) -> tuple[float, ...]:
        """The averages asked for; none where a size is."""
        if self.avg_bits is None:
            return ()
        return tuple(self.avg_bits) if isinstance(self.avg_bits, Sequence) else (self.avg_bits,)

    @property
    def target_bytes(self) -> int | None:
        """The size asked for, in bytes."""
        if self.target_size is None:
            return None
        return bytes_of("target_size", self.target_size)

    @property
    def scorer(self) -> str:
        """Name of the scorer."""
        return "fisher" if self.method == "default" else self.method

    def number(self, name: str) -> int:
        """Return `nsamples`, `seqlen` or `batch_size`: the argument, the environment, the default.

        Raises:
            TunerError: no positive whole number.
        """
        given, where = getattr(self, name), name
        if given is None and ENVIRONMENT[name] in os.environ:
            where = ENVIRONMENT[name]
            given = os.environ[where]
            given = int(given) if given.isascii() and given.isdigit() else given
        if given is None:
            return DEFAULTS[name]
        least = 2 if name == "seqlen" else 1
        if isinstance(given, bool) or not isinstance(given, int) or given < least:
            msg = f"{where} {given!r} is not allowed: use a whole number of at least {least}"
            raise TunerError(msg)
        return given


def _numbers(found: Scheme) -> tuple[object, object]:
    return found.weight, found.activation


def check_options(settings: Settings) -> None:
    """Refuse settings that belong to one scheme beside an `AutoScheme`.

    Raises:
        TunerError: with their names.
    """
    own = ("bits", "group_size", "sym")
    if given := [n for n in own if getattr(settings, n) is not None]:
        msg = (
            f"{', '.join(given)} belong to one scheme, and an AutoScheme has several: give its "
            "options these numbers, such as W4A16G64 or {'bits': 4, 'sym': False}"
        )
        raise TunerError(msg)
