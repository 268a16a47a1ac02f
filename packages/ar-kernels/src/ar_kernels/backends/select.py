"""Which backend serves a layer, with the reason for every one that was considered.

A backend that multiplies plain activations serves layers with quantized ones, too: the layer
quantizes its input before the product.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ar_kernels.backends.measure import fastest
from ar_kernels.backends.support import Installable
from ar_kernels.numerics.activation import refuses_activation
from ar_kernels.registry import backend, backends, host
from ar_kernels.weight import KernelError
from ar_schemes import unknown_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ar_kernels.backends.base import Backend, Need

ENV = "AR_BACKEND"


@dataclass(frozen=True)
class Choice:
    """The backend for a layer.

    Attributes:
        backend: the one to use.
        need: what it is to serve. Without `activation` where the layer asked for one: then the
            layer quantizes its input itself before the product.
        reasons: (name, verdict) of every installed backend, best first.
    """

    backend: Backend
    need: Need
    reasons: tuple[tuple[str, str], ...]


def choose(need: Need, prefer: str | None = None, *, env: Mapping[str, str] = os.environ) -> Choice:
    """Return the backend for a layer: the preferred one, a plugin's choice, or the best usable.

    The best is that of highest priority, or the one measured fastest where
    `AR_KERNELS_AUTOTUNE` asks for that (see `ar_kernels.backends.measure`).

    Args:
        need: what the layer asks.
        prefer: name of a backend; None asks the environment variable `AR_BACKEND`.
        env: where `AR_BACKEND` is read.

    Raises:
        KernelError: the preferred backend is unknown or cannot serve the layer, a plugin chose
            one that is not usable, or none can serve it.
    """
    wanted = prefer or env.get(ENV) or None
    preferred = None if wanted is None else backend(wanted)
    ranked = sorted(backends().values(), key=lambda b: -b.priority)
    verdicts = {b.name: judge(b, need) for b in ranked}
    if preferred is not None:
        _require(preferred, verdicts[preferred.name].hurdle, need)
        return _choice(preferred, "chosen: asked for by name", ranked, verdicts)
    usable = [b for b in ranked if verdicts[b.name].hurdle is None]
    if not usable:
        why = "; ".join(f"{name}: {found.hurdle}" for name, found in verdicts.items())
        msg = f"no backend can run {_words(need)}. {why}"
        raise KernelError(msg)
    named = host().first("ar_choose_backend", need=need, usable=tuple(usable))
    if named is None:
        quick = _quickest(usable, verdicts, env)
        if quick is not None:
            return _choice(quick, "chosen: measured fastest", ranked, verdicts)
        return _choice(usable[0], "chosen: best usable", ranked, verdicts)
    chosen = {b.name: b for b in usable}.get(named)
    if chosen is None:
        hint = f"A plugin's ar_choose_backend asked for it for {_words(need)}."
        raise KernelError(
            unknown_name("usable backend", named, (b.name for b in usable), hint=hint)
        )
    return _choice(chosen, "chosen: by a plugin", ranked, verdicts)


def better_if_installed(need: Need, chosen: Backend) -> str | None:
    """Return one line on a better backend that could be installed, or None."""
    for candidate in sorted(backends().values(), key=lambda b: -b.priority):
        if candidate.priority <= chosen.priority:
            return None
        if not isinstance(candidate, Installable) or candidate.missing() is None:
            continue
        plain = replace(need, activation=None)
        if candidate.refuses(need) is None or candidate.refuses(plain) is None:
            return (
                f"{candidate.name} would run {_words(need)} faster than {chosen.name}: "
                f"{candidate.install}"
            )
    return None


@dataclass(frozen=True)
class Verdict:
    """What a backend says of a need.

    Attributes:
        need: what it would serve: the need, or the need without quantized activations.
        hurdle: why it cannot, None when it can.
    """

    need: Need
    hurdle: str | None


def judge(candidate: Backend, need: Need) -> Verdict:
    """Return whether a backend can serve a need, activations quantized by it or before it."""
    lacks = candidate.missing()
    if lacks is not None:
        return Verdict(need, f"missing: {lacks}")
    why = candidate.refuses(need)
    if why is None or need.activation is None:
        return Verdict(need, why)
    before = refuses_activation(need.activation, need.columns)
    if before is not None:
        return Verdict(need, before)
    plain = replace(need, activation=None)
    return Verdict(plain, candidate.refuses(plain))


def _quickest(
    usable: list[Backend], verdicts: Mapping[str, Verdict], env: Mapping[str, str]
) -> Backend | None:
    """Return the backend that was measured fastest, None when measuring is off.

    Those that quantize activations themselves and those that do not have different needs and are
    not compared: the former go first, as their rank says.
    """
    need = verdicts[usable[0].name].need
    alike = [b for b in usable if verdicts[b.name].need == need]
    name = fastest(need, alike, env)
    return next((b for b in alike if b.name == name), None)


def _require(preferred: Backend, hurdle: str | None, need: Need) -> None:
    if hurdle is not None:
        msg = (
            f"backend {preferred.name} cannot run {_words(need)}: {hurdle}. "
            f"Choose another, or leave the choice to ar-kernels (unset {ENV})."
        )
        raise KernelError(msg)


def _choice(
    chosen: Backend, why: str, ranked: list[Backend], verdicts: Mapping[str, Verdict]
) -> Choice:
    said = {b.name: verdicts[b.name].hurdle or f"usable, priority {b.priority}" for b in ranked}
    said[chosen.name] = f"{why}, priority {chosen.priority}"
    return Choice(chosen, verdicts[chosen.name].need, tuple(said.items()))


def _words(need: Need) -> str:
    act = "" if need.activation is None else f" with {need.activation} activations"
    kind = str(need.dtype).removeprefix("torch.")
    return f"{need.spec} [{need.rows}, {need.columns}]{act} in {kind} on {need.device}"
