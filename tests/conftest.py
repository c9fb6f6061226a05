"""What all suites share: a limit of time, so that CI tells its outcome on a slow machine, too."""

from __future__ import annotations

import time

import pytest

START_SECONDS = time.monotonic()  # of this worker


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--minutes",
        type=float,
        default=None,
        help="begin no test after so many minutes: the rest are skipped, and say so",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - START_SECONDS > 60 * minutes:
        pytest.skip(f"{minutes:g} minutes are over on this slow machine; it runs without --minutes")
