"""Log lines of a long outage: its first failure, one line per interval, its end."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from streamworker.config import Settings, load
from streamworker.errors import KafkaRefused, KafkaUnavailable
from streamworker.kafka.committed_offsets import CommittedOffsets
from streamworker.kafka.transactions import TransactionalCommitStores
from streamworker.log_throttle import QUIET_S, OutageLog
from streamworker.model import CommitPoint, TopicPartition
from streamworker.testing import MemoryObserver

AT = TopicPartition("jobs", 3)


def test_outage_of_two_kinds_logs_the_first_failure_of_each_and_one_end() -> None:
    """Each event is throttled by itself; the last line counts the failures of both."""
    outage_log = OutageLog("commit.recovered", partition="jobs-3")
    with capture_logs() as logs:
        outage_log.worked()
        for tenth in range(150):
            outage_log.failed("commit.unavailable", tenth / 10, reason="away")
        outage_log.failed("commit.transaction_failed", 15, reason="no ACL")
        outage_log.worked()
        outage_log.worked()
        outage_log.failed("commit.unavailable", 15.1, reason="away again")

    away = {"log_level": "warning", "partition": "jobs-3", "event": "commit.unavailable"}
    assert logs == [
        away | {"reason": "away"},
        away | {"reason": "away", "suppressed": 99},
        away | {"event": "commit.transaction_failed", "reason": "no ACL"},
        {"log_level": "info", "event": "commit.recovered", "partition": "jobs-3", "failures": 151},
        away | {"reason": "away again"},
    ]


class Consumer:
    """A consumer that is always a member of the group."""

    async def confirm_membership(self) -> bool:
        return True


async def test_commit_without_an_acl_logs_rarely_and_counts_every_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """During a minute: six lines instead of six hundred, every failure in the metric, and a line at the end."""
    settings: Settings = load(
        None, {"STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL": "http://127.0.0.1/v1"}, needs_keys=False
    )
    observer, consumer = MemoryObserver(), cast("Any", Consumer())
    stores = TransactionalCommitStores(settings, CommittedOffsets(settings, consumer), consumer, observer)
    store: Any = stores.store(AT)
    granted_at = asyncio.get_running_loop().time() + 60

    def is_granted() -> bool:
        return asyncio.get_running_loop().time() >= granted_at

    async def transaction(*_: object) -> None:
        if not is_granted():
            raise KafkaUnavailable("the coordinator is away")

    async def fence() -> None:
        if not is_granted():
            raise KafkaRefused("no ACL for the transactional id")

    async def read(_: TopicPartition) -> CommitPoint | None:
        return None

    monkeypatch.setattr(store, "_transaction", transaction)
    monkeypatch.setattr(store, "_fence", fence)
    monkeypatch.setattr(store._committed, "read", read)
    with capture_logs() as logs:
        await store.commit([], CommitPoint(1))

    lines = [entry for entry in logs if entry["event"] == "commit.unavailable"]
    failures = len(observer.all("kafka_failed"))
    assert [entry["event"] for entry in logs] == [
        "commit.transaction_failed", *["commit.unavailable"] * len(lines), "commit.recovered"
    ]  # fmt: skip
    assert failures > 500
    assert len(lines) == 60 / QUIET_S
    assert [entry["suppressed"] for entry in lines[1:]] == [pytest.approx(99, abs=1)] * (len(lines) - 1)
    assert all(entry["reason"] == "no ACL for the transactional id" for entry in lines)
    assert logs[-1]["failures"] == failures
