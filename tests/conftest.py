"""Fixtures for all tests, and the rule that the real engine's tests may not be skipped in CI."""

import os
from pathlib import Path

import pytest

IN_CI = os.environ.get("DEEPMATH_CI") == "1"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder named by DEEPMATH_DATA, with the benchmark files that are too big or not ours to
    keep here.
    """
    folder = os.environ.get("DEEPMATH_DATA")
    if not folder:
        pytest.skip("needs data files: set DEEPMATH_DATA to their folder")
    if not Path(folder).is_dir():
        pytest.fail(f"DEEPMATH_DATA={folder} is not a folder")
    return Path(folder)


def _fail(report, why: str) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{why} (DEEPMATH_CI=1): {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if (
        IN_CI
        and report.skipped
        and not hasattr(report, "wasxfail")
        and item.get_closest_marker("engine")
    ):
        _fail(report, "a test of the real engine was skipped")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield  # a file that skips as a whole has no items, hence no markers
    if IN_CI and report.skipped:
        _fail(report, "a whole test file was skipped")
    return report
