"""Readers of Kafka under arbitrary failures: each record is returned once and in order, on a cluster in memory."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.errors import KafkaConnectionError
from hypothesis import given
from hypothesis import strategies as st

from streamworker.config import KafkaSettings
from streamworker.kafka.scan import LogScanner, is_aborted
from streamworker.kafka.tail import TopicTail
from streamworker.model import TopicPartition
from tests.memory_kafka import ABORTED, COMMITTED, MARKER, OPEN, MemoryKafka
from tests.turnable import run, until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

PARTITIONS = 3
numbers = st.integers(0, PARTITIONS - 1)
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["write", "write", "pause", "resume", "abort", "marker"]), numbers),
        st.tuples(st.sampled_from(["fail", "refuse", "crash", "add"]), st.just(0)),
        st.tuples(st.just("wait"), st.integers(0, 30)),
    ),
    max_size=40,
)


def on_cluster(work: Callable[[MemoryKafka], Coroutine[Any, Any, None]], **topics: int) -> None:
    """Run a coroutine with a cluster that all clients connect to."""
    with pytest.MonkeyPatch.context() as patch:
        kafka = MemoryKafka(**topics)
        kafka.install(patch)
        run(work(kafka))


@given(steps=steps, committed_only=st.booleans())
def test_tail_returns_each_record_once_and_in_order_whatever_fails(
    steps: list[tuple[str, int]], committed_only: bool
) -> None:
    """Also of partitions that are paused, or added meanwhile; its positions never decrease."""
    on_cluster(lambda kafka: follow(kafka, steps, committed_only=committed_only), t=2)


async def follow(kafka: MemoryKafka, steps: list[tuple[str, int]], *, committed_only: bool) -> None:
    """Take the steps while a tail follows the topic; compare what it returned with what was written."""
    returned: dict[int, list[bytes | None]] = {}
    positions: dict[int, int] = {}

    def on_records(partition: int, records: Sequence[Any], position: int) -> None:
        assert position > positions.get(partition, 0)
        positions[partition] = position
        returned.setdefault(partition, []).extend(record.value for record in records)

    tail = TopicTail(KafkaSettings(), "t", on_records, committed_only=committed_only)
    await tail.start()
    away = KafkaConnectionError("away")
    actions: dict[str, Callable[[bytes, int], object]] = {
        "write": lambda value, at: kafka.write("t", value, partition=at),
        "abort": lambda value, at: kafka.write("t", value, partition=at, state=ABORTED),
        "marker": lambda _, at: kafka.write("t", None, partition=at, state=MARKER),
        "pause": lambda _, at: tail.pause(at),
        "resume": lambda _, at: tail.resume(at),
        "fail": lambda *_: kafka.errors["getmany"].append(away),
        "refuse": lambda *_: kafka.errors["start"].append(away),
        "crash": lambda *_: kafka.consumers[-1].stop_fetching(),
        "add": lambda *_: kafka.create("t", PARTITIONS),
    }
    for number, (step, argument) in enumerate(steps):
        if step == "wait":
            await asyncio.sleep(argument / 20)
        else:
            actions[step](str(number).encode(), argument if argument < len(kafka.topics["t"]) else 0)
    for partition in range(PARTITIONS):
        tail.resume(partition)
    logs = kafka.topics["t"]
    await until(lambda: tail.positions == {number: log.end for number, log in enumerate(logs)})
    await tail.stop()

    returnable = {COMMITTED} if committed_only else {COMMITTED, ABORTED}
    for number, log in enumerate(logs):
        states = zip(log.records, log.states, strict=True)
        assert returned.get(number, []) == [record.value for record, state in states if state in returnable]
    assert not tail.crashed.done()
    assert all(consumer.is_stopped for consumer in kafka.consumers)


@given(
    states=st.lists(st.sampled_from([COMMITTED, COMMITTED, ABORTED, MARKER]), max_size=20),
    is_open=st.booleans(),
    beginning=st.integers(0, 8),
    bounds=st.tuples(st.integers(0, 22), st.integers(0, 22)),
    isolation=st.sampled_from(["uncommitted", "committed", "with aborted"]),
)
def test_scan_yields_the_records_of_its_range_and_ends(
    states: list[str], is_open: bool, beginning: int, bounds: tuple[int, int], isolation: str
) -> None:
    """Whatever lies in it: markers, aborted records, deleted ones; in batches of which none is empty."""
    start, stop = bounds
    kinds = [*states, OPEN] if is_open else states
    beginning = min(beginning, len(states))
    end = len(kinds) if isolation == "uncommitted" else len(states)
    stop = min(stop, end)

    async def scan(kafka: MemoryKafka) -> None:
        for number, state in enumerate(kinds):
            kafka.write("t", str(number).encode(), state=state)
        kafka.log("t").beginning = beginning
        scanner = LogScanner(KafkaSettings())
        found = []
        async with asyncio.timeout(100):
            batches = scanner.scan(
                TopicPartition("t", 0),
                start,
                stop,
                committed_only=isolation != "uncommitted",
                with_aborted=isolation == "with aborted",
            )
            async for batch in batches:
                assert batch
                found += [(record.offset, is_aborted(record)) for record in batch]
        await scanner.stop()

        hidden = {MARKER, ABORTED} if isolation == "committed" else {MARKER}
        assert found == [
            (offset, isolation == "with aborted" and kinds[offset] == ABORTED)
            for offset in range(max(start, beginning), stop)
            if kinds[offset] not in hidden
        ]

    on_cluster(scan, t=1)
