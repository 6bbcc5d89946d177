"""A Kafka cluster in memory, behind stand-ins for aiokafka's clients: logs, transactions, retention and failures.

It is for tests of the shell without a broker. `install` replaces the three classes of aiokafka in `kafka/clients.py`, so
that the code between them and the test is the real one. What a broker itself does is tested on Apache Kafka.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aiokafka.errors import (
    GroupAuthorizationFailedError,
    IllegalStateError,
    MessageSizeTooLargeError,
    OffsetOutOfRangeError,
    ProducerClosed,
    ProducerFenced,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import ConsumerRecord, OffsetAndTimestamp

from streamworker.kafka import clients
from streamworker.kafka.compat import AbortedRecord
from streamworker.kafka.partitioner import partition_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import pytest

    from streamworker.model import Headers

__all__ = ["Log", "MemoryConsumer", "MemoryKafka", "MemoryProducer"]

ALL = -1
INVALID_PRODUCER_ID = 49

COMMITTED, OPEN, ABORTED, MARKER = "committed", "open", "aborted", "marker"


class Log:
    """One partition. `states` has the state of each record's transaction, by offset."""

    def __init__(self) -> None:
        self.beginning = 0
        self.records: list[ConsumerRecord[bytes, bytes]] = []
        self.states: list[str] = []
        self.undecodable: set[int] = set()
        """Offsets of records with a header name that is not UTF-8, which aiokafka cannot decode."""

    @property
    def end(self) -> int:
        """The offset after the last record."""
        return len(self.records)

    @property
    def stable_end(self) -> int:
        """The offset of the first record of an open transaction, else the end."""
        return self.states.index(OPEN) if OPEN in self.states else self.end

    def truncate(self, end: int) -> None:
        """Lose the records from an offset on, as in an unclean leader election."""
        del self.records[end:], self.states[end:]


class MemoryKafka:
    """The cluster: topics by name, each a list of logs."""

    def __init__(self, **topics: int) -> None:
        """`topics` are numbers of partitions by topic name, with underscores for dots."""
        self.topics: dict[str, list[Log]] = {}
        self.errors: defaultdict[str, deque[BaseException]] = defaultdict(deque)
        """Raised by the next calls of the clients' methods of this name, one each."""
        self.max_value_bytes = 1 << 20
        self.hidden: set[str] = set()
        """Topics, or `group`, that this principal may not describe."""
        self.operations: dict[str, int] = {}
        """Bits of the operations that this principal may perform on a topic, on `group`; ALL by default."""
        self.requests: list[tuple[int, str]] = []
        self.configurations: dict[str, dict[str, str]] = {}
        self.brokers = 3
        self.consumers: list[MemoryConsumer] = []
        self.producers: list[MemoryProducer] = []
        self.admins: list[MemoryAdmin] = []
        self.owners: dict[str, MemoryProducer] = {}
        """The producer that opened a transactional id last, by id."""
        self.on_write: Callable[[Any], None] = lambda _: None
        """Called with each record that a producer has written: a worker, for example."""
        self._waiters: set[asyncio.Future[None]] = set()
        for name, partitions in topics.items():
            self.create(name.replace("_", "."), partitions)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Connect every client that is created from now on to this cluster."""
        patch.setattr(clients, "AIOKafkaConsumer", lambda **arguments: MemoryConsumer(self, arguments))
        patch.setattr(clients, "AIOKafkaProducer", lambda **arguments: MemoryProducer(self, arguments))
        patch.setattr(clients, "AIOKafkaAdminClient", lambda **arguments: MemoryAdmin(self, arguments))
        patch.setattr(clients, "install_client", lambda *_: None)
        patch.setattr(clients, "retry_first_requests_quickly", lambda _: None)

    def create(self, topic: str, partitions: int = 1) -> None:
        """Create a topic, or add partitions to it."""
        logs = self.topics.setdefault(topic, [])
        logs += [Log() for _ in range(partitions - len(logs))]

    def log(self, topic: str, partition: int = 0) -> Log:
        """Return a partition's log."""
        return self.topics[topic][partition]

    def write(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Headers = (),
        timestamp: int = 0,
        state: str = COMMITTED,
    ) -> int:
        """Append a record, to its key's partition by default; return its offset."""
        if partition is None:
            partition = 0 if key is None else partition_of(key, len(self.topics[topic]))
        log = self.log(topic, partition)
        record = ConsumerRecord(
            topic, partition, log.end, timestamp, 0, key, value, None, -1, -1, tuple(headers)
        )
        log.records.append(record)
        log.states.append(state)
        self.changed()
        return int(record.offset)

    def changed(self) -> None:
        """Wake the consumers that wait for records."""
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done() and not waiter.get_loop().is_closed():
                waiter.set_result(None)

    async def change(self, timeout_s: float) -> None:
        """Wait for a change, at most `timeout_s`."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        await asyncio.wait([waiter], timeout=timeout_s)

    def fail(self, method: str) -> None:
        """Raise the next error that the test has planned for this method."""
        if self.errors[method]:
            raise self.errors[method].popleft()

    def values(self, topic: str) -> list[bytes | None]:
        """The values of a topic's committed records, partition by partition."""
        return [record.value for record in self.records(topic)]

    def records(self, topic: str) -> list[Any]:
        """The committed records of a topic, partition by partition."""
        return [
            record
            for log in self.topics[topic]
            for record, state in zip(log.records, log.states, strict=True)
            if state == COMMITTED
        ]


class _Cluster:
    """Metadata, as aiokafka's client has it."""

    def __init__(self, kafka: MemoryKafka) -> None:
        self._kafka = kafka

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        """Return the partition numbers; None for an unknown topic."""
        logs = self._kafka.topics.get(topic)
        return set(range(len(logs))) if logs else None


class _Client:
    """The part of `AIOKafkaClient` that every client uses."""

    def __init__(self, kafka: MemoryKafka) -> None:
        self._kafka = kafka
        self.cluster = _Cluster(kafka)
        self.failures: dict[str, Exception] = {}
        self.is_closed = False

    async def fetch_all_metadata(self) -> _Cluster:
        self._kafka.fail("fetch_all_metadata")
        return self.cluster

    def get_random_node(self) -> int:
        return 0

    async def coordinator_lookup(self, kind: Any, name: str) -> int:
        self._kafka.fail("coordinator_lookup")
        return 7

    async def send(self, node: int, request: Any) -> Any:
        """Answer a request for topics by name, or for the operations that this principal may perform."""
        self._kafka.requests.append((node, type(request).__name__))
        self._kafka.fail("send")
        bits = self._kafka.operations
        match type(request).__name__:
            case "AuthorizedGroupRequest":
                code = GroupAuthorizationFailedError.errno if "group" in self._kafka.hidden else 0
                return SimpleNamespace(
                    groups=[(code, request._group, "", "", "", [], bits.get("group", ALL))]
                )
            case "AddOffsetsToTxnRequest":
                return SimpleNamespace(error_code=bits.get("transaction", INVALID_PRODUCER_ID))
        return SimpleNamespace(topics=[self._described(name) for name in request._topics])

    def _described(self, name: str) -> tuple[Any, ...]:
        kafka = self._kafka
        if name in kafka.hidden:
            return (TopicAuthorizationFailedError.errno, name, False, [], 0)
        code = 0 if name in kafka.topics else UnknownTopicOrPartitionError.errno
        return (code, name, False, [], kafka.operations.get(name, ALL))

    async def close(self) -> None:
        self.is_closed = True


class _Assignment:
    """The part of aiokafka's assignment that has the positions."""

    def __init__(self, positions: dict[Any, int]) -> None:
        self._positions = positions

    @property
    def tps(self) -> set[Any]:
        return set(self._positions)

    def state_value(self, at: Any) -> Any:
        return SimpleNamespace(has_valid_position=True, position=self._positions[at])

    def all_consumed_offsets(self) -> dict[Any, Any]:
        return {at: SimpleNamespace(offset=position) for at, position in self._positions.items()}


class MemoryConsumer:
    """A consumer. It is a member of a group only as far as the test calls its listener."""

    def __init__(self, kafka: MemoryKafka, arguments: dict[str, Any]) -> None:
        self._kafka = kafka
        self.arguments = arguments
        self.listener: Any = None
        self.is_started = self.is_stopped = False
        self.paused: set[Any] = set()
        self.seeks: list[tuple[int, int]] = []
        self._positions: dict[Any, int] = {}
        self._client = _Client(kafka)
        self.committed: list[dict[Any, Any]] = []
        assignment = _Assignment(self._positions)
        self._subscription = SimpleNamespace(subscription=SimpleNamespace(assignment=assignment))
        self._fetcher = SimpleNamespace(
            _isolation_level=arguments.get("isolation_level"), _records={}, error_future=_never()
        )
        kafka.consumers.append(self)

    async def start(self) -> None:
        await asyncio.sleep(0)
        self._kafka.fail("start")
        self.is_started = True

    async def stop(self) -> None:
        self.is_stopped = True
        self._kafka.fail("stop")

    def subscribe(self, topics: Sequence[str], *, listener: Any) -> None:
        self.listener = listener

    def unsubscribe(self) -> None:
        self._positions.clear()

    def assign(self, partitions: Iterable[Any]) -> None:
        self._positions.clear()
        self._positions.update(dict.fromkeys(partitions, 0))
        self.paused = set()

    async def commit(self, offsets: dict[Any, Any]) -> None:
        self._kafka.fail("commit")
        self.committed.append(offsets)

    def seek(self, at: Any, offset: int) -> None:
        self._check(at)
        self.seeks.append((at.partition, offset))
        self._positions[at] = offset

    def pause(self, *partitions: Any) -> None:
        for at in partitions:
            self._check(at)
            self.paused.add(at)

    def resume(self, *partitions: Any) -> None:
        for at in partitions:
            self._check(at)
            self.paused.discard(at)
        self._kafka.changed()

    def _check(self, at: Any) -> None:
        if self.listener is None and at not in self._positions:
            raise IllegalStateError(f"Partition {at} is not assigned")

    def highwater(self, at: Any) -> int:
        return self._log(at).end

    def last_stable_offset(self, at: Any) -> int:
        return self._log(at).stable_end

    async def seek_to_beginning(self, *partitions: Any) -> bool:
        self._kafka.fail("seek_to_beginning")
        self._positions |= {at: self._log(at).beginning for at in partitions}
        return True

    async def seek_to_end(self, *partitions: Any) -> bool:
        self._positions |= {at: self._end(at) for at in partitions}
        return True

    async def position(self, at: Any) -> int:
        return self._positions[at]

    async def beginning_offsets(self, partitions: Sequence[Any]) -> dict[Any, int]:
        self._kafka.fail("beginning_offsets")
        return {at: self._log(at).beginning for at in partitions}

    async def end_offsets(self, partitions: Sequence[Any]) -> dict[Any, int]:
        self._kafka.fail("end_offsets")
        return {at: self._end(at) for at in partitions}

    async def offsets_for_times(self, times: Mapping[Any, int]) -> dict[Any, OffsetAndTimestamp | None]:
        self._kafka.fail("offsets_for_times")
        if any(time_ms < 0 for time_ms in times.values()):
            raise ValueError("the target time is negative")
        return {at: self._first_since(at, time_ms) for at, time_ms in times.items()}

    def _first_since(self, at: Any, time_ms: int) -> OffsetAndTimestamp | None:
        found = (record for record in self._log(at).records if record.timestamp >= time_ms)
        record = next(found, None)
        return None if record is None else OffsetAndTimestamp(record.offset, record.timestamp)

    async def getmany(
        self, *partitions: Any, timeout_ms: int = 0, max_records: int = 500
    ) -> dict[Any, list[Any]]:
        """Return records of the partitions that are not paused; wait for a record if there are none."""
        self._kafka.fail("getmany")
        if max_records < 1:
            raise ValueError("`max_records` must be at least 1")
        if not (fetched := self._fetch(partitions, max_records)):
            await self._kafka.change(timeout_ms / 1000)
            fetched = self._fetch(partitions, max_records)
        return fetched

    def _fetch(self, partitions: Sequence[Any], max_records: int) -> dict[Any, list[Any]]:
        fetched: dict[Any, list[Any]] = {}
        for at, position in self._positions.items():
            if at in self.paused or (partitions and at not in partitions):
                continue
            log, end, offset = self._log(at), self._end(at), position
            if not log.beginning <= offset <= log.end:  # OffsetOutOfRange
                if self.arguments["auto_offset_reset"] == "none":
                    raise OffsetOutOfRangeError({at: offset})
                offset = log.beginning if self.arguments["auto_offset_reset"] == "earliest" else end
            while offset < end and sum(map(len, fetched.values())) < max_records:
                if offset in log.undecodable:
                    self._fetcher._records[at] = SimpleNamespace(
                        _partition_records=SimpleNamespace(next_fetch_offset=offset)
                    )
                    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a header's name")
                if (record := self._returned(log, offset)) is not None:
                    fetched.setdefault(at, []).append(record)
                offset += 1
            self._positions[at] = offset
        return fetched

    def _returned(self, log: Log, offset: int) -> Any:
        """Return a record as this consumer's isolation level has it; None for a hidden one."""
        record, state = log.records[offset], log.states[offset]
        if state == ABORTED and self._is_committed_only:
            is_marked = type(self._fetcher._isolation_level) is not str
            return AbortedRecord(**vars(replace(record))) if is_marked else None
        return None if state == MARKER else record

    @property
    def _is_committed_only(self) -> bool:
        return bool(self.arguments.get("isolation_level") == "read_committed")

    def _end(self, at: Any) -> int:
        log = self._log(at)
        return log.stable_end if self._is_committed_only else log.end

    def _log(self, at: Any) -> Log:
        """Return a partition's log; an empty one for a partition that another topic of the name had."""
        logs = self._kafka.topics[at.topic]
        return logs[at.partition] if at.partition < len(logs) else Log()

    def stop_fetching(self) -> None:
        """End the fetch task, as an error does that aiokafka does not expect."""
        if not self._fetcher.error_future.done():
            self._fetcher.error_future.set_result(None)


class MemoryProducer:
    """An idempotent or transactional producer."""

    def __init__(self, kafka: MemoryKafka, arguments: dict[str, Any]) -> None:
        self._kafka = kafka
        self.arguments = arguments
        self.is_started = self.is_closed = False
        self._open: list[tuple[Log, int]] = []
        self._client = _Client(kafka)
        self._message_accumulator = SimpleNamespace(fail_all=lambda _: None)
        self._sender = SimpleNamespace(sender_task=None)
        kafka.producers.append(self)

    async def start(self) -> None:
        await asyncio.sleep(0)
        self._kafka.fail("start_producer")
        if (transactional_id := self.arguments.get("transactional_id")) is not None:
            self._kafka.owners[transactional_id] = self
        self.is_started = True

    async def stop(self) -> None:
        self.is_closed = True
        self._kafka.fail("stop_producer")

    async def flush(self) -> None: ...

    async def partitions_for(self, topic: str) -> set[int]:
        return set(range(len(self._kafka.topics[topic])))

    async def send_batch(self, batch: Any, topic: str, *, partition: int) -> asyncio.Future[Any]:
        """Append a batch as a broker does: all of its records, or none."""
        self._check()
        records = list(MemoryRecords(bytes(batch._build())).next_batch())
        acknowledged = asyncio.get_running_loop().create_future()
        if any(len(record.value or b"") > self._kafka.max_value_bytes for record in records):
            acknowledged.set_exception(MessageSizeTooLargeError())
            return acknowledged
        offsets = [
            self._kafka.write(
                topic,
                record.value,
                key=record.key,
                partition=partition,
                headers=record.headers,
                timestamp=record.timestamp,
            )
            for record in records
        ]
        acknowledged.set_result(SimpleNamespace(offset=offsets[0]))
        for offset in offsets:
            self._kafka.on_write(self._kafka.log(topic, partition).records[offset])
        return acknowledged

    async def begin_transaction(self) -> None:
        self._check()
        self._open = []

    async def send(
        self, topic: str, value: bytes | None, *, key: bytes | None, partition: int, headers: Headers
    ) -> asyncio.Future[Any]:
        """Append one record, which is open until the transaction ends."""
        self._check()
        acknowledged = asyncio.get_running_loop().create_future()
        try:
            self._kafka.fail("acknowledgement")
        except BaseException as error:  # noqa: BLE001 - the future's owner raises it
            acknowledged.set_exception(error)
            return acknowledged
        is_open = "transactional_id" in self.arguments
        state = OPEN if is_open else COMMITTED
        offset = self._kafka.write(topic, value, key=key, partition=partition, headers=headers, state=state)
        if is_open:
            self._open.append((self._kafka.log(topic, partition), offset))
        acknowledged.set_result(SimpleNamespace(partition=partition, offset=offset))
        return acknowledged

    async def commit_transaction(self) -> None:
        self._check()
        self._kafka.fail("commit_transaction")
        for log, offset in self._open:
            log.states[offset] = COMMITTED
        for log in dict.fromkeys(log for log, _ in self._open):
            log.records.append(replace(log.records[-1], offset=log.end, value=None))
            log.states.append(MARKER)
        self._open = []
        self._kafka.changed()

    def _check(self) -> None:
        if self.is_closed:
            raise ProducerClosed
        transactional_id = self.arguments.get("transactional_id")
        if transactional_id is not None and self._kafka.owners.get(transactional_id) is not self:
            raise ProducerFenced
        self._kafka.fail("send_batch")


class MemoryAdmin:
    """An admin client."""

    def __init__(self, kafka: MemoryKafka, arguments: dict[str, Any]) -> None:
        self._kafka = kafka
        self.arguments = arguments
        self.is_closed = False
        self.created: list[Any] = []
        self._client = _Client(kafka)
        kafka.admins.append(self)

    async def start(self) -> None:
        self._kafka.fail("start_admin")

    async def close(self) -> None:
        self.is_closed = True

    async def describe_topics(self, topics: list[str] | None = None) -> list[dict[str, Any]]:
        return [
            {"topic": name, "partitions": [{"replicas": list(range(self._kafka.brokers))} for _ in logs]}
            for name, logs in self._kafka.topics.items()
            if name not in self._kafka.hidden
        ]

    async def create_topics(self, new_topics: list[Any]) -> Any:
        """Create topics; a name for which `errors` has an error is refused with its code."""
        refused = []
        for topic in new_topics:
            self.created.append(topic)
            if errors := self._kafka.errors[f"create {topic.name}"]:
                error: Any = errors.popleft()
                refused.append((topic.name, error.errno, None))
                continue
            self._kafka.create(topic.name, topic.num_partitions)
            self._kafka.configurations[topic.name] = topic.topic_configs
            refused.append((topic.name, 0, None))
        return SimpleNamespace(topic_errors=refused)

    async def delete_topics(self, topics: list[str]) -> Any:
        for name in topics:
            del self._kafka.topics[name]

    async def describe_configs(self, config_resources: list[Any]) -> list[Any]:
        [resource] = config_resources
        entries = [(name, value) for name, value in self._kafka.configurations.get(resource.name, {}).items()]
        return [SimpleNamespace(resources=[(0, None, None, resource.name, entries)])]

    async def describe_cluster(self) -> dict[str, Any]:
        return {"brokers": [{"node_id": number} for number in range(self._kafka.brokers)]}


def _never() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()
