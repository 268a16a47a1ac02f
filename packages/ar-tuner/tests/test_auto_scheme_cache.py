from __future__ import annotations

import json
from pathlib import Path

import pytest

from ar_schemes import scheme
from ar_tuner import TunerError
from ar_tuner.auto_scheme.cache import ScoreCache, default_path

KEY = {"model": "m", "text": "t"}
NAMED = {"a": scheme("W2A16"), "b": scheme("W4A16")}


def test_values_are_found_again_by_the_numbers_of_a_scheme(tmp_path) -> None:
    path = tmp_path / "deep" / "scores.json"
    cache = ScoreCache(path, KEY)
    cache.save("layer", {"a": (1.5, 2.0), "b": (0.1, 0.2)}, NAMED)
    other = {"renamed": scheme("W4A16"), "new": scheme("W8A16")}
    found = ScoreCache(path, KEY).known({"layer": other, "unseen": NAMED})
    assert found == {"layer": {"renamed": (0.1, 0.2)}}
    assert [p.name for p in path.parent.iterdir()] == ["scores.json"]


def test_measurements_are_kept_beside_values(tmp_path) -> None:
    path = tmp_path / "scores.json"
    cache = ScoreCache(path, KEY)
    cache.save_measured([(("x", "y"), NAMED["a"], 0.25)])
    cache.save("layer", {"a": (1.0,)}, NAMED)
    assert cache.noise is None
    cache.noise = 0.5
    again = ScoreCache(path, KEY)
    assert again.noise == 0.5
    assert again.measured(("x", "y"), NAMED["a"]) == 0.25
    assert again.measured(("x",), NAMED["a"]) is None
    assert again.measured(("x", "y"), NAMED["b"]) is None


def test_without_a_file_values_stay_in_memory() -> None:
    cache = ScoreCache(None, KEY)
    cache.save("layer", {"a": (1.0,)}, NAMED)
    assert cache.known({"layer": NAMED}) == {"layer": {"a": (1.0,)}}


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch) -> None:
    path = tmp_path / "scores.json"
    ScoreCache(path, KEY).save("one", {"a": (1.0,)}, NAMED)
    before = path.read_bytes()

    def torn(value, file):
        file.write('{"version": 1, "val')
        raise OSError("disk full")

    monkeypatch.setattr(json, "dump", torn)
    with pytest.raises(OSError, match="disk full"):
        ScoreCache(path, KEY).save("two", {"a": (2.0,)}, NAMED)
    assert path.read_bytes() == before


def test_a_file_of_something_else_is_refused(tmp_path) -> None:
    path = tmp_path / "scores.json"
    ScoreCache(path, KEY).save("one", {"a": (1.0,)}, NAMED)
    with pytest.raises(TunerError, match=r"something else \(text differ\)"):
        ScoreCache(path, {**KEY, "text": "u"})
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "version": 0}))
    with pytest.raises(TunerError, match="version 0 differ"):
        ScoreCache(path, KEY)
    path.write_text("{")
    with pytest.raises(TunerError, match="cannot be read"):
        ScoreCache(path, KEY)


def test_the_default_file_depends_on_the_key_alone(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path(KEY) == default_path(dict(reversed(KEY.items())))
    assert default_path(KEY) != default_path({**KEY, "seed": 1})
    assert default_path(KEY).parent == tmp_path / "ar" / "scores"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    assert default_path(KEY).is_relative_to(tmp_path / "me" / ".cache")
