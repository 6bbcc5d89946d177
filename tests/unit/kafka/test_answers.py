"""Brokers that leave requests unanswered: when one is overdue, and what is logged."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from streamworker.kafka.answers import CHECK_S, CONNECTION, AnswerWatch, PendingRequest, SilentBrokers
from streamworker.log_throttle import QUIET_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import EventDict

BROKER = "kafka:9092"


def request(name: str = "Heartbeat", allowed_s: float = 0.0) -> PendingRequest:
    """Return a request that is equal to no other one."""
    return PendingRequest(key=object(), name=name, allowed_s=allowed_s)


def first_overdue(
    oldest: Callable[[int], PendingRequest | None],
    *,
    within_s: float = 30.0,
    progress: Callable[[int], int] = lambda _: 0,
    every_s: float = CHECK_S,
) -> float | None:
    """Check a connection at intervals; return the seconds until its oldest request is overdue, None if it never is."""
    watch = AnswerWatch()
    for number in range(round(within_s / every_s)):
        if watch.is_overdue(100 + number * every_s, oldest(number), progress(number)):
            return number * every_s
    return None


@pytest.mark.parametrize(("allowed_s", "after_s"), [(0.0, 2.25), (0.5, 2.75), (20.0, 22.25), (inf, None)])
def test_request_is_overdue_two_seconds_after_the_broker_should_have_answered(
    allowed_s: float, after_s: float | None
) -> None:
    """A fetch waits for records; a join waits for the other members of the group without a limit."""
    one = request(allowed_s=allowed_s)

    assert first_overdue(lambda _: one) == after_s


def test_fetch_that_was_sent_right_before_the_broker_hangs_is_overdue_within_three_seconds() -> None:
    """The default of half a second, and a check right before the request, which does not see it."""
    one = request(allowed_s=0.5)
    after_s = first_overdue(lambda number: one if number else None)

    assert after_s is not None
    assert after_s <= 3


def test_wait_is_measured_from_the_answer_to_the_request_before() -> None:
    """A request behind a fetch is not overdue because the fetch has waited; its own wait begins then."""
    fetch, other = request(allowed_s=5), request()

    assert first_overdue(lambda number: fetch if number * CHECK_S < 4 else other) == 4 + 2.25


ONE = request()


@pytest.mark.parametrize(
    "oldest",
    [lambda _: None, lambda _: request(), lambda number: None if number % 8 == 0 else ONE],
    ids=["idle", "busy", "answered now and then"],
)
def test_connection_whose_requests_are_answered_is_not_overdue(
    oldest: Callable[[int], PendingRequest | None],
) -> None:
    """Whatever the number of requests."""
    assert first_overdue(oldest) is None


def test_request_is_not_overdue_while_bytes_arrive() -> None:
    """A large response over a slow network, of which a part comes every second; then it stops."""
    one = request()

    assert first_overdue(lambda _: one, progress=lambda number: number // 4) is None
    assert first_overdue(lambda _: one, progress=lambda number: min(number // 4, 10)) == 10 + 2.25


def test_request_is_overdue_although_more_requests_wait_to_be_sent() -> None:
    """Progress is negative where the broker does not read: the buffer grows."""
    one = request()

    assert first_overdue(lambda _: one, progress=lambda number: -number) == 2.25


@pytest.mark.parametrize("stopped_s", [3.0, 60.0, 86_400.0])
def test_process_that_was_stopped_does_not_report_the_broker(stopped_s: float) -> None:
    """The check after the stop counts for two checks at most: the answer may be there, unread."""
    watch, one = AnswerWatch(), request()
    times = [0.0, 0.25, 0.5, stopped_s, stopped_s + 0.25]

    assert [watch.is_overdue(100 + at, one) for at in times] == [False] * 5
    assert watch.waited_s == pytest.approx(0.25 + 0.25 + 0.5 + 0.25)


def test_process_with_a_loop_that_lags_reports_a_broker_that_hangs_later() -> None:
    """A check each second counts for half a second: the broker is reported after twice the time, not never."""
    one = request()

    assert first_overdue(lambda _: one, every_s=1.0) == 5.0


# The log


class Connection:
    """A connection whose oldest request has waited for a while."""

    def __init__(self, brokers: SilentBrokers, waited_s: float = 2.25, broker: str = BROKER) -> None:
        self._brokers = brokers
        self._broker = broker
        self._watch = AnswerWatch()
        self._watch.waited_s = waited_s

    def overdue(self, now: float, name: str = "Fetch") -> None:
        self._brokers.overdue(self._broker, self._watch, request(name), now)

    def answered(self, now: float) -> None:
        self._brokers.answered(self._broker, self._watch, now)

    def closed(self) -> None:
        self._brokers.closed(self._broker, self._watch)


def summary(logs: list[EventDict]) -> list[Any]:
    return [(line["event"], line.get("request") or line["silent_s"]) for line in logs]


def test_broker_that_does_not_answer_is_named_with_request_time_and_advice() -> None:
    """One line at level warning; the end of the outage is one at level info, with its length."""
    brokers = SilentBrokers()
    one = Connection(brokers)
    with capture_logs() as logs:
        one.overdue(100.0)
        one.overdue(100.25)
        one.answered(104.5)

    assert [(line["event"], line["broker"], line["log_level"]) for line in logs] == [
        ("kafka.not_answering", BROKER, "warning"),
        ("kafka.answering", BROKER, "info"),
    ]
    assert (logs[0]["request"], logs[0]["waited_s"]) == ("Fetch", 2.2)
    assert "check whether its process hangs or is stopped" in logs[0]["reason"]
    assert logs[1]["silent_s"] == 6.8  # since 97.75
    assert not brokers


def test_host_that_does_not_accept_a_connection_is_reported_as_such() -> None:
    """The advice is another one: a firewall may drop the packets."""
    with capture_logs() as logs:
        Connection(SilentBrokers()).overdue(100.0, CONNECTION)

    assert logs[0]["request"] == "connection"
    assert "does not complete the connection" in logs[0]["reason"]
    assert "firewall" in logs[0]["reason"]


def test_broker_is_named_once_per_interval_whatever_the_number_of_connections() -> None:
    """A worker has a producer for each of its partitions."""
    brokers = SilentBrokers()
    connections = [Connection(brokers) for _ in range(20)]
    with capture_logs() as logs:
        for check in range(round(25 / CHECK_S)):
            for one in connections:
                one.overdue(100 + check * CHECK_S)

    assert len(logs) == 1 + 25 // QUIET_S
    assert all("suppressed" not in line for line in logs)  # checks are not failures


def test_each_broker_has_an_outage_of_its_own() -> None:
    """One that answers does not end the outage of another one."""
    brokers = SilentBrokers()
    one, other = (Connection(brokers, broker=name) for name in ("a:1", "b:1"))
    with capture_logs() as logs:
        one.overdue(100.0)
        other.overdue(101.0)
        other.answered(102.0)

    assert [(line["event"], line["broker"]) for line in logs] == [
        ("kafka.not_answering", "a:1"),
        ("kafka.not_answering", "b:1"),
        ("kafka.answering", "b:1"),
    ]
    assert brokers


def test_outage_lasts_until_every_connection_is_answered() -> None:
    """A produce request may wait for replicas while the broker answers fetches: this must not alternate."""
    brokers = SilentBrokers()
    produce, fetch = Connection(brokers), Connection(brokers)
    with capture_logs() as logs:
        produce.overdue(100.0, "Produce")
        fetch.answered(100.1)
        produce.overdue(100.25, "Produce")
        fetch.answered(100.3)
        produce.answered(101.0)
        produce.answered(102.0)

    assert summary(logs) == [("kafka.not_answering", "Produce"), ("kafka.answering", 3.2)]


def test_closed_connection_does_not_end_the_outage() -> None:
    """aiokafka closes it when the request's time limit is over; the next one may hang as well."""
    brokers = SilentBrokers()
    old, new = Connection(brokers), Connection(brokers)
    with capture_logs() as logs:
        old.overdue(100.0)
        old.closed()
        assert brokers
        new.overdue(104.0, "ApiVersion")
        new.answered(106.0)

    assert summary(logs) == [("kafka.not_answering", "Fetch"), ("kafka.answering", 8.2)]


def test_connection_that_is_closed_without_an_answer_lets_another_one_end_the_outage() -> None:
    """Otherwise the outage of a connection that does not exist any more would last for ever."""
    brokers = SilentBrokers()
    old, new = Connection(brokers), Connection(brokers)
    with capture_logs() as logs:
        old.overdue(100.0)
        old.closed()
        new.answered(101.0)

    assert summary(logs) == [("kafka.not_answering", "Fetch"), ("kafka.answering", 3.2)]


def test_answers_and_closes_without_an_outage_log_nothing() -> None:
    """The usual case."""
    brokers = SilentBrokers()
    with capture_logs() as logs:
        Connection(brokers).answered(100.0)
        Connection(brokers).closed()

    assert logs == []
    assert not brokers
