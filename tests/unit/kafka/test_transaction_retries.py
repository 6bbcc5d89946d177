"""The back-off after the retriable errors with which Kafka 4 answers the first requests of a transaction."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from streamworker.config import KafkaSettings
from streamworker.kafka import clients

AT = TopicPartition("events", 0)
NOT_ENOUGH_REPLICAS, NOT_LEADER, COORDINATOR_NOT_AVAILABLE = 19, 6, 15


@pytest.mark.parametrize(
    ("code", "pauses_ms", "warnings"),
    [
        (NOT_ENOUGH_REPLICAS, [5, 10, 20, 40, 100, 100], 2),  # after 75 ms the replicas may really be too few
        (NOT_LEADER, [100, 100, 100, 100, 100, 100], 6),
    ],
)
async def test_produce_request_of_a_transaction_is_retried_soon_after_not_enough_replicas(
    caplog: pytest.LogCaptureFixture, code: int, pauses_ms: list[int], warnings: int
) -> None:
    """The first four times, without a warning; any other error and every later one as aiokafka does it."""
    producer: Any = clients.new_transactional_producer(KafkaSettings(), "id", 10)
    sender, accumulator = producer._sender, producer._message_accumulator
    accumulator._cluster = SimpleNamespace(leader_for_partition=lambda _: 1)
    producer._txn_manager.set_pid_and_epoch(7, 0)
    answer = SimpleNamespace(API_VERSION=7, topics=[("events", [(0, code, -1, -1, -1)])])
    done = SimpleNamespace(API_VERSION=7, topics=[("events", [(0, 0, 42, -1, -1)])])
    answers = [answer] * len(pauses_ms) + [done]

    async def send(node_id: int, request: Any) -> Any:
        return answers.pop(0)

    producer.client.send = send
    producer.client.force_metadata_update = lambda: None
    producer._txn_manager.begin_transaction()
    written = await accumulator.add_message(AT, b"key", b"value", 1)
    producer._txn_manager.partition_added(AT)
    pauses = []
    while answers:
        batches, _ = accumulator.drain_by_nodes(ignore_nodes=[])
        sender._in_flight.add(1)
        sender._muted_partitions.add(AT)
        began = asyncio.get_running_loop().time()
        await sender._send_produce_req(1, batches[1])
        pauses.append(round((asyncio.get_running_loop().time() - began) * 1000))

    assert pauses == [*pauses_ms, 0]
    assert (await written).offset == 42
    assert len(caplog.records) == warnings
    assert not sender._in_flight
    assert not sender._muted_partitions
    await clients.close_producer(producer, 1)


async def test_offset_commit_of_a_transaction_is_retried_soon() -> None:
    """The first four times; the next commit begins anew."""
    producer: Any = clients.new_transactional_producer(KafkaSettings(), "id", 10)
    sender, transaction = producer._sender, producer._txn_manager
    transaction.set_pid_and_epoch(7, 0)

    def answer(code: int) -> Any:
        return SimpleNamespace(errors=[("jobs", [(0, code)])])

    answers = [answer(COORDINATOR_NOT_AVAILABLE)] * 6 + [
        answer(0),
        answer(COORDINATOR_NOT_AVAILABLE),
        answer(0),
    ]

    async def send(node_id: int, request: Any, group: int) -> Any:
        return answers.pop(0)

    async def coordinator(*_: object) -> int:
        return 1

    producer.client.send, sender._find_coordinator = send, coordinator
    transaction.begin_transaction()
    transaction.consumer_group_added("group")
    pauses = []
    while answers:
        offsets = {TopicPartition("jobs", 0): OffsetAndMetadata(1, "")}
        transaction.add_offsets_to_txn(offsets, "group")
        began = asyncio.get_running_loop().time()
        await sender._do_txn_offset_commit(offsets, "group")
        pauses.append(round((asyncio.get_running_loop().time() - began) * 1000))

    assert pauses == [5, 10, 20, 40, 100, 100, 0, 5, 0]
    await clients.close_producer(producer, 1)
