"""Devices: what the user asks for, what the machine has, and where each block computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    DeviceMap = str | int | torch.device | Mapping[str, "str | int | torch.device"] | None

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Machine:
    """The accelerators of a machine: their kind (`cuda`, `xpu`, `hpu`, `mps`) and their number."""

    kind: str | None = None
    count: int = 0

    @classmethod
    def here(cls) -> Machine:
        """Return what this process can use, as torch tells it."""
        if not torch.accelerator.is_available():
            return cls()
        found = torch.accelerator.current_accelerator()
        return cls(None if found is None else found.type, torch.accelerator.device_count())

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The accelerators, in order."""
        if self.kind is None:
            return ()
        return tuple(torch.device(self.kind, i) for i in range(self.count))

    def __str__(self) -> str:
        return ", ".join(["cpu", *map(str, self.devices)])


@dataclass(frozen=True)
class Asked:
    """A `device_map`, understood.

    Attributes:
        devices: where blocks compute, shared out in order; empty: where the model is.
        by_name: device by the name of a module, for a map that names them; "" means the rest.
    """

    devices: tuple[torch.device, ...] = ()
    by_name: tuple[tuple[str, torch.device], ...] = ()

    @property
    def nothing(self) -> bool:
        """True when nothing was asked for."""
        return not self.devices and not self.by_name


@dataclass(frozen=True)
class Placement:
    """Where things are while the walk lasts; None: where they are now.

    Attributes:
        home: the model's own code, what lies outside the blocks, and the calibration states.
        blocks: device of each block.
    """

    home: torch.device | None
    blocks: tuple[torch.device | None, ...]


def parse(device_map: DeviceMap, machine: Machine) -> Asked:
    """Return a `device_map`, checked against the machine.

    A name (`cpu`, `cuda`, `cuda:1`, `xpu`), the number of an accelerator, several of either
    separated by commas, `auto` (every accelerator; the CPU where there is none), a dict from
    module names to devices, or None.

    Raises:
        TunerError: a device that this machine has not, or something else.
    """
    if device_map is None:
        return Asked()
    if isinstance(device_map, Mapping):
        pairs = {str(name): _one(value, machine) for name, value in device_map.items()}
        if not pairs:
            msg = "device_map {} names no device; give {'': 'cpu'}, say, or leave it out"
            raise TunerError(msg)
        return Asked(by_name=tuple(pairs.items()))
    if isinstance(device_map, str) and device_map.strip() == "auto":
        return Asked(machine.devices or (CPU,))
    parts = device_map.split(",") if isinstance(device_map, str) else [device_map]
    return Asked(tuple(_one(part, machine) for part in parts))


def default(machine: Machine) -> Asked:
    """Return what a model in a directory gets when nothing is asked for: the first accelerator."""
    return Asked(machine.devices[:1] or (CPU,))


def place(asked: Asked, blocks: Sequence[tuple[str, int]], *, low_gpu_mem_usage: bool) -> Placement:
    """Return where everything is while the walk lasts.

    Blocks are shared out over several devices in order, so that each holds about the same number
    of bytes and states change devices as seldom as can be.

    Args:
        asked: the device map.
        blocks: name and bytes of each block, in the order of the model.
        low_gpu_mem_usage: calibration states wait on the CPU, and go to the block's device a
            minibatch at a time.

    Raises:
        TunerError: a map that leaves out blocks, or splits one.
    """
    if asked.nothing:
        return Placement(None, (None,) * len(blocks))
    if asked.by_name:
        home, chosen = _by_name(asked.by_name, [name for name, _ in blocks])
    else:
        home = asked.devices[0]
        chosen = [asked.devices[i] for i in _shares([b for _, b in blocks], len(asked.devices))]
    return Placement(CPU if low_gpu_mem_usage else home, tuple(chosen))


def checked_device(name: str) -> torch.device:
    """Return a device that this machine has.

    Raises:
        TunerError: it has not, or the name means nothing to torch.
    """
    return _one(name, Machine.here())


def _one(value: str | int | torch.device, machine: Machine) -> torch.device:
    text = str(value).strip()
    number = text.isdigit() and not isinstance(value, bool)
    name = f"{machine.kind or 'accelerator'}:{text}" if number else text
    try:
        device = torch.device(name)
    except RuntimeError as error:
        reason = "this machine has no accelerator" if number else str(error).partition("\n")[0]
        raise TunerError(_unusable(text, reason, machine)) from error
    if device.type == "cpu":
        return device
    if device.type != machine.kind:
        raise TunerError(_unusable(text, f"this machine has no {device.type}", machine))
    if (device.index or 0) >= machine.count:
        raise TunerError(_unusable(text, f"{device.type} has {machine.count} here", machine))
    return torch.device(device.type, device.index or 0)


def _unusable(text: str, reason: str, machine: Machine) -> str:
    return f"device {text!r} cannot be used here: {reason}. Available: {machine}"


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """Return the share of each item, shares being runs of about equal size."""
    total, before, out = sum(sizes), 0, []
    for size in sizes:
        middle = before + size / 2
        out.append(min(count - 1, int(middle * count / total)) if total else 0)
        before += size
    return out


def _by_name(
    pairs: Sequence[tuple[str, torch.device]], blocks: Sequence[str]
) -> tuple[torch.device, list[torch.device]]:
    inner = [k for k, _ in pairs if any(k.startswith(f"{b}.") for b in blocks)]
    if inner:
        msg = (
            f"device_map: {', '.join(inner[:4])} would split a block over devices, which is not "
            "possible; name whole blocks or lists of them"
        )
        raise TunerError(msg)
    found = {name: _longest(pairs, name) for name in blocks}
    lost = [name for name, device in found.items() if device is None]
    if lost:
        msg = (
            f"device_map says nothing of {len(lost)} blocks: {', '.join(lost[:6])}. "
            "Add them, or '' for everything that is not named."
        )
        raise TunerError(msg)
    chosen = [device for device in found.values() if device is not None]
    rest = {d for k, d in pairs if not any(k == b or b.startswith(f"{k}.") for b in blocks)}
    rest = {d for k, d in pairs if k == ""} or rest
    if len(rest) > 1:
        msg = (
            f"device_map puts what lies outside the blocks on {len(rest)} devices "
            f"({', '.join(sorted(map(str, rest)))}); it is on one. Name it with ''."
        )
        raise TunerError(msg)
    return (rest.pop() if rest else chosen[0]), chosen


def _longest(pairs: Sequence[tuple[str, torch.device]], name: str) -> torch.device | None:
    fitting = [(len(k), d) for k, d in pairs if k in ("", name) or name.startswith(f"{k}.")]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None
