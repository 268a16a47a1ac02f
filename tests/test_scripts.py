"""The scripts of the repository do what their first lines say."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

import ar_schemes

ROOT = Path(__file__).parents[1]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


release = load("release")
check_changelogs = load("check_changelogs")
check_wheels = load("check_wheels")
VERSION = ar_schemes.__version__


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A copy of one package's metadata, with something to release."""
    source, target = ROOT / "packages" / "ar-schemes", tmp_path / "packages" / "ar-schemes"
    inside = target / "src" / "ar_schemes"
    inside.mkdir(parents=True)
    shutil.copy(source / "pyproject.toml", target)
    shutil.copy(source / "src" / "ar_schemes" / "__init__.py", inside)
    (target / "CHANGELOG.md").write_text(
        "# Changelog\n\n## Unreleased\n\n### Added\n\n- A thing.\n\n## 0.0.1\n\n- Old.\n"
    )
    return tmp_path


def test_a_release_dates_the_changelog_and_raises_both_versions(repo) -> None:
    changes = release.plan(repo, "ar-schemes", "9.0.0", "2030-01-02")
    log, project, init = changes.values()
    assert "## 9.0.0 - 2030-01-02\n\n### Added\n\n- A thing.\n" in log
    assert "Unreleased" not in log
    assert "## 0.0.1\n\n- Old.\n" in log
    assert 'version = "9.0.0"' in project
    assert '__version__ = "9.0.0"' in init
    assert all(path.read_text() != text for path, text in changes.items())


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        ("ar-scheme", "9.0.0", "unknown package 'ar-scheme'. Known: ar-schemes."),
        ("ar-schemes", "9.0", "not of the form 1.2.3"),
        ("ar-schemes", "0.0.1", "version 0.0.1 does not rise above"),
    ],
)
def test_a_release_with_a_mistake_is_refused(repo, package, version, message) -> None:
    with pytest.raises(release.Refused, match=message):
        release.plan(repo, package, version, "2030-01-02")


@pytest.mark.parametrize("text", ["# Log\n", "# Log\n\n## Unreleased\n\n## 0.1.0\n\n- Old.\n"])
def test_a_release_needs_something_to_say(text) -> None:
    with pytest.raises(release.Refused, match="no `## Unreleased` section with entries"):
        release.dated(text, "1.0.0", "2030-01-02")


def test_a_version_must_be_there_once() -> None:
    with pytest.raises(release.Refused, match="2 matches"):
        release.raised('v = "1.0.0"\nv = "1.0.0"\n', r'^v = "(.*)"$', "2.0.0")


@pytest.mark.parametrize("above", ["", "## Unreleased\n\n"])
def test_changelogs_that_say_something_are_in_order(repo, above) -> None:
    assert check_changelogs.problems(repo) == []
    log = repo / "packages" / "ar-schemes" / "CHANGELOG.md"
    log.write_text(f"# Log\n\n{above}## {VERSION} - 2030-01-02\n\n- A thing.\n")
    assert check_changelogs.problems(repo) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Log\n", "no entry for"),
        ("# Log\n\n## 7.7.7\n\n- A thing.\n", "newest"),
        ("# Log\n\n## Unreleased\n\n## 0.0.1\n\n- Old.\n", "newest changelog entry is 0.0.1"),
        ("# Log\n\n## Unreleased\n", "no entry for"),
        ("# Log\n\n## VERSION\n\n## 0.0.1\n\n- Old.\n", "empty"),
    ],
    ids=["none", "other-version", "unreleased-empty", "unreleased-only", "empty"],
)
def test_a_changelog_that_says_nothing_is_reported(repo, text, message) -> None:
    text = text.replace("VERSION", VERSION)
    (repo / "packages" / "ar-schemes" / "CHANGELOG.md").write_text(text)
    (line,) = check_changelogs.problems(repo)
    assert line.startswith("ar-schemes: ")
    assert message in line


def wheel(folder: Path, **files: str) -> Path:
    path = folder / "ar_x-1.0.0-py3-none-any.whl"
    whole = {
        "ar_x/__init__.py": '__version__ = "1.0.0"\n',
        "ar_x/py.typed": "",
        "ar_x-1.0.0.dist-info/METADATA": "Name: ar-x\nVersion: 1.0.0\n\nWhat it is.\n",
        "ar_x-1.0.0.dist-info/licenses/LICENSE": "Apache",
    }
    with zipfile.ZipFile(path, "w") as made:
        for name, text in {**whole, **files}.items():
            if text != "absent":
                made.writestr(name, text)
    return path


def test_a_whole_wheel_is_accepted(tmp_path) -> None:
    assert check_wheels.problems(wheel(tmp_path)) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"ar_x/py.typed": "absent"}, "py.typed is missing"),
        ({"ar_x-1.0.0.dist-info/licenses/LICENSE": "absent"}, "the license is missing"),
        ({"tests/test_x.py": ""}, "tests/test_x.py does not belong here"),
        ({"ar_x/tests/test_x.py": ""}, "is a leftover"),
        ({"ar_x/__init__.py": '__version__ = "0.9.0"\n'}, "__version__ is not that"),
        ({"ar_x-1.0.0.dist-info/METADATA": "Name: ar-x\nVersion: 1.0.0\n"}, "description is empty"),
    ],
    ids=["typed", "license", "stray", "tests", "version", "description"],
)
def test_a_wheel_that_is_not_whole_is_reported(tmp_path, files, message) -> None:
    (line,) = check_wheels.problems(wheel(tmp_path, **files))
    assert message in line
