from __future__ import annotations

import pytest

from ar_schemes import Scheme, SchemeError, host, registry, scheme, schemes


@pytest.fixture
def fresh(monkeypatch):
    """The caches of the package, empty before and after."""
    registry.host.cache_clear()
    registry._registry.cache_clear()
    yield monkeypatch
    registry.host.cache_clear()
    registry._registry.cache_clear()


def test_a_scheme_object_is_returned_as_it_is() -> None:
    mine = Scheme(name="mine")
    assert scheme(mine) is mine


def test_a_flat_dict_gives_a_scheme_with_a_describing_name() -> None:
    assert scheme({"bits": 3, "group_size": -1, "sym": False}).name == "W3A16-channel-asym"


def test_names_are_found_in_any_case() -> None:
    assert scheme("gguf:q4_k_m") is schemes()["GGUF:Q4_K_M"]


def test_the_host_is_made_once() -> None:
    assert host() is host()
    assert host().project == "ar_schemes"


def test_hook_ar_register_schemes_brings_the_first_party_presets() -> None:
    schemes()
    record = host().records[0]
    assert record.hooks == ("ar_register_schemes",)
    assert "W4A16" in record.provides


def test_an_unknown_name_tells_of_plugins_that_failed_to_load(fresh, tmp_path) -> None:
    info = tmp_path / "ar_broken-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ar-broken\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[ar_schemes]\nbroken = ar_no_such_module\n")
    fresh.syspath_prepend(tmp_path)
    with pytest.raises(SchemeError, match="1 plugins failed to load: see `ar plugins`"):
        scheme("W4A61")
