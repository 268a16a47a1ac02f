from __future__ import annotations

import pytest

from ar_schemes import ArError, PluginError, SchemeError, unknown_name


@pytest.mark.parametrize("kind", [SchemeError, PluginError])
def test_every_error_is_an_ar_error(kind) -> None:
    assert issubclass(kind, ArError)


def test_an_unknown_name_lists_the_nearest_first_in_any_case() -> None:
    text = unknown_name("scheme", "w4a6", ["W4A16", "MXFP4", "BF16"])
    assert text.startswith("unknown scheme 'w4a6'. Did you mean W4A16?")
    assert text.endswith("Known: BF16, MXFP4, W4A16.")


def test_a_name_far_from_all_gets_no_guess_and_a_hint_is_added() -> None:
    text = unknown_name("format", "zzzz", [], hint="Install one.")
    assert text == "unknown format 'zzzz'. Known: none. Install one."
