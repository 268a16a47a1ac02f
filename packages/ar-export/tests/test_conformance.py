"""Every installed format, ours and others', passes the tests that authors of formats are given."""

from __future__ import annotations

from ar_export import formats
from ar_export.testing import FormatConformance


def case(name: str) -> type:
    """Return the test class of a format."""
    title = f"Test{name.title().replace('_', '')}"
    return type(title, (FormatConformance,), {"subject": formats()[name], "__module__": __name__})


globals().update({made.__name__: made for made in map(case, formats())})


def test_every_format_has_a_class_of_its_own() -> None:
    subjects = {c.subject.name for c in globals().values() if getattr(c, "subject", None)}
    assert subjects == set(formats())
