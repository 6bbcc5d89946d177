"""The environment of one test: topics, a group, a reader of events, and workers in this process or in others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError
from aiokafka.structs import OffsetAndMetadata

from streamworker.app import App
from streamworker.config import KafkaSettings, Settings, load
from streamworker.kafka.compat import install_client
from streamworker.kafka.connection import RotatedSecrets
from tests.integration.checker import Breach, EventRecord, JobRecord, breaches, events_of, unfinished_below

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from streamworker.practice import Call, PracticeUpstream
    from tests.conftest import Broker

__all__ = ["InProcess", "Process", "Stage", "eventually", "is_known", "until_led"]

LIMIT_S = 30.0
STOP_S = 25.0
FORGET_S = 2.0


async def eventually(
    condition: Callable[[], Any], limit_s: float = LIMIT_S, what: Callable[[], object] = lambda: ""
) -> None:
    """Poll until a condition is true. `what` is called for the error text after `limit_s` seconds."""
    try:
        async with asyncio.timeout(limit_s):
            while not condition():  # noqa: ASYNC110 - there is no event for the condition
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"condition not fulfilled within {limit_s} s: {what()}") from None


async def until_led(client: Any) -> None:
    """Wait until an admin client knows a controller: a broker that was suspended for its session has none for a moment."""
    await client._client.force_metadata_update()
    while client._client.cluster.controller is None:
        await asyncio.sleep(0.02)
        await client._client.force_metadata_update()


async def is_known(client: Any, topic: str) -> bool:
    """Whether the broker's metadata have a leader for each partition of a topic."""
    (found,) = await client.describe_topics([topic])
    return found["error_code"] == 0 and all(part["leader"] >= 0 for part in found["partitions"])


class Stage:
    """An async context manager. `variables` are settings as environment variables without the prefix."""

    def __init__(
        self, broker: Broker, practice: PracticeUpstream, name: Callable[[str], str], directory: Path
    ) -> None:
        self.broker = broker
        self.practice = practice
        self.jobs_topic, self.events_topic = name("jobs"), name("events")
        self.dlq_topic, self.control_topic = name("dlq"), name("control")
        self.group = name("group")
        self.jobs: list[JobRecord] = []
        self.records: list[EventRecord] = []
        self.processes: list[Process] = []
        self.replicas = 1
        """Of each topic that is created."""
        self.bug = ""
        """Python code that each worker process runs before the worker."""
        self.source: Path | None = None
        """The directory with the package of another version, for the worker processes that are started."""
        self._workers: list[InProcess] = []
        self.variables = {
            "KAFKA__BOOTSTRAP_SERVERS": broker.bootstrap,
            "KAFKA__REQUEST_TIMEOUT_S": "10",
            "TOPICS__JOBS": self.jobs_topic,
            "TOPICS__EVENTS": self.events_topic,
            "TOPICS__DLQ": self.dlq_topic,
            "TOPICS__CONTROL": self.control_topic,
            "WORKER__GROUP_ID": self.group,
            "WORKER__SESSION_TIMEOUT_S": "6",
            "WORKER__DRAIN_TIMEOUT_S": "20",
            "UPSTREAMS__DEFAULT__BASE_URL": practice.base_url,
            "TELEMETRY__HTTP_PORT": "0",
            "TELEMETRY__HTTP_HOST": "127.0.0.1",
        }
        self._directory = directory
        self._stack = contextlib.AsyncExitStack()
        self._changed = asyncio.Condition()
        self._reading: asyncio.Task[None] | None = None
        self._topics: list[str] = []
        self._read_topics: list[str] = []
        self._producer: Any = None
        self._admin: Any = None

    # Environment

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self.processes:
            await process.end()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        await self._forget_topics()
        await self._stack.aclose()

    async def open(
        self,
        *,
        partitions: int = 1,
        events_partitions: int = 2,
        reply_topics: Sequence[str] = (),
        results_topic: str | None = None,
        topic_settings: Mapping[str, str] | None = None,
    ) -> None:
        """Create the topics and start reading the events."""
        self._admin = await self._started(AIOKafkaAdminClient(bootstrap_servers=self.broker.bootstrap))
        wanted = [(self.jobs_topic, partitions), (self.dlq_topic, 1), (self.control_topic, 1)]
        wanted += [(topic, events_partitions) for topic in (self.events_topic, *reply_topics)]
        if results_topic is not None:
            wanted += [(results_topic, events_partitions)]
            self.variables["TOPICS__RESULTS"] = results_topic
        limits = {self.dlq_topic: {"max.message.bytes": "2000000"}}
        new = [
            NewTopic(
                topic, count, self.replicas, topic_configs={**limits.get(topic, {}), **(topic_settings or {})}
            )
            for topic, count in wanted
        ]
        self._topics = [topic for topic, _ in wanted]
        await until_led(self._admin)
        answer = await self._admin.create_topics(new)
        assert {error[1] for error in answer.topic_errors} == {0}, answer.topic_errors
        # A program that is started before finds a topic missing, and ends.
        for topic in self._topics:
            while not await is_known(self._admin, topic):  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.02)
        if reply_topics:
            self.variables["TOPICS__ALLOWED_REPLY_TO"] = ",".join(reply_topics)
        self._producer = await self._started(
            AIOKafkaProducer(
                bootstrap_servers=self.broker.bootstrap,
                enable_idempotence=True,
                max_request_size=8 << 20,
                linger_ms=2,
            )
        )
        self._read_topics = [self.events_topic, *reply_topics]
        self._reading = asyncio.create_task(self._read(events_partitions))

    async def _forget_topics(self) -> None:
        """Delete the topics: a broker that is killed by a later test would recover all of them at its start."""
        with contextlib.suppress(KafkaError, TimeoutError):
            async with asyncio.timeout(FORGET_S):
                if self._topics:
                    await self._admin.delete_topics(self._topics)

    async def _started(self, client: Any) -> Any:
        self._stack.push_async_callback(
            client.close if isinstance(client, AIOKafkaAdminClient) else client.stop
        )
        await client.start()
        return client

    async def _read(self, partitions: int) -> None:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.broker.bootstrap,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            fetch_max_wait_ms=100,
            enable_auto_commit=False,
        )
        # This client waits after a failure, which leaves the CPU to a broker that restarts.
        secrets = RotatedSecrets(KafkaSettings(bootstrap_servers=self.broker.bootstrap))
        install_client(consumer, secrets)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(consumer.stop)
            await consumer.start()
            consumer.assign(
                [
                    KafkaTopicPartition(topic, number)
                    for topic in self._read_topics
                    for number in range(partitions)
                ]
            )
            while True:
                try:
                    fetched = await consumer.getmany(timeout_ms=200, max_records=5000)
                except KafkaError:
                    continue
                for batch in fetched.values():
                    self.records += [_event(record) for record in batch]
                if fetched or self._broken_workers():
                    async with self._changed:
                        self._changed.notify_all()

    # Jobs

    def message(self, job_id: str) -> list[dict[str, str]]:
        """Return the prompt. It contains the job id, so that calls in the upstream's log can be assigned to jobs."""
        return [{"role": "user", "content": f"prompt of {job_id}"}]

    async def submit(
        self,
        job_id: str,
        model: str = "practice",
        *,
        partition: int = 0,
        headers: Sequence[tuple[str, bytes]] = (),
        **members: Any,
    ) -> JobRecord:
        """Submit one job."""
        [job] = await self.submit_many([(job_id, model, partition)], headers=headers, **members)
        return job

    async def submit_many(
        self,
        jobs: Iterable[tuple[str, str, int]],
        headers: Sequence[tuple[str, bytes]] = (),
        **members: Any,
    ) -> list[JobRecord]:
        """Submit jobs, given as (id, model, partition), in one batch."""
        sent = []
        for job_id, model, partition in jobs:
            messages = self.message(job_id)
            value = {"job_id": job_id, "request": {"model": model, "messages": messages}, **members}
            future = await self._producer.send(
                self.jobs_topic,
                json.dumps(value).encode(),
                key=job_id.encode(),
                partition=partition,
                headers=list(headers),
            )
            sent.append((future, job_id, model, messages))
        written = [
            JobRecord(self.jobs_topic, (at := await future).partition, at.offset, job_id, model, messages)
            for future, job_id, model, messages in sent
        ]
        self.jobs += written
        return written

    async def submit_bytes(
        self,
        value: bytes | None,
        *,
        partition: int = 0,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> Any:
        """Write a record with these bytes; return its coordinates."""
        return await self._producer.send_and_wait(
            self.jobs_topic, value, key=key, partition=partition, headers=list(headers)
        )

    # Workers

    def settings(self, **over: object) -> Settings:
        """Return the settings of a worker; `over` overrides them, as in `worker__max_in_flight=5`."""
        return load(None, self._environment(over))

    def worker(self, **over: object) -> InProcess:
        """Run a worker in this process and loop; the context manager drains it at the end."""
        worker = InProcess(App(self.settings(**over)))
        self._workers.append(worker)
        return worker

    async def process(self, **over: object) -> Process:
        """Start a worker process. It is killed at the end of the test if it still runs."""
        return await self.start_command("run", over)

    async def start_command(self, command: str, over: Mapping[str, object]) -> Process:
        """Start a process that runs a command of streamworker. It is killed at the end of the test."""
        log = self._directory / f"{command}-{len(self.processes)}.log"
        environment = {**os.environ, **self._environment(over)}
        if self.source is not None:
            environment["PYTHONPATH"] = str(self.source)
        with log.open("wb") as output:
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", f"{self.bug}\nfrom streamworker.cli import main; main()", command),
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        process = Process(child, log)
        self.processes.append(process)
        return process

    def _environment(self, over: Mapping[str, object]) -> dict[str, str]:
        names = self.variables | {name.upper(): str(value) for name, value in over.items()}
        return {f"STREAMWORKER_{name}": value for name, value in names.items()}

    # Events

    async def until(self, condition: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
        """Wait for a condition on the events."""
        try:
            async with asyncio.timeout(limit_s), self._changed:
                await self._changed.wait_for(lambda: bool(condition()) or self._broken_workers())
        except TimeoutError:
            raise AssertionError(f"not in {limit_s} s; {self._state()}") from None
        assert condition(), f"a worker died: {self._broken_workers()}; {self._state()}"

    def _broken_workers(self) -> list[BaseException]:
        tasks = [worker.task for worker in self._workers if worker.task and worker.task.done()]
        return [error for task in tasks if not task.cancelled() and (error := task.exception())]

    async def ended(self, *job_ids: str, limit_s: float = LIMIT_S) -> list[dict[str, Any]]:
        """Wait for the terminal events of these jobs (default: all jobs); return them in that order."""
        wanted = job_ids or tuple(job.job_id for job in self.jobs)
        await self.until(lambda: self.terminals().keys() >= set(wanted), limit_s)
        terminals = self.terminals()
        return [terminals[job_id] for job_id in wanted]

    def terminals(self) -> dict[str, dict[str, Any]]:
        """Return the terminal events by job id."""
        return {
            record.event["job_id"]: record.event for record in self.records if record.event["type"] == "usage"
        }

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """Return the events of a job's valid attempt."""
        return events_of(job_id, self.records)

    def all_events(self, job_id: str) -> list[dict[str, Any]]:
        """Return the events of all attempts of a job."""
        return [record.event for record in self.records if record.event["job_id"] == job_id]

    def deltas(self, job_id: str) -> int:
        """Return the number of visible deltas of a job."""
        return sum(event["type"] == "delta" for event in self.all_events(job_id))

    def calls(self, job_id: str) -> list[Call]:
        """Return the upstream's calls for a job."""
        messages = self.message(job_id)
        return [call for call in self.practice.calls if call.body and call.body["messages"] == messages]

    def breaches(self) -> list[Breach]:
        """Return the breaches of the rules for readers."""
        return breaches(self.jobs, self.records)

    async def committed(self) -> dict[int, OffsetAndMetadata]:
        """Return the group's commit points, by partition of the jobs topic."""
        offsets = await self._admin.list_consumer_group_offsets(self.group)
        return {at.partition: point for at, point in offsets.items() if at.topic == self.jobs_topic}

    async def commit_breaches(self) -> list[Breach]:
        """Return the open jobs below the committed offsets. A commit may be visible shortly before its events."""
        committed = await self.committed()

        def found() -> list[Breach]:
            return [
                breach
                for partition, point in committed.items()
                for breach in unfinished_below(
                    point.offset, self.jobs_topic, partition, self.jobs, self.records
                )
            ]

        with contextlib.suppress(AssertionError):
            await self.until(lambda: not found(), limit_s=2)
        return found()

    async def dead_letters(self, count: int) -> list[Any]:
        """Wait for `count` dead letters; return them."""
        consumer = AIOKafkaConsumer(
            self.dlq_topic,
            bootstrap_servers=self.broker.bootstrap,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        letters: list[Any] = []
        await consumer.start()
        try:
            async with asyncio.timeout(LIMIT_S):
                while len(letters) < count:
                    fetched = await consumer.getmany(timeout_ms=200)
                    letters += [record for batch in fetched.values() for record in batch]
        finally:
            await consumer.stop()
        return letters

    async def create_topic(self, topic: str) -> None:
        """Create a topic with one partition; the stage deletes it with its own."""
        self._topics.append(topic)
        answer = await self._admin.create_topics([NewTopic(topic, 1, self.replicas)])
        assert {error[1] for error in answer.topic_errors} == {0}, answer.topic_errors

    async def set_topic(self, topic: str, **settings: str) -> None:
        """Change the configuration of a topic."""
        from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

        names = {name.replace("_", "."): value for name, value in settings.items()}
        await self._admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, names)])

    async def commit_as_stranger(self, partition: int, offset: int, metadata: str) -> None:
        """Commit for the group while it has no members, as another program or an operator could."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.broker.bootstrap, group_id=self.group, enable_auto_commit=False
        )
        await consumer.start()
        try:
            at = KafkaTopicPartition(self.jobs_topic, partition)
            consumer.assign([at])
            async with asyncio.timeout(LIMIT_S):
                await consumer.commit({at: OffsetAndMetadata(offset, metadata)})
        finally:
            await consumer.stop()

    def _state(self) -> str:
        ended = self.terminals()
        open_ = {job.job_id: len(self.all_events(job.job_id)) for job in self.jobs if job.job_id not in ended}
        logs = "".join(f"\n--- {process.name}\n{process.tail()}" for process in self.processes)
        return f"{len(ended)} of {len(self.jobs)} jobs ended, open jobs with their number of events: {open_}{logs}"


class InProcess:
    """A worker in this process and loop."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(self.app.run())
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.abandon()
        await self.drained()

    def abandon(self) -> None:
        """Cancel the worker."""
        assert self.task is not None
        self.task.cancel()

    async def drained(self) -> None:
        """Drain the worker and wait for its end."""
        assert self.task is not None
        self.app.drain()
        done, _ = await asyncio.wait([self.task], timeout=STOP_S)
        assert done, "the worker did not stop"
        if not self.task.cancelled():
            self.task.result()


class Process:
    """A worker process."""

    def __init__(self, child: asyncio.subprocess.Process, log: Path) -> None:
        self._child = child
        self._log = log
        self.name = log.stem

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._child.returncode is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self._child.send_signal(number)

    async def kill(self) -> None:
        """Kill the process with SIGKILL."""
        self.signal(signal.SIGKILL)
        await self._child.wait()

    async def exit_code(self, limit_s: float = STOP_S) -> int:
        """Wait for the end of the process; return its exit code."""
        try:
            return await asyncio.wait_for(self._child.wait(), limit_s)
        except TimeoutError:
            raise AssertionError(f"{self.name} does not end; its log:\n{self.tail()}") from None

    async def end(self) -> None:
        """Kill the process if it still runs."""
        if self.is_running:
            await self.kill()

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines with this event."""
        return [line for line in self.log() if line.get("event") == event]

    def log(self) -> list[dict[str, Any]]:
        """Return all log lines."""
        found = []
        for line in self._log.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                if isinstance(parsed := json.loads(line), dict):
                    found.append(parsed)
        return found

    async def logged(self, event: str, count: int = 1, limit_s: float = LIMIT_S) -> list[dict[str, Any]]:
        """Wait for log lines with this event; return them."""
        await eventually(lambda: len(self.lines(event)) >= count, limit_s, lambda: f"{event}:\n{self.tail()}")
        return self.lines(event)

    def tail(self) -> str:
        """Return the end of the log."""
        return self._log.read_text(errors="replace")[-3000:]


def _event(record: Any) -> EventRecord:
    return EventRecord(
        record.topic, record.partition, record.offset, record.key, record.headers, json.loads(record.value)
    )


@contextlib.asynccontextmanager
async def opened(stage: Stage, **arguments: Any) -> AsyncIterator[Stage]:
    """Yield an open stage."""
    async with stage:
        await stage.open(**arguments)
        yield stage
