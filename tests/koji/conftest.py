"""The real Koji, one for the whole session; see realkoji/real.py.

There is no __init__.py here on purpose: this directory would become a package named koji.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from realkoji import install

if TYPE_CHECKING:
    from realkoji.real import RealKoji


@pytest.fixture(scope="session")
def real_koji(request: pytest.FixtureRequest) -> Iterator[RealKoji]:
    reason = install.missing()
    if reason:
        pytest.skip(reason)
    from realkoji.real import running_koji  # needs what may be missing

    with running_koji() as koji:
        yield koji
        koji.keep_logs = request.session.testsfailed > 0


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    koji = getattr(item, "funcargs", {}).get("real_koji")
    if report.failed and koji is not None:
        report.sections.append(("real Koji", f"its logs are in {koji.logs}"))
