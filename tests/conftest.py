"""The far ends for every test that asks: `practice`, `embedded_broker`, `apache_kafka`, `broker` (both in turn)."""

from __future__ import annotations

import contextlib
import re
import secrets
from typing import TYPE_CHECKING, Protocol

import pytest

from streamworker.demo.broker import EmbeddedBroker, find_binary
from streamworker.practice import PracticeUpstream
from tests.brokers.apache import EXTERNAL, ApacheKafka, fetched
from tests.brokers.requirement import need

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

_MARKS = {"embedded_broker": pytest.mark.embedded, "apache_kafka": pytest.mark.kafka}
_apache: list[ApacheKafka] = []


class Broker(Protocol):
    """What tests know of a broker."""

    @property
    def bootstrap(self) -> str: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in set(_MARKS).intersection(getattr(item, "fixturenames", ())):
            item.add_marker(_MARKS[name])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch Kafka before the first test: a test's time limit is not made for a download."""
    wanted = any(item.get_closest_marker("kafka") for item in session.items)
    if wanted and not EXTERNAL and not session.config.option.collectonly:
        with contextlib.suppress(pytest.skip.Exception, pytest.fail.Exception):  # each test says so itself
            fetched()


@pytest.fixture(scope="session")
def apache_kafka() -> Iterator[ApacheKafka]:
    """Apache Kafka, one for the session; a test may kill, restart and pause it."""
    kafka = ApacheKafka()
    try:
        kafka.start()
        _apache.append(kafka)
        yield kafka
    finally:
        _apache.clear()
        kafka.stop()


@pytest.fixture(scope="session")
def embedded_broker() -> Iterator[EmbeddedBroker]:
    """The demo's broker, one for the session."""
    try:
        find_binary()
    except RuntimeError as error:
        need(str(error))
    with EmbeddedBroker() as broker:
        yield broker


@pytest.fixture(params=[pytest.param(name, marks=mark) for name, mark in _MARKS.items()])
def broker(request: pytest.FixtureRequest) -> Broker:
    """Each broker in turn."""
    started: Broker = request.getfixturevalue(request.param)
    return started


@pytest.fixture(autouse=True)
def _healed_kafka() -> Iterator[None]:
    """The session's Kafka is up for the next test, whatever this one did."""
    yield
    for kafka in _apache:
        kafka.heal()


@pytest.fixture
def topics(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Names of topics, groups and transactional ids that no other test has: `topics("jobs")`."""
    test = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name)[:80]
    return lambda name: f"{test}.{name}.{secrets.token_hex(4)}"


@pytest.fixture
async def practice() -> AsyncIterator[PracticeUpstream]:
    """A practice upstream in the test's own event loop."""
    async with PracticeUpstream() as upstream:
        yield upstream
