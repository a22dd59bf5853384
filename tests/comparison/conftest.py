"""Comparisons without pictures: tests/report looks at those, and the demo of test_cli.py draws them."""

import pytest

from tests.report.pages import leave_out_pictures


@pytest.fixture(scope="module", autouse=True)
def _undrawn():
    with pytest.MonkeyPatch.context() as patch:
        leave_out_pictures(patch)
        yield
