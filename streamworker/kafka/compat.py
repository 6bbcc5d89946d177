"""The private names of aiokafka that this package needs, each behind a function or class of its own.

No other module uses a private name of aiokafka. Every function and class here states the behaviour of aiokafka that
makes it necessary, so that it can be removed when aiokafka changes. `KNOWN_VERSIONS` are the releases for which this
module was compared with aiokafka's source.
"""

from __future__ import annotations

import asyncio
import socket
import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf
from time import monotonic
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import aiokafka
import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition, conn
from aiokafka.client import AIOKafkaClient, ConnectionGroup, CoordinationType
from aiokafka.conn import AIOKafkaConnection, OAuthAuthenticator
from aiokafka.consumer import fetcher
from aiokafka.consumer.fetcher import PartitionRecords
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import (
    AuthenticationFailedError,
    CorruptRecordException,
    GroupAuthorizationFailedError,
    KafkaConnectionError,
    NotEnoughReplicasError,
    ProducerClosed,
    SaslAuthenticationFailed,
    StaleMetadata,
)
from aiokafka.errors import KafkaError as ForeignKafkaError
from aiokafka.producer.sender import Sender, SendProduceReqHandler, TxnOffsetCommitHandler
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.group import JoinGroupRequest, SyncGroupRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.structs import ConsumerRecord

from streamworker.errors import ConfigurationError
from streamworker.kafka.answers import CHECK_S, CONNECTION, AnswerWatch, PendingRequest, SilentBrokers
from streamworker.log_throttle import LogThrottle

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

__all__ = [
    "FENCED_INSTANCE_ID",
    "GROUP_MAX_SIZE_REACHED",
    "KNOWN_VERSIONS",
    "AbortedRecord",
    "Credentials",
    "Membership",
    "abandon_batches",
    "client_of",
    "fetch_all_metadata",
    "has_stopped_fetching",
    "install_client",
    "known_position",
    "new_sticky_assignor",
    "offset_of_unreadable_record",
    "positions_of",
    "renew_credentials_in",
    "retry_first_requests_quickly",
    "return_aborted_records",
    "return_plain_records",
    "unreachable_brokers",
]

KNOWN_VERSIONS = frozenset({"0.14.0"})
_KNOWN_SERIES = "0.14."

if not aiokafka.__version__.startswith(_KNOWN_SERIES):
    raise ImportError(
        f"streamworker uses private names of aiokafka {_KNOWN_SERIES}x, and {aiokafka.__version__} is installed: "
        f"pip install 'aiokafka=={_KNOWN_SERIES}*'"
    )

log = structlog.get_logger()

_METADATA_BACKOFF_S = 0.25
_SILENCE_S = 3.0
FENCED_INSTANCE_ID = 82
GROUP_MAX_SIZE_REACHED = 81
_UNKNOWN_CODES = {FENCED_INSTANCE_ID, GROUP_MAX_SIZE_REACHED}
_QUICK_RETRIES = 4
_QUICK_BACKOFF_S = 0.005
_NEXT_SERVER_S = 1.0
"""How long one bootstrap server may take before the next one is tried as well."""


class Credentials(Protocol):
    """Secrets that may be rotated while the process runs. Both methods raise ConfigurationError."""

    def password(self) -> str | None:
        """Return the SASL password that is valid now."""
        ...

    def load_certificate(self, context: ssl.SSLContext) -> None:
        """Load the client certificate that is valid now into the context."""
        ...


def client_of(owner: Any) -> Any:
    """Return the `AIOKafkaClient` of a consumer, a producer or an admin client.

    Only the producer has a public name for it.
    """
    return owner.client if isinstance(owner, AIOKafkaProducer) else owner._client


def install_client(owner: Any, credentials: Credentials) -> None:
    """Replace the client's class by ours. aiokafka has no parameter for it. Call it before `start`."""
    client = client_of(owner)
    client.__class__ = _Client
    client.credentials = credentials
    client.locks = {}
    client.failures = {}


class _Client(AIOKafkaClient):  # type: ignore[misc]  # aiokafka is untyped
    """A client that tries bootstrap servers side by side, waits after failures and reads its secrets anew."""

    credentials: Credentials
    locks: dict[tuple[int, int], asyncio.Lock]
    failures: dict[str, Exception]

    async def _metadata_update(self, cluster: Any, topics: Any) -> bool:
        """Wait after a failed update.

        aiokafka asks again at once while a partition has no leader. A broker that refuses connections then costs one
        processor and thousands of log lines a second.
        """
        if await super()._metadata_update(cluster, topics):
            return True
        await asyncio.sleep(_METADATA_BACKOFF_S)
        return False

    @property
    def _sasl_plain_password(self) -> str | None:
        """Read the password for each connection. aiokafka sets an attribute of this name, which the property hides."""
        with renew_credentials_in():
            return self.credentials.password()

    @property
    def _ssl_context(self) -> ssl.SSLContext | None:
        """Load the client certificate for each connection: a context uses what it was given last."""
        context: ssl.SSLContext | None = self.__dict__["_ssl_context"]
        if context is not None:
            with renew_credentials_in():
                self.credentials.load_certificate(context)
        return context

    async def bootstrap(self) -> None:
        """Read the cluster's metadata from the first bootstrap server that answers.

        aiokafka tries one server after the other, each for as long as a request may take, so that a server that
        accepts connections and never answers delays the start by a minute. It also raises "Unable to bootstrap"
        whatever the reason was; here the first server's own error is raised.
        """
        connection, metadata = await self._first_answer()
        self.cluster.update_metadata(metadata)
        if self.cluster.brokers():
            connection.close()
        else:  # a new cluster without topics: this connection is the only one until brokers are listed
            self._conns["bootstrap", ConnectionGroup.DEFAULT] = connection
            connection.is_watched = True
        if self._sync_task is None:  # type: ignore[has-type]
            self._sync_task = asyncio.create_task(self._md_synchronizer())

    async def _first_answer(self) -> tuple[Any, Any]:
        """Return connection and metadata of the first server that answers; start a server a second after the last."""
        servers = list(self.hosts)
        asking: set[asyncio.Task[tuple[Any, Any]]] = set()
        failures: list[BaseException] = []
        now = asyncio.get_running_loop().time
        began = now()
        report_at = began + _SILENCE_S
        try:
            while True:
                if servers:
                    host, port, _ = servers.pop(0)
                    asking.add(asyncio.create_task(self._ask_server(host, port)))
                elif not asking:
                    raise failures[0]
                timeout = max(0.0, report_at - now())
                done, asking = await asyncio.wait(
                    asking,
                    timeout=min(timeout, _NEXT_SERVER_S) if servers else timeout,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in done:
                    if (error := task.exception()) is None:
                        asking |= done - {task}
                        return task.result()
                    failures.append(error)
                if now() >= report_at:
                    report_at += _SILENCE_S
                    self._log_connecting(now() - began)
        finally:
            for task in asking:
                task.cancel()
                task.add_done_callback(_close_unused)

    def _log_connecting(self, waited_s: float) -> None:
        log.warning(
            "kafka.connecting",
            servers=",".join(f"{host}:{port}" for host, port, _ in self.hosts),
            waited_s=round(waited_s),
            reason="no bootstrap server has answered yet: check kafka.bootstrap_servers, the network, and whether the "
            "broker's process hangs or is stopped",
        )

    async def _ask_server(self, host: str, port: int) -> tuple[Any, Any]:
        _is_bootstrap.set(True)  # for this task alone, which asks one server
        try:
            async with asyncio.timeout(self._request_timeout_ms / 1000):
                connection = await self._connect(host, port)
                try:
                    return connection, await connection.send(MetadataRequest([]))
                except BaseException:
                    connection.close()
                    raise
        except TimeoutError:
            limit_s = self._request_timeout_ms / 1000
            raise KafkaConnectionError(f"{host}:{port} did not answer within {limit_s:g} s") from None

    async def _get_conn(self, node_id: Any, *, group: int = ConnectionGroup.DEFAULT) -> Any:
        """Return a connection to a broker, or None if there is none now.

        aiokafka holds one lock for all brokers while it connects, so that a broker that drops packets delays the
        heartbeats to all others. Here there is one lock per connection.
        """
        key = (node_id, group)
        async with self.locks.setdefault(key, asyncio.Lock()):
            connection = self._conns.get(key)
            if connection is not None and connection.connected():
                return connection
            self._conns.pop(key, None)
            address = ""
            try:
                broker = self.cluster.broker_metadata(node_id)
                if broker is None:
                    raise StaleMetadata(f"broker {node_id} is not in the current metadata")
                address = f"{broker.host}:{broker.port}"
                connection = await self._connect(
                    broker.host, broker.port, on_close=self._on_connection_closed
                )
            except (OSError, TimeoutError, ForeignKafkaError) as error:
                if address:
                    self.failures[address] = error
                    _log_unreachable(address, error)
                self.force_metadata_update()
                return None
            self.failures.pop(address, None)
            self._conns[key] = connection
            return connection

    async def _connect(self, host: str, port: int, on_close: Callable[[Any, Any], None] | None = None) -> Any:
        return await conn.create_conn(
            host,
            port,
            client_id=self._client_id,
            request_timeout_ms=self._request_timeout_ms,
            ssl_context=self._ssl_context,
            security_protocol=self._security_protocol,
            on_close=on_close,
            max_idle_ms=self._connections_max_idle_ms,
            sasl_mechanism=self._sasl_mechanism,
            sasl_plain_username=self._sasl_plain_username,
            sasl_plain_password=self._sasl_plain_password,
            sasl_oauth_token_provider=self._sasl_oauth_token_provider,
        )


_unreachable: dict[str, LogThrottle] = {}
"""Throttles by broker, for all clients of the process: each job partition has a producer with a client of its own."""


def _log_unreachable(address: str, error: Exception) -> None:
    if (fields := _unreachable.setdefault(address, LogThrottle()).failed(monotonic())) is not None:
        log.warning("kafka.broker_unreachable", broker=address, reason=_reason(error), **fields)


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return (
            f"{error.strerror}: this name is in the broker's advertised.listeners and does not resolve here; correct "
            "the listener, or add the name to DNS"
        )
    return str(error) or f"no answer ({type(error).__name__})"


def unreachable_brokers(owner: Any) -> str:
    """Return the brokers to which the client's last connection failed, with the reasons; empty if there are none."""
    return "; ".join(f"{address}: {_reason(error)}" for address, error in client_of(owner).failures.items())


def _close_unused(task: asyncio.Task[tuple[Any, Any]]) -> None:
    """Close the connection of a bootstrap server that answered when another one had been chosen."""
    if not task.cancelled() and task.exception() is None:
        task.result()[0].close()


@contextmanager
def renew_credentials_in() -> Iterator[None]:
    """Raise a ConfigurationError as a failed connection, which aiokafka retries: a missing file may come back."""
    try:
        yield
    except ConfigurationError as error:
        raise AuthenticationFailedError("; ".join(error.faults)) from None


class _OAuthAuthenticator(OAuthAuthenticator):  # type: ignore[misc]  # aiokafka is untyped
    """Recognize a refused token.

    A broker refuses a token by a JSON object, not by an error code (RFC 7628 section 3.2.2). aiokafka takes any answer
    for success, and the broker's next answer, which is empty, for a cluster without topics.
    """

    async def step(self, payload: bytes | None) -> Any:
        if self._token_sent and payload:
            raise SaslAuthenticationFailed(f"the token is refused: {payload[:200].decode(errors='replace')}")
        return await super().step(payload)


conn.OAuthAuthenticator = _OAuthAuthenticator  # aiokafka has no parameter for it


_silent = SilentBrokers()
"""The brokers that do not answer, for all clients of the process."""

_is_bootstrap: ContextVar[bool] = ContextVar("bootstrap", default=False)
"""Whether this task asks a bootstrap server: `kafka.connecting` reports those that do not answer."""

_HELD = {JoinGroupRequest.API_KEY, SyncGroupRequest.API_KEY}
"""Requests that the broker answers when other members of the group have sent theirs."""


class _Protocol(conn.AIOKafkaProtocol):  # type: ignore[misc]  # aiokafka is untyped
    """Count the bytes that are received."""

    received = 0

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        super().data_received(data)


conn.AIOKafkaProtocol = _Protocol  # aiokafka has no parameter for it


class _Connection(AIOKafkaConnection):  # type: ignore[misc]  # aiokafka is untyped
    """Report a broker that does not answer, and release the socket of a closed TLS connection at once.

    aiokafka notices that a request is unanswered only when its time limit is over. Here the oldest request of a
    connection is checked while there is one.

    aiokafka closes the transport, which then waits for the broker's close_notify. uvloop cannot close a loop with such
    a transport: `loop.close` raises OSError (EBUSY). Kafka's protocol does not need close_notify: every request has a
    response with a length.
    """

    _timer: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.is_watched = not _is_bootstrap.get()
        self._watch = AnswerWatch()
        self._opening = PendingRequest(key=object(), name=CONNECTION)
        self._address = f"{self._host}:{self._port}"

    async def connect(self) -> Any:
        """Connect and identify. Raises aiokafka's KafkaError, OSError and TimeoutError."""
        self._check_later()
        try:
            return await super().connect()
        except BaseException:
            self._stop_checks()
            raise

    def send(self, request: Any, expect_response: bool = True) -> Any:
        """Send a request; return an awaitable for its response. Raises aiokafka's KafkaError if it is closed."""
        answer = super().send(request, expect_response)
        self._check_later()
        return answer

    def _send_sasl_token(self, payload: bytes, expect_response: bool = True) -> Any:
        answer = super()._send_sasl_token(payload, expect_response)
        self._check_later()
        return answer

    def close(self, reason: Any = None, exc: BaseException | None = None) -> Any:
        self._stop_checks()
        writer = self._writer
        closed = super().close(reason, exc)
        if writer is not None and self._ssl_context is not None:
            writer.transport.abort()
        return closed

    def _handle_frame(self, response: bytes) -> None:
        super()._handle_frame(response)
        if _silent:
            _silent.answered(self._address, self._watch, self._loop.time())

    def _check_later(self) -> None:
        if self.is_watched and self._timer is None:
            self._timer = self._loop.call_later(CHECK_S, _check_answers, weakref.ref(self))

    def _stop_checks(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        _silent.closed(self._address, self._watch)

    def _check(self) -> None:
        """Report the oldest request if it is overdue; check again later while there is one."""
        self._timer = None
        now, request = self._loop.time(), self._oldest()
        if self._watch.is_overdue(now, request, self._transferred()) and request is not None:
            _silent.overdue(self._address, self._watch, request, now)
        if request is not None:
            self._check_later()

    def _oldest(self) -> PendingRequest | None:
        """Return the request that the broker has to answer next."""
        if self._requests:
            return _pending(self._requests[0])
        return self._opening if self._writer is None else None

    def _transferred(self) -> int:
        """Return a number that grows while bytes are received, or leave the buffer in which they wait to be sent."""
        if self._writer is None:
            return 0
        return int(self._protocol.received - self._writer.transport.get_write_buffer_size())


def _check_answers(connection: weakref.ref[_Connection]) -> None:
    if (found := connection()) is not None:
        found._check()


def _pending(entry: tuple[int | None, Any, Any]) -> PendingRequest:
    """Describe a request as aiokafka keeps it until the response: correlation id, request and future."""
    _, request, _ = entry
    if request is None:  # a token of SASL without a header
        return PendingRequest(key=entry, name="SaslAuthenticate")
    allowed_s = 0.0
    if request.API_KEY == FetchRequest.API_KEY:
        allowed_s = request.max_wait_time / 1000
    elif request.API_KEY in _HELD:
        allowed_s = inf
    return PendingRequest(key=entry, name=type(request).__name__.partition("Request")[0], allowed_s=allowed_s)


conn.AIOKafkaConnection = _Connection  # aiokafka has no parameter for it


async def fetch_all_metadata(owner: Any) -> Any:
    """Return the metadata of all topics. Raises aiokafka's KafkaError.

    The public methods ask for a topic by name, which creates it on a broker with automatic topic creation.
    """
    return await client_of(owner).fetch_all_metadata()


def positions_of(consumer: AIOKafkaConsumer) -> dict[TopicPartition, int]:
    """Return the next offset to read of each assigned partition whose position is known.

    The public method waits for a position that is not known.
    """
    assigned = consumer._subscription.subscription.assignment
    return {at: point.offset for at, point in assigned.all_consumed_offsets().items()}


def has_stopped_fetching(consumer: AIOKafkaConsumer) -> bool:
    """Whether a started consumer's fetch task has ended. `getmany` does not notice it and returns nothing for ever."""
    return bool(consumer._fetcher.error_future.done())


class AbortedRecord(ConsumerRecord):  # type: ignore[misc]  # aiokafka is untyped
    """A record whose transaction was rolled back."""


class _WithAborted(int):
    """The isolation level of a consumer that returns committed and aborted records and can tell them apart."""


def return_aborted_records(consumer: AIOKafkaConsumer) -> None:
    """Let a started `read_committed` consumer return records of rolled back transactions too, as `AbortedRecord`.

    The broker returns them together with a list of the rolled back transactions, and aiokafka leaves them out. With
    this, one scan of a log finds every record and what became of it.
    """
    consumer._fetcher._isolation_level = _WithAborted(fetcher.READ_COMMITTED)


class _Plain(int):
    """The isolation level of a consumer that returns records as they were decoded."""


def return_plain_records(consumer: AIOKafkaConsumer) -> None:
    """Let a started consumer return records without topic and partition.

    aiokafka copies each decoded record into a frozen dataclass of eleven members, which takes as long as to read it.
    """
    consumer._fetcher._isolation_level = _Plain(consumer._fetcher._isolation_level)


class _PartitionRecords(PartitionRecords):  # type: ignore[misc]  # aiokafka is untyped
    """The records of one fetch.

    It differs from aiokafka's class for consumers of `return_aborted_records` and `return_plain_records` only.
    """

    def _unpack_records(self) -> Iterator[Any]:
        if type(self._isolation_level) is not _WithAborted:
            records: Iterator[Any] = super()._unpack_records()
            return records
        return self._unpack_all_records()

    def _unpack_all_records(self) -> Iterator[Any]:
        self.next_fetch_offset: int
        batches = self._records
        while batches.has_next():
            batch = batches.next_batch()
            if self._check_crcs and not batch.validate_crc():
                raise CorruptRecordException(f"Invalid CRC - {self._tp}")
            is_aborted = batch.producer_id is not None and self._is_aborted(batch)
            if not batch.is_control_batch:
                for record in batch:
                    if record.offset >= self.next_fetch_offset:
                        self.next_fetch_offset = record.offset + 1
                        yield self._consumer_record(self._tp, record, is_aborted=is_aborted)
            self.next_fetch_offset = batch.next_offset

    def _is_aborted(self, batch: Any) -> bool:
        """Whether a batch belongs to a transaction that was rolled back; note the markers of such transactions."""
        self._consume_aborted_up_to(batch.base_offset)
        if batch.is_control_batch and self._contains_abort_marker(batch):
            self._aborted_producers.discard(batch.producer_id)
        return bool(batch.is_transactional and batch.producer_id in self._aborted_producers)

    def _consumer_record(self, tp: TopicPartition, record: Any, *, is_aborted: bool = False) -> Any:
        if type(self._isolation_level) is _Plain:
            return record
        made = super()._consumer_record(tp, record)
        if is_aborted:
            made = AbortedRecord(**vars(made))
        return made


fetcher.PartitionRecords = _PartitionRecords  # aiokafka has no parameter for it


def abandon_batches(producer: AIOKafkaProducer) -> None:
    """Fail all batches of a producer and end its sender.

    An idempotent producer never gives up on a batch (aiokafka #1101), and `stop` waits for all of them. A sender that
    is left alone writes its batches when the broker is back, although their caller has given up.
    """
    producer._message_accumulator.fail_all(ProducerClosed())
    if (sender := producer._sender.sender_task) is not None:
        sender.cancel()


def retry_first_requests_quickly(producer: AIOKafkaProducer) -> None:
    """Shorten the back-off of a transaction's first requests. Call it before `start`.

    Kafka 4 verifies with the transaction coordinator that a partition was added to the transaction (KIP-890). While
    the markers of the previous transaction are written, it answers clients of aiokafka's protocol version with a
    retriable error: NOT_ENOUGH_REPLICAS to a produce request, COORDINATOR_NOT_AVAILABLE to an offset commit. aiokafka
    then waits 100 ms, and logs a warning about replicas that are in fact in sync. Here the first retries follow after
    5, 10, 20 and 40 ms and are not logged.
    """
    producer._sender.__class__ = _TransactionalSender
    producer._sender.offset_retries = 0


def _quick_backoff_s(retries: int) -> float:
    return float(_QUICK_BACKOFF_S * 2**retries)


class _TransactionalSender(Sender):  # type: ignore[misc]  # aiokafka is untyped
    """A sender that uses our handlers for produce requests and offset commits."""

    offset_retries: int

    async def _send_produce_req(self, node_id: int, batches: dict[Any, Any]) -> None:
        await _ProduceHandler(self, batches).do(node_id)
        self._in_flight.remove(node_id)
        for partition in batches:
            self._muted_partitions.remove(partition)

    async def _do_txn_offset_commit(self, offsets: dict[Any, Any], group_id: str) -> None:
        if not offsets:
            return
        try:
            node_id = await self._find_coordinator(CoordinationType.GROUP, group_id)
        except GroupAuthorizationFailedError as error:
            self._txn_manager.error_transaction(error)
        else:
            await _OffsetCommitHandler(self, offsets, group_id).do(node_id)


class _OffsetCommitHandler(TxnOffsetCommitHandler):  # type: ignore[misc]  # aiokafka is untyped
    """Repeats an offset commit soon, the first times."""

    def handle_response(self, response: Any) -> float | None:
        backoff_s = super().handle_response(response)
        retries, self._sender.offset_retries = self._sender.offset_retries, 0
        if backoff_s is None:
            return None
        self._sender.offset_retries = retries + 1
        return _quick_backoff_s(retries) if retries < _QUICK_RETRIES else float(backoff_s)


class _ProduceHandler(SendProduceReqHandler):  # type: ignore[misc]  # aiokafka is untyped
    """Puts batches that were refused with NOT_ENOUGH_REPLICAS back into the queue, the first times without a warning."""

    def handle_response(self, response: Any) -> None:
        retries: list[int] = []
        topics = [
            (topic, [one for one in partitions if not self._is_retried_quickly(topic, one, retries)])
            for topic, partitions in response.topics
        ]
        if retries:
            self._default_backoff = _quick_backoff_s(min(retries))
        super().handle_response(SimpleNamespace(API_VERSION=response.API_VERSION, topics=topics))

    def _is_retried_quickly(self, topic: str, partition: tuple[Any, ...], retries: list[int]) -> bool:
        number, error_code, *_ = partition
        batch = self._batches.get(TopicPartition(topic, number))
        if error_code != NotEnoughReplicasError.errno or batch is None or batch.retry_count > _QUICK_RETRIES:
            return False
        retries.append(batch.retry_count - 1)  # aiokafka counts the first request too
        self._to_reenqueue.append(batch)
        return True


def new_sticky_assignor() -> Any:
    """Return a sticky assignor class for one consumer.

    aiokafka's class keeps the member's assignment and generation as class attributes, so that all consumers of a
    process share them (aiokafka #1175), and never calls `on_generation_assignment`, so that the claims of a stale
    member tie with current ones (aiokafka #1176). The caller calls it after each assignment.
    """
    return type("Sticky", (StickyPartitionAssignor,), {"member_assignment": None, "generation": -1})


def known_position(consumer: AIOKafkaConsumer, partition: TopicPartition) -> int | None:
    """Return the offset that the consumer reads next; None if the partition is not assigned or has no position yet.

    It is behind transaction markers and aborted records that were fetched. `AIOKafkaConsumer.position` waits for a
    position, and a caller that only measures must not wait.
    """
    subscription = consumer._subscription.subscription
    assignment = None if subscription is None else subscription.assignment
    if assignment is None or partition not in assignment.tps:
        return None
    state = assignment.state_value(partition)
    return int(state.position) if state.has_valid_position else None


def offset_of_unreadable_record(consumer: AIOKafkaConsumer, partition: TopicPartition) -> int | None:
    """Return the offset of the record whose decoding failed in the last `getmany`; None if none failed.

    aiokafka returns neither the record nor its offset, and would decode the same batch again for ever.
    """
    fetched = consumer._fetcher._records.get(partition)
    records = getattr(fetched, "_partition_records", None)
    return None if records is None else int(records.next_fetch_offset)


class Membership:
    """A started consumer's membership in its group. aiokafka has no public name for any of it."""

    def __init__(self, consumer: AIOKafkaConsumer, *, on_heartbeat: Callable[[], None]) -> None:
        """Begin to watch. `on_heartbeat` is called after each heartbeat that the group's coordinator answered.

        Create it after the consumer's `start` and before its `subscribe`, so that no heartbeat is missed.
        """
        self._coordinator = consumer._coordinator
        self._coordinator.__class__ = _Coordinator
        self._coordinator.on_heartbeat = on_heartbeat
        self._coordinator.refusal = 0
        self._coordinator.doubted_id = None
        self._coordinator.joins = 0
        self._coordinator.is_joining = False

    @property
    def identity(self) -> tuple[str, int]:
        """The member id and the generation; the id is empty while the consumer is not a member."""
        return self._coordinator.member_id, self._coordinator.generation

    @property
    def is_rejoining(self) -> bool:
        """Whether the consumer is about to join the group anew, or is joining it."""
        return self.is_joining or bool(self._coordinator._rejoin_needed_fut.done())

    @property
    def is_joining(self) -> bool:
        """Whether the consumer waits for the other members of the group, or for its assignment."""
        return bool(self._coordinator.is_joining)

    @property
    def has_died(self) -> bool:
        """Whether the consumer will never be a member again.

        aiokafka does not restart a heartbeat task that failed, for example when a permission was revoked. The consumer
        then raises that error for ever, also after the permission was given back.
        """
        coordination, heartbeats = self._coordinator._coordination_task, self._coordinator._heartbeat_task
        return bool(coordination.done()) or _has_failed(heartbeats)

    def request_rejoin(self) -> None:
        """Ask the group for a rebalance. The consumer keeps its member id, its session and its generation until then."""
        self._coordinator.request_rejoin()

    def give_up_instance(self) -> None:
        """Let `AIOKafkaConsumer.stop` leave the group although the member is static. Call it right before `stop`.

        aiokafka never sends a LeaveGroup request for a static member. The broker accepts one with the member id alone.
        """
        self._coordinator._group_instance_id = None

    async def heartbeat(self) -> bool:
        """Send a heartbeat now; return whether the coordinator accepted it. Raises aiokafka's KafkaError.

        If the group does not know the member any more, `identity` changes. None is sent while the consumer joins: the
        broker would answer it after the JoinGroup request, which may wait for the other members for a whole session.
        """
        return not self.is_joining and bool(await self._coordinator._do_heartbeat())

    @property
    def knows_coordinator(self) -> bool:
        """Whether the group's coordinator is known and was reachable."""
        return self._coordinator.coordinator_id is not None

    @property
    def refusal(self) -> int:
        """The error code of the last JoinGroup or SyncGroup response that aiokafka does not know; 0 if there is none."""
        return int(self._coordinator.refusal)

    def check_errors(self) -> None:
        """Raise the error for which the group refused the consumer, once, if there is one. `getmany` does so too."""
        self._coordinator.check_errors()


class _Identity(NamedTuple):
    """What a heartbeat was sent as."""

    member_id: str
    generation: int
    joins: int


_heartbeat_of: ContextVar[_Identity | None] = ContextVar("heartbeat", default=None)
"""The identity of the heartbeat whose response this task handles; None outside of a heartbeat."""


class _Coordinator(GroupCoordinator):  # type: ignore[misc]  # aiokafka is untyped
    """A group coordinator that reports answered heartbeats and lets itself be fenced.

    A response to a heartbeat that was sent before the present join says nothing about it. aiokafka would give up the
    member id of the new generation for an ILLEGAL_GENERATION of the former one, and the group would wait for that
    member for a whole session.
    """

    on_heartbeat: Callable[[], None]
    refusal: int
    doubted_id: str | None
    joins: int
    is_joining: bool

    async def _do_rejoin_group(self, subscription: Any) -> bool:
        """Join the group. `joins` counts the attempts."""
        self.joins += 1
        self.is_joining = True
        try:
            return bool(await super()._do_rejoin_group(subscription))
        finally:
            self.is_joining = False

    @property
    def _is_stale(self) -> bool:
        """Whether this task handles the response to a heartbeat that another join has overtaken."""
        sent = _heartbeat_of.get()
        return sent is not None and (sent != self._identity or self.is_joining)

    @property
    def _identity(self) -> _Identity:
        return _Identity(self.member_id, self.generation, self.joins)

    def request_rejoin(self) -> None:
        """Join the group anew, unless the reason is a response to a heartbeat that is stale."""
        if not self._is_stale:
            super().request_rejoin()

    async def _send_req(self, request: Any) -> Any:
        """Note error codes that aiokafka does not know: it raises "UnknownError" for them."""
        response = await super()._send_req(request)
        if (code := getattr(response, "error_code", 0)) in _UNKNOWN_CODES:
            self.refusal = code
        return response

    def reset_generation(self) -> None:
        """Join once more under the old member id, if this is a static member that the group does not know.

        aiokafka joins without a member id. For a static member the broker then replaces the process that holds the
        instance id now, and two processes with one id would fence each other in turn. With the old member id the
        broker answers FENCED_INSTANCE_ID if there is such a process (KIP-345), and UNKNOWN_MEMBER_ID if the session
        has only expired.
        """
        if self._is_stale:
            return
        member_id: str = self.member_id  # type: ignore[has-type]
        token = _heartbeat_of.set(None)  # it changes the identity, and then asks for a rejoin
        try:
            super().reset_generation()
        finally:
            _heartbeat_of.reset(token)
        if (
            self._group_instance_id
            and member_id
            and self.doubted_id != member_id
            and not self._closing.done()
        ):
            self.doubted_id = member_id
            self.member_id = member_id

    async def _do_heartbeat(self) -> bool:
        """Send a heartbeat. Nothing else distinguishes a broker that is away from one without records."""
        token = _heartbeat_of.set(self._identity)
        try:
            is_answered = bool(await super()._do_heartbeat())
        finally:
            _heartbeat_of.reset(token)
        if is_answered:
            self.on_heartbeat()
        return is_answered


def _has_failed(task: asyncio.Task[None] | None) -> bool:
    return task is not None and task.done() and not task.cancelled() and task.exception() is not None
