"""What a backend supports, as data: one table, from which refusals and listings are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ar_kernels.backends.base import Need

_ANY_WIDTH = tuple(range(2, 9))


@dataclass(frozen=True)
class Support:
    """What layers a backend can serve. Empty tuples and mappings mean anything.

    Attributes:
        devices: torch device types.
        dtypes: types of the activations.
        widths: bits by data type of the weight.
        spans: granularities of the weight's scale, `group`, `channel`, ...
        group_step: group sizes are multiples of this; a channel is a group of all columns.
        asymmetric: weights may have zero points.
        activations: it quantizes activations itself: data types it can.
    """

    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    spans: tuple[str, ...] = ()
    group_step: int = 1
    asymmetric: bool = True
    activations: tuple[str, ...] = ()

    def refuses(self, need: Need) -> str | None:
        """Return why a need is outside the table, or None."""
        spec, act = need.spec, need.activation
        if self.devices and need.device not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {need.device}"
        if act is not None and act.data_type not in self.activations:
            return f"activations are not quantized here, the layer asks for {act}"
        if self.dtypes and need.dtype not in self.dtypes:
            known = ", ".join(_short(d) for d in self.dtypes)
            return f"computes in {known}, not in {_short(need.dtype)}"
        if self.widths and spec.bits not in self.widths.get(spec.data_type, ()):
            return f"holds {self._weights()}, not {spec.data_type}{spec.bits}"
        if self.spans and spec.granularity.span not in self.spans:
            return f"holds one scale per {' or '.join(self.spans)}, not per {spec.granularity}"
        if not (self.asymmetric or spec.symmetric):
            return "holds no zero points"
        size = spec.granularity.region(1, need.columns)[1]
        if size % self.group_step:
            return f"groups of {size} are no multiples of {self.group_step}"
        return None

    def _weights(self) -> str:
        shown = []
        for name, bits in self.widths.items():
            wide = "2-8" if bits == _ANY_WIDTH else "/".join(map(str, bits))
            shown.append(f"{name} {wide}")
        return ", ".join(shown) or "any data type"

    def __str__(self) -> str:
        """Return the table on one line, for listings."""
        parts = [self._weights()]
        if self.spans:
            parts.append(f"per {'/'.join(self.spans)}")
        if self.group_step > 1:
            parts.append(f"groups of {self.group_step}n")
        if not self.asymmetric:
            parts.append("symmetric")
        parts.append("in " + ("/".join(_short(d) for d in self.dtypes) or "any float"))
        if self.activations:
            parts.append(f"activations {'/'.join(self.activations)}")
        parts.append("on " + ("/".join(self.devices) or "any device"))
        return ", ".join(parts)


@runtime_checkable
class Declares(Protocol):
    """A backend that says what it supports as data."""

    @property
    def support(self) -> Support:
        """The table."""


@runtime_checkable
class Installable(Protocol):
    """A backend whose missing parts can be installed."""

    @property
    def install(self) -> str:
        """The command that installs them, `pip install triton`."""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
