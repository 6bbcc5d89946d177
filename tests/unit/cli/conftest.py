"""Commands on a cluster in memory: `kafka` has the default topics, `command` runs one and returns what it printed."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from click.testing import CliRunner

from streamworker.cli.commands import run_command
from tests.memory_kafka import MemoryKafka

if TYPE_CHECKING:
    from collections.abc import Callable


class Outcome(NamedTuple):
    """What a command returned and printed."""

    code: Any
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of standard output."""
        return self.out.splitlines()


def run(*arguments: str, stdin: bytes | str = b"") -> Outcome:
    """Run a command as the shell does."""
    with CliRunner().isolation(input=stdin) as (out, err, _):
        with pytest.raises(SystemExit) as ended:
            run_command(arguments)
        return Outcome(ended.value.code, out.getvalue().decode(), err.getvalue().decode())


@pytest.fixture
def command() -> Callable[..., Outcome]:
    """Run a command; the arguments are those of the shell."""
    return run


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> MemoryKafka:
    """A cluster with the topics of the default settings; no other setting is in the environment."""
    for name in [name for name in os.environ if name.startswith("STREAMWORKER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL", "http://127.0.0.1:9/v1")
    kafka = MemoryKafka(
        streamworker_jobs=2, streamworker_events=2, streamworker_control=1, streamworker_dlq=1
    )
    kafka.install(monkeypatch)
    return kafka


class Events:
    """Writes the events of jobs, as workers write them, and optionally their job records and results."""

    def __init__(self, kafka: MemoryKafka) -> None:
        self.kafka = kafka
        self.topic = "streamworker.events"

    def write(
        self, kind: str, seq: int, job_id: str = "j", attempt: str = "a", ts: int = 1000, **members: Any
    ) -> dict[str, Any]:
        """Write one event."""
        event = {"v": 1, "job_id": job_id, "attempt": attempt, "seq": seq, "type": kind, "ts": ts, **members}
        headers = (("streamworker-type", kind.encode()),)
        self.kafka.write(
            self.topic, json.dumps(event).encode(), key=job_id.encode(), headers=headers, timestamp=ts
        )
        return event

    def started(self, job_id: str = "j", attempt: str = "a", *, cause: str = "new", **members: Any) -> None:
        """Write the first event of an attempt."""
        self.write(
            "started", 0, job_id, attempt, model="m", upstream="u", cause=cause, metadata={}, **members
        )

    def delta(self, seq: int, text: str, job_id: str = "j", attempt: str = "a", choice: int = 0) -> None:
        """Write a part of the answer."""
        delta = {"content": text}
        self.write("delta", seq, job_id, attempt, choice=choice, delta=delta, finish_reason=None)

    def ended(
        self, seq: int, status: str = "completed", job_id: str = "j", attempt: str = "a", **members: Any
    ) -> dict[str, Any]:
        """Write the terminal event."""
        error = None if status == "completed" else {"code": "auth", "message": "the key is wrong"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        rest = {"usage": usage, "usage_source": "upstream", "error": error, "metadata": {}, **members}
        return self.write("usage", seq, job_id, attempt, status=status, **rest)

    def whole(self, job_id: str, status: str = "completed", offset: int = 0, **members: Any) -> None:
        """Write the events of a job whose record is at this offset of the first partition of the job topic."""
        source = {"topic": "streamworker.jobs", "partition": 0, "offset": offset}
        self.started(job_id, source=source)
        self.delta(1, "text", job_id)
        self.ended(2, status, job_id, **members)


@pytest.fixture
def events(kafka: MemoryKafka) -> Events:
    """A writer of events to the events topic."""
    return Events(kafka)


REQUEST = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def job(job_id: str | None = None, **members: Any) -> bytes:
    """Return the value of a job record."""
    own = {} if job_id is None else {"job_id": job_id}
    return json.dumps({**own, "request": REQUEST, **members}).encode()
