"""The suite of registered backends, as a third party runs it; a stranger's backend in it."""

from __future__ import annotations

import subprocess
import sys

from ar_kernels.backends.reference import Reference
from ar_kernels.testing import BackendConformance
from ar_schemes import Granularity, Span, TensorSpec


def test_one_line_runs_the_suite_of_a_backend_in_another_directory(tmp_path) -> None:
    line = ["-q", "-p", "no:cacheprovider", "--pyargs", "ar_kernels.testing.test_registered"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *line, "-k", "Test_dense and (buffers or refuses)"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


class Wrong(Reference):
    """A backend that forgets the bias and returns a view of its input's type at best."""

    name = "wrong"

    def linear(self, x, packed, bias):  # noqa: ARG002
        return super().linear(x, packed, None)


def test_the_suite_notices_a_backend_that_is_wrong() -> None:
    suite = BackendConformance()
    suite.subject = Wrong()  # type: ignore[misc]
    suite.specs = (TensorSpec(granularity=Granularity(Span.GROUP, (32,))),)  # type: ignore[misc]
    failed = False
    try:
        suite.test_the_product_is_that_of_the_dequantized_weight()
    except AssertionError:
        failed = True
    assert failed
