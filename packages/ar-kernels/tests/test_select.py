"""Which backend is chosen, and what is said of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from ar_kernels import KernelError, builtin, hookimpl, hookspecs, registry
from ar_kernels.backends import Backend, Need, select
from ar_kernels.backends.dense import Dense
from ar_kernels.backends.select import Verdict, choose, judge
from ar_schemes import PluginHost, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NEED = Need(TensorSpec(), 128, 256, "cpu", torch.float32)
ACTIVATIONS = replace(NEED, activation=TensorSpec(bits=8))
UNKNOWN = replace(NEED, activation=TensorSpec(data_type="nosuch"))


class _Absent(Dense):
    name = "absent"
    priority = 99

    def missing(self) -> str | None:
        return "a coprocessor"


class _TakesActivations(Dense):
    name = "takes_activations"

    def refuses(self, need: Need) -> str | None:
        return None


class _Chooser:
    wish: str | None = None

    @hookimpl
    def ar_register_backends(self) -> list[Backend]:
        return [_Absent()]

    @hookimpl
    def ar_choose_backend(self, need: Need, usable: Sequence[Backend]) -> str | None:
        assert need is NEED
        names = [b.name for b in usable]
        assert "absent" not in names
        assert names.index("dense") < names.index("reference")
        return self.wish


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Chooser]:
    """A plugin with a backend that cannot run here and a wish for one of the others."""
    chooser = _Chooser()
    host = PluginHost(
        "ar_kernels",
        hookspecs,
        builtins={"builtin": builtin, "chooser": chooser},
        entry_points=(),
    )
    monkeypatch.setattr(registry, "host", lambda: host)
    monkeypatch.setattr(select, "host", lambda: host)
    registry._backends.cache_clear()
    yield chooser
    registry._backends.cache_clear()


def test_dense_is_the_best_that_is_always_there() -> None:
    choice = choose(NEED, env={})
    assert choice.backend.name == "dense"
    verdicts = dict(choice.reasons)
    assert verdicts["dense"] == "chosen: best usable, priority 10"
    assert verdicts["reference"] == "usable, priority 0"


def test_a_name_decides() -> None:
    assert choose(NEED, "reference", env={}).backend.name == "reference"
    assert choose(NEED, env={"AR_BACKEND": "Reference"}).backend.name == "reference"
    assert choose(NEED, "dense", env={"AR_BACKEND": "reference"}).backend.name == "dense"
    assert choose(NEED, env={"AR_BACKEND": ""}).backend.name == "dense"


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(KernelError, match="Did you mean reference"):
        choose(NEED, "referense", env={})


def test_a_named_backend_that_cannot_serve_is_an_error_with_the_reason() -> None:
    with pytest.raises(KernelError, match=r"dense cannot run int4 group128 \[128, 256\] .*nosuch"):
        choose(UNKNOWN, "dense", env={})


def test_when_none_can_serve_every_reason_is_given() -> None:
    with pytest.raises(KernelError, match="(?s)no backend can run .*dense: .*reference: "):
        choose(UNKNOWN, env={})


def test_where_no_backend_quantizes_activations_the_layer_does_and_the_need_says_so() -> None:
    assert choose(ACTIVATIONS, "dense", env={}).need == replace(ACTIVATIONS, activation=None)
    assert judge(Dense(), ACTIVATIONS) == Verdict(NEED, None)
    assert "not known here" in str(judge(Dense(), UNKNOWN).hurdle)


def test_a_backend_that_quantizes_activations_is_given_the_whole_need() -> None:
    assert judge(_TakesActivations(), ACTIVATIONS) == Verdict(ACTIVATIONS, None)


def test_hook_ar_choose_backend_decides_among_the_usable(plugin: _Chooser) -> None:
    plugin.wish = "reference"
    choice = choose(NEED, env={})
    assert choice.backend.name == "reference"
    said = dict(choice.reasons)
    assert said["absent"] == "missing: a coprocessor"
    assert said["dense"] == "usable, priority 10"
    assert said["reference"] == "chosen: by a plugin, priority 0"
    assert [b for b in said if b in ("absent", "dense", "reference")] == sorted(
        ("absent", "dense", "reference")
    )


def test_hook_ar_choose_backend_may_leave_the_choice(plugin: _Chooser) -> None:
    plugin.wish = None
    assert choose(NEED, env={}).backend.name == "dense"


def test_hook_ar_choose_backend_is_not_asked_when_a_name_is_given(plugin: _Chooser) -> None:
    plugin.wish = "reference"
    assert choose(NEED, "dense", env={}).backend.name == "dense"


def test_hook_ar_choose_backend_cannot_choose_what_is_not_usable(plugin: _Chooser) -> None:
    plugin.wish = "absent"
    with pytest.raises(KernelError, match="unknown usable backend 'absent'.*Known: .*dense, refer"):
        choose(NEED, env={})


@pytest.mark.usefixtures("plugin")
def test_a_named_backend_that_is_missing_something_says_what() -> None:
    with pytest.raises(KernelError, match="absent cannot run .* missing: a coprocessor"):
        choose(NEED, "absent", env={})
