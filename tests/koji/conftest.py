"""A Koji for the whole session, or two: the stand-in of standin/, and the real one of realkoji/.

There is no __init__.py here on purpose: this directory would become a package named koji.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from realkoji import install

if TYPE_CHECKING:
    from harness.base import AnyKoji
    from realkoji.real import RealKoji
    from standin.standin import StandInKoji
    from taskflow import Submit

KOJIS = ["stand-in", pytest.param("real", marks=pytest.mark.real_koji)]

pytest.register_assert_rewrite("taskflow")

FIXTURES = ("any_koji", "stand_in_koji", "real_koji")


def pytest_itemcollected(item: pytest.Item) -> None:
    # koji's library leaves its connections to the garbage collector, which may come to the sockets
    # first where an exception has kept a session in a cycle.
    item.add_marker(pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"))


@pytest.fixture(scope="session", params=KOJIS)
def any_koji(request: pytest.FixtureRequest) -> AnyKoji:
    """Each of them in turn; harness/base.py says what it offers."""
    koji: AnyKoji = request.getfixturevalue(
        {"stand-in": "stand_in_koji", "real": "real_koji"}[request.param]
    )
    return koji


@pytest.fixture(scope="session")
def stand_in_koji(request: pytest.FixtureRequest) -> Iterator[StandInKoji]:
    from standin.standin import running_stand_in

    with running_stand_in() as koji:
        yield koji
        koji.keep_logs = request.session.testsfailed > 0


@pytest.fixture(scope="session")
def real_koji(request: pytest.FixtureRequest) -> Iterator[RealKoji]:
    reason = install.missing()
    if reason:
        pytest.skip(reason)
    from realkoji.real import running_koji  # needs what may be missing

    with running_koji() as koji:
        yield koji
        koji.keep_logs = request.session.testsfailed > 0


@pytest.fixture(scope="module")
def koji(any_koji: AnyKoji) -> Iterator[AnyKoji]:
    """With our builder plugin, and an image to build from."""
    from taskflow import with_images

    with with_images(any_koji) as koji:
        yield koji


@pytest.fixture
def submit(koji: AnyKoji) -> Iterator[Submit]:
    from taskflow import submitting

    with submitting(koji) as submit:
        yield submit


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    arguments = getattr(item, "funcargs", {})
    koji = next((arguments[one] for one in FIXTURES if one in arguments), None)
    if report.failed and koji is not None:
        report.sections.append((f"{koji.name} Koji", f"its logs are in {koji.logs}"))
