"""Fixtures for upstream and brokers: `practice`, `embedded_broker`, `apache_kafka`, `broker` (each broker in turn)."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import secrets
import signal
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import structlog

from streamworker.demo.broker import EmbeddedBroker, find_binary
from streamworker.demo.child import ChildError
from streamworker.practice import PracticeUpstream
from streamworker.telemetry.logging import FLOORS
from tests.brokers.apache import EXTERNAL, ApacheKafka, archived, can_run
from tests.brokers.requirement import need

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator


@pytest.fixture(autouse=True, scope="session")
def _no_logger_is_cached() -> Iterator[None]:
    """Keep structlog from caching loggers: `capture_logs` would not see a logger that an earlier test has cached."""
    configure = structlog.configure

    def configure_without_cache(**options: Any) -> None:
        configure(**options | {"cache_logger_on_first_use": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structlog, "configure", configure_without_cache)
        yield


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """Restore the process's logging configuration after each test."""
    loggers = [logging.getLogger(), *map(logging.getLogger, FLOORS)]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    for logger in loggers:
        logger.propagate = True
        for handler in logger.handlers[:]:
            if type(handler).__module__.startswith("streamworker."):
                logger.removeHandler(handler)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


_MARKS = {"embedded_broker": pytest.mark.embedded, "apache_kafka": pytest.mark.kafka}
_apache: list[ApacheKafka] = []

HERE = Path(__file__).parent
WAITING = {"browser", "chaos", "deploy", "integration", "package"}
"""The directories whose tests wait for brokers, browsers and other programs."""


class Broker(Protocol):
    """A broker as tests see it."""

    @property
    def bootstrap(self) -> str: ...


def pytest_configure() -> None:
    """Make Ctrl-C work in commands that tests start: a shell starts what runs in the background without, and children inherit it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect the tests without the garbage collector, which would walk through all of them many times."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _older_objects_are_frozen() -> None:
    """Hide the objects of other modules from the garbage collector.

    Thousands of tests and reports are a million objects: a full collection takes half a second with them, 10 ms without.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_kafka = can_run()
    for item in items:
        for name in set(_MARKS).intersection(getattr(item, "fixturenames", ())):
            item.add_marker(_MARKS[name])
        # Where Apache Kafka runs, it is enough that `make test` has a claim on it; the demo's broker follows with `make test-long`.
        given = (
            item.callspec.params.get("broker")
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else None
        )
        if on_kafka and given == "embedded_broker" and item.path.name != "test_brokers.py":
            item.add_marker(pytest.mark.long)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = _alternating(items)


def _alternating(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests so that files which wait for other processes alternate with files which compute, as long as there are both.

    Whole files run in several processes at once: while some wait, the others use the cores.
    """
    waiting: dict[Path, list[pytest.Item]] = {}
    computing: dict[Path, list[pytest.Item]] = {}
    for item in items:
        is_waiting = WAITING.intersection(item.path.relative_to(HERE).parts[:1])
        (waiting if is_waiting else computing).setdefault(item.path, []).append(item)
    none: list[pytest.Item] = []
    pairs = zip_longest(waiting.values(), computing.values(), fillvalue=none)
    return [item for first, second in pairs for item in (*first, *second)]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch Kafka before the first test, because the download may exceed the time limit of a test."""
    wanted = any(item.get_closest_marker("kafka") for item in session.items)
    if wanted and not EXTERNAL and not session.config.option.collectonly:
        # Each test reports it.
        with contextlib.suppress(pytest.skip.Exception, pytest.fail.Exception, AssertionError, ChildError):
            archived()


@pytest.fixture(scope="session")
def apache_kafka() -> Iterator[ApacheKafka]:
    """Apache Kafka, one per session; a test may kill, restart and pause it."""
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
    """The demo's broker, one per session."""
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
    """Restart or resume the session's Kafka after a test that stopped it."""
    yield
    for kafka in _apache:
        kafka.heal()


@pytest.fixture
def topics(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Make unique names of topics, groups and transactional ids: `topics("jobs")`."""
    test = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name)[:80]
    return lambda name: f"{test}.{name}.{secrets.token_hex(4)}"


@pytest.fixture
async def practice() -> AsyncIterator[PracticeUpstream]:
    """A practice upstream in the event loop of the test."""
    async with PracticeUpstream() as upstream:
        yield upstream
