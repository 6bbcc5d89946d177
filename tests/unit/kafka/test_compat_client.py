"""Our client for aiokafka: bootstrap side by side, one lock per broker, rotated secrets, and aborted records."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer.fetcher import READ_COMMITTED, READ_UNCOMMITTED
from aiokafka.errors import (
    AuthenticationFailedError,
    CorruptRecordException,
    KafkaConnectionError,
    ProducerClosed,
    SaslAuthenticationFailed,
)
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c
from aiokafka.structs import BrokerMetadata
from structlog.testing import capture_logs

from streamworker.errors import ConfigurationError
from streamworker.kafka import compat
from streamworker.kafka.compat import (
    AbortedRecord,
    abandon_batches,
    install_client,
    known_position,
    offset_of_unreadable_record,
    unreachable_brokers,
)
from tests.turnable import quiet, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

AT = TopicPartition("t", 0)


class Secrets:
    """Credentials that the test changes."""

    def __init__(self) -> None:
        self.fault: str | None = None
        self.current = "first"
        self.loaded: list[Any] = []

    def password(self) -> str:
        if self.fault is not None:
            raise ConfigurationError([self.fault])
        return self.current

    def load_certificate(self, context: Any) -> None:
        self.loaded.append((context, self.password()))


class Connection:
    """A connection that answers with metadata."""

    def __init__(self, metadata: Any = "metadata") -> None:
        self.is_open = True
        self._metadata = metadata

    def close(self, *_: Any, **__: Any) -> asyncio.Future[None]:
        self.is_open = False
        closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        closed.set_result(None)
        return closed

    def connected(self) -> bool:
        return self.is_open

    async def send(self, _: Any) -> Any:
        if isinstance(self._metadata, Exception):
            raise self._metadata
        return self._metadata


class Net:
    """The network: what happens to a connection attempt, by host. It notes the attempts."""

    def __init__(self) -> None:
        self.hosts: dict[str, Callable[[], Any]] = {}
        self.attempts: list[str] = []
        self.opened: list[Connection] = []

    async def connect(self, host: str, port: int, **_: Any) -> Connection:
        """Stand in for `_connect`."""
        self.attempts.append(host)
        connection: Connection = await self.hosts[host]()
        self.opened.append(connection)
        return connection


def answers(after_s: float = 0, *, metadata: Any = "metadata") -> Callable[[], Any]:
    async def answer() -> Connection:
        await asyncio.sleep(after_s)
        return Connection(metadata)

    return answer


def fails(error: Exception, after_s: float = 0) -> Callable[[], Any]:
    async def fail() -> Connection:
        await asyncio.sleep(after_s)
        raise error

    return fail


@pytest.fixture
async def net(monkeypatch: pytest.MonkeyPatch) -> Net:
    """A network without hosts. Throttles of other tests are forgotten, and servers are tried in their order."""
    hosts = lambda servers: [(server.partition(":")[0], 1, socket.AF_UNSPEC) for server in servers]  # noqa: E731
    monkeypatch.setattr("aiokafka.client.collect_hosts", hosts)
    monkeypatch.setattr(compat, "_unreachable", {})
    return Net()


@asynccontextmanager
async def client_for(
    net: Net, *hosts: str, secrets: Secrets | None = None, **over: Any
) -> AsyncIterator[Any]:
    """Yield a client with these bootstrap servers, which is closed afterwards."""
    client = AIOKafkaClient(bootstrap_servers=[f"{host}:1" for host in hosts or ("a",)], **over)
    install_client(SimpleNamespace(_client=client), secrets or Secrets())
    client._connect = net.connect
    client.cluster.update_metadata = lambda _: None
    try:
        yield client
    finally:
        await client.close()


# Bootstrap


async def test_bootstrap_takes_the_first_server_that_answers(net: Net) -> None:
    """A server that accepts connections and never answers delays the start by a second, not by a request timeout."""
    net.hosts = {"hangs": answers(1e6), "works": answers(), "unused": answers()}
    loop = asyncio.get_running_loop()
    async with client_for(net, "hangs", "works", "unused") as client:
        began = loop.time()
        await client.bootstrap()

        assert 1 <= loop.time() - began < 1.1
        assert net.attempts == ["hangs", "works"]
        assert client._conns["bootstrap", 0] is net.opened[0]  # the only connection until brokers are listed


async def test_bootstrap_closes_its_connection_when_brokers_are_known(net: Net) -> None:
    """Each broker has a connection of its own."""
    net.hosts = {"a": answers()}
    async with client_for(net) as client:
        client.cluster._brokers = {1: BrokerMetadata(1, "a", 1, None)}
        await client.bootstrap()

        assert [connection.is_open for connection in net.opened] == [False]


async def test_connection_of_a_server_that_answers_too_late_is_closed(net: Net) -> None:
    """Two that answer at once: one is used."""
    net.hosts = {"a": answers(1.5), "b": answers(0.5)}
    async with client_for(net, "a", "b") as client:
        await client.bootstrap()
        await quiet()

    assert len(net.opened) == 2
    assert sum(connection.is_open for connection in net.opened) <= 1


async def test_bootstrap_without_an_answer_raises_the_first_servers_error(net: Net) -> None:
    """Not "unable to bootstrap": the reason is what the user needs. The next server is tried at once."""
    net.hosts = {"a": fails(KafkaConnectionError("refused by a")), "b": fails(OSError("refused by b"))}
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with client_for(net, "a", "b") as client:
        with pytest.raises(KafkaConnectionError, match="refused by a"):
            await client.bootstrap()

    assert loop.time() - began < 0.1
    assert net.attempts == ["a", "b"]


async def test_server_that_does_not_answer_is_an_error_after_the_request_timeout(net: Net) -> None:
    """Until then the log says every three seconds that nothing has answered."""
    net.hosts = {"a": answers(1e6)}
    async with client_for(net, request_timeout_ms=10_000) as client:
        with (
            capture_logs() as logs,
            pytest.raises(KafkaConnectionError, match="a:1 did not answer within 10 s"),
        ):
            await client.bootstrap()

    assert [(entry["event"], entry["waited_s"]) for entry in logs] == [
        ("kafka.connecting", waited_s) for waited_s in (3, 6, 9)
    ]


async def test_many_servers_that_do_not_answer_are_reported_after_three_seconds(net: Net) -> None:
    """Although the next one is asked each second: the line does not wait for the last of them."""
    names = [f"broker{number}" for number in range(8)]
    net.hosts = dict.fromkeys(names, answers(1e6))
    async with client_for(net, *names, request_timeout_ms=3_500) as client:
        with capture_logs() as logs, pytest.raises(KafkaConnectionError):
            await client.bootstrap()

    assert [(entry["event"], entry["waited_s"]) for entry in logs[:2]] == [
        ("kafka.connecting", 3),
        ("kafka.connecting", 6),
    ]
    assert logs[0]["servers"] == ",".join(f"{name}:1" for name in names)
    assert net.attempts == names


async def test_connection_of_a_server_that_refuses_the_request_is_closed(net: Net) -> None:
    """Otherwise each attempt would leave a socket."""
    net.hosts = {"a": answers(metadata=KafkaConnectionError("no"))}
    async with client_for(net) as client:
        with pytest.raises(KafkaConnectionError):
            await client.bootstrap()

    assert [connection.is_open for connection in net.opened] == [False]


async def test_failed_metadata_update_waits_before_the_next_one(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka asks again at once, which costs a processor; one that succeeds does not wait."""
    loop = asyncio.get_running_loop()
    results = [False, True]

    async def update(*_: Any) -> bool:
        return results.pop(0)

    monkeypatch.setattr(AIOKafkaClient, "_metadata_update", update)
    async with client_for(net) as client:
        for expected, waited_s in ((False, 0.25), (True, 0.0)):
            began = loop.time()
            assert await client._metadata_update(client.cluster, []) is expected
            assert loop.time() - began == pytest.approx(waited_s)


# Connections to brokers


@asynccontextmanager
async def connected(net: Net) -> AsyncIterator[Any]:
    """Yield a client that knows the brokers 1 and 2."""
    async with client_for(net) as client:
        client.cluster._brokers = {
            number: BrokerMetadata(number, f"broker{number}", 9, None) for number in (1, 2)
        }
        client.force_metadata_update = lambda: None
        yield client


async def test_broker_that_drops_packets_does_not_delay_the_others(net: Net) -> None:
    """Heartbeats go to one broker while another one cannot be reached."""
    net.hosts = {"broker1": answers(30), "broker2": answers()}
    loop = asyncio.get_running_loop()
    async with connected(net) as client:
        slow = asyncio.create_task(client._get_conn(1))
        await quiet()
        began = loop.time()
        assert (await client._get_conn(2)).is_open
        assert loop.time() - began < 0.1
        assert await slow is not None


async def test_one_broker_is_connected_once(net: Net) -> None:
    """Concurrent requests share a connection; a closed one is replaced."""
    net.hosts = {"broker1": answers(1)}
    async with connected(net) as client:
        found = await asyncio.gather(*(client._get_conn(1) for _ in range(3)))
        assert len({id(connection) for connection in found}) == 1
        found[0].close()
        assert (await client._get_conn(1)) is not found[0]

    assert net.attempts == ["broker1", "broker1"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("refused"), "refused"),
        (KafkaConnectionError("closed"), "KafkaConnectionError: closed"),
        (TimeoutError(), "no answer (TimeoutError)"),
        (
            socket.gaierror(-2, "Name or service not known"),
            "Name or service not known: this name is in the broker's advertised.listeners and does not resolve here",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_broker_that_cannot_be_reached_is_named_with_the_reason(
    net: Net, error: Exception, reason: str
) -> None:
    """Once per ten seconds, whatever the number of clients; it is forgotten when the broker is back."""
    net.hosts = {"broker1": fails(error)}
    with capture_logs() as logs:
        async with connected(net) as client, connected(net) as other:
            for _ in range(3):
                assert await client._get_conn(1) is None
                assert await other._get_conn(1) is None
            owner = SimpleNamespace(_client=client)
            assert unreachable_brokers(owner).startswith(f"broker1:9: {reason}")
            net.hosts["broker1"] = answers()
            assert await client._get_conn(1) is not None
            assert unreachable_brokers(owner) == ""

    assert [(entry["event"], entry["broker"]) for entry in logs] == [
        ("kafka.broker_unreachable", "broker1:9")
    ]


async def test_broker_that_is_not_in_the_metadata_is_looked_for(net: Net) -> None:
    """It is not reported as unreachable: it may be new."""
    async with connected(net) as client:
        updates: list[int] = []
        client.force_metadata_update = lambda: updates.append(1)
        assert await client._get_conn(7) is None

        assert updates == [1]
        assert unreachable_brokers(SimpleNamespace(_client=client)) == ""


# Secrets


async def test_password_is_read_for_each_connection(net: Net) -> None:
    """A fault is a failed connection, which aiokafka retries: the file may come back."""
    secrets = Secrets()
    async with client_for(net, secrets=secrets) as client:
        assert client._sasl_plain_password == "first"
        secrets.current = "second"
        assert client._sasl_plain_password == "second"
        secrets.fault = "kafka.sasl_password_file: No such file"
        with pytest.raises(AuthenticationFailedError, match="sasl_password_file: No such file"):
            _ = client._sasl_plain_password


async def test_certificate_is_loaded_for_each_connection(net: Net) -> None:
    """A client without TLS loads none."""
    secrets, context = Secrets(), ssl.create_default_context()
    async with client_for(net, secrets=secrets) as client:
        assert client._ssl_context is None
        client.__dict__["_ssl_context"] = context
        assert client._ssl_context is client._ssl_context is context

        assert secrets.loaded == [(context, "first")] * 2


async def test_refused_token_is_recognized() -> None:
    """The broker refuses it with a JSON object (RFC 7628); aiokafka would take that for success."""

    class Provider:
        async def token(self) -> str:
            return "token"

    authenticator = compat._OAuthAuthenticator(sasl_oauth_token_provider=Provider())
    assert await authenticator.step(None) == (b"n,,\x01auth=Bearer token\x01\x01", True)
    with pytest.raises(SaslAuthenticationFailed, match=r'the token is refused: \{"status":"invalid_token"}'):
        await authenticator.step(b'{"status":"invalid_token"}')
    assert await authenticator.step(b"") is None


# Records of rolled back transactions

CONTROL = 0x20
ABORT, COMMIT = b"\0\0\0\0", b"\0\0\0\1"


def batch(offset: int, *keys: bytes, producer: int = -1, is_control: bool = False) -> bytes:
    """Return a batch of records with these keys; one of a transaction if a producer is given."""
    is_open = producer >= 0
    builder = DefaultRecordBatchBuilder(2, 0, 1 if is_open else 0, producer, 0 if is_open else -1, 0, 1 << 20)
    for number, key in enumerate(keys):
        builder.append(number, 1, key, b"value", [])
    data = bytearray(builder.build())
    data[:8] = offset.to_bytes(8)
    if is_control:
        data[22] |= CONTROL
    data[17:21] = calc_crc32c(bytes(data[21:])).to_bytes(4)
    return bytes(data)


def read(data: bytes, level: Any, aborted: list[tuple[int, int]], start: int = 0) -> Any:
    """Return the records of one fetch as a consumer of this isolation level reads them."""
    return compat._PartitionRecords(AT, MemoryRecords(data), aborted, start, None, None, True, level)


BATCHES = [
    batch(0, b"plain"),
    batch(1, b"rolled", b"back", producer=7),
    batch(3, b"kept", producer=8),
    batch(4, ABORT, producer=7, is_control=True),
    batch(5, COMMIT, producer=8, is_control=True),
    batch(6, b"again", producer=7),
    batch(7, COMMIT, producer=7, is_control=True),
]
ABORTED = [(7, 1)]


@pytest.mark.parametrize(
    ("level", "found"),
    [
        (READ_UNCOMMITTED, ["plain", "rolled", "back", "kept", "again"]),
        (READ_COMMITTED, ["plain", "kept", "again"]),
        (compat._WithAborted(READ_COMMITTED), ["plain", "rolled!", "back!", "kept", "again"]),
    ],
    ids=["uncommitted", "committed", "with aborted"],
)
def test_records_of_a_rolled_back_transaction_are_marked_on_request(level: Any, found: list[str]) -> None:
    """A later transaction of the same producer is committed again; markers are never returned, and are passed."""
    records = read(b"".join(BATCHES), level, ABORTED)
    keys = [record.key.decode() + "!" * (type(record) is AbortedRecord) for record in records]

    assert keys == found
    assert records.next_fetch_offset == 8


def test_fetch_that_begins_within_a_batch_leaves_its_first_records_out() -> None:
    """The broker returns whole batches."""
    records = read(b"".join(BATCHES[1:]), compat._WithAborted(READ_COMMITTED), ABORTED, start=2)

    assert [(record.offset, type(record) is AbortedRecord) for record in records] == [
        (2, True),
        (3, False),
        (6, False),
    ]


def test_batch_with_a_wrong_checksum_is_corrupt() -> None:
    """As in aiokafka's own reading."""
    damaged = bytearray(batch(0, b"a"))
    damaged[-1] ^= 1
    with pytest.raises(CorruptRecordException, match="Invalid CRC"):
        list(read(bytes(damaged), compat._WithAborted(READ_COMMITTED), []))


# Positions and abandoned batches


def test_position_that_is_not_known_is_none() -> None:
    """Without a subscription, without an assignment, of another partition, and before the first one is found."""

    def consumer(subscription: Any) -> Any:
        return SimpleNamespace(_subscription=SimpleNamespace(subscription=subscription))

    def assigned(state: Any) -> Any:
        return SimpleNamespace(assignment=SimpleNamespace(tps={AT}, state_value=lambda _: state))

    known = SimpleNamespace(has_valid_position=True, position=5)
    unknown = SimpleNamespace(has_valid_position=False)
    assert known_position(consumer(None), AT) is None
    assert known_position(consumer(SimpleNamespace(assignment=None)), AT) is None
    assert known_position(consumer(assigned(known)), TopicPartition("t", 1)) is None
    assert known_position(consumer(assigned(unknown)), AT) is None
    assert known_position(consumer(assigned(known)), AT) == 5


def test_offset_of_an_unreadable_record_is_none_if_nothing_failed() -> None:
    """The fetcher holds an error instead of records, or nothing at all."""

    def consumer(records: dict[Any, Any]) -> Any:
        return SimpleNamespace(_fetcher=SimpleNamespace(_records=records))

    failed = SimpleNamespace(_partition_records=SimpleNamespace(next_fetch_offset=7))
    assert offset_of_unreadable_record(consumer({}), AT) is None
    assert offset_of_unreadable_record(consumer({AT: SimpleNamespace()}), AT) is None
    assert offset_of_unreadable_record(consumer({AT: failed}), AT) == 7


async def test_abandoned_batches_fail_and_their_sender_ends() -> None:
    """A sender that is left alone would write them when the broker is back, although the caller has given up."""
    failed: list[Exception] = []
    sender = asyncio.create_task(asyncio.sleep(1e6))
    for task in (sender, None):
        abandon_batches(
            SimpleNamespace(
                _message_accumulator=SimpleNamespace(fail_all=failed.append),
                _sender=SimpleNamespace(sender_task=task),
            )
        )
    await until(sender.cancelled)

    assert [type(error) for error in failed] == [ProducerClosed] * 2
