"""Start broker, upstream, two workers and the page of the demo, and stop them at its end."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import orjson

from streamworker.app import App
from streamworker.config import PREFIX, Settings, load
from streamworker.demo.broker import EmbeddedBroker
from streamworker.demo.child import Child, free_port
from streamworker.demo.page import Page
from streamworker.demo.probe import get
from streamworker.errors import StreamworkerError, UpstreamError
from streamworker.kafka.topics import open_admin
from streamworker.practice import PracticeUpstream
from streamworker.telemetry.logging import configure_logging
from streamworker.upstream.client import HttpUpstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

__all__ = ["FIRST", "PARTITIONS", "SECOND", "Stage", "set_up"]

FIRST: Final = "worker A"
SECOND: Final = "worker B"
PARTITIONS: Final = 4
SESSION_TIMEOUT_S: Final = 6
_INSTANCE: Final = "second"
"""`worker.group_instance_id` of the second worker: a process that starts under this name replaces one that died.

Without it the group waits for SESSION_TIMEOUT_S; the embedded broker would never remove the dead member (docs/adr/0009).
"""

_BROKER: Final = f"{PREFIX}KAFKA__BOOTSTRAP_SERVERS"
_UPSTREAM: Final = f"{PREFIX}UPSTREAMS__DEFAULT__BASE_URL"
_CONFIG: Final = f"{PREFIX}CONFIG"
_HOST: Final = "127.0.0.1"
_OK: Final = 200
_UPSTREAM_S: Final = 2.5
_KAFKA_S: Final = 10.0
_JOIN_S: Final = 30.0
_POLL_S: Final = 0.05
_REACHABLE: Final = range(400, 500)


class SecondWorker:
    """A worker process that can be killed and replaced. `log` is the file of its output."""

    def __init__(self, log: Path, variables: Mapping[str, str]) -> None:
        self._log = log
        self._port = free_port(_HOST)
        own = {
            f"{PREFIX}WORKER__GROUP_INSTANCE_ID": _INSTANCE,
            f"{PREFIX}TELEMETRY__HTTP_PORT": str(self._port),
        }
        self._environ = _environ({**variables, **own})
        self._child = self._new()

    def _new(self) -> Child:
        return Child(_command("run"), self._log, self._environ)

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self._child.running

    def start(self) -> None:
        """Start the process."""
        self._child.start(lambda _: True, timeout_s=1)

    async def owns(self, partitions: int) -> bool:
        """Return whether the worker is ready and owns this number of partitions, by its readiness probe."""
        status, body = await get(_HOST, self._port, "/readyz")
        return status == _OK and orjson.loads(body)["detail"]["partitions"] == partitions

    def kill(self) -> None:
        """Send SIGKILL: the process can neither finish its jobs nor leave the group."""
        self._child.kill()

    def replace(self) -> None:
        """Start another process under the same name, as a StatefulSet does."""
        self._child = self._new()
        self.start()

    def log_end(self) -> str:
        """Return the end of the process's log."""
        return self._child.log_end()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The parts of the demo. `practice` is None if the environment names an upstream.

    `app` is the first worker, in this process. `second` is a process of its own. `page` is not started: its process would take
    the processor from the workers, which a visitor waits for.
    """

    run: str
    settings: Settings
    app: App
    second: SecondWorker
    practice: PracticeUpstream | None
    page: Page

    async def wait_until_shared(self) -> frozenset[int]:
        """Wait until each worker owns half of the partitions; return those of the first one. Raises StreamworkerError."""
        try:
            async with asyncio.timeout(_JOIN_S):
                while not (
                    await self.second.owns(PARTITIONS // 2) and len(self.app.partitions) == PARTITIONS // 2
                ):
                    if not self.second.running:
                        raise StreamworkerError(f"{SECOND} ended: {self.second.log_end()}")
                    await asyncio.sleep(_POLL_S)
                return frozenset(partition.partition for partition in self.app.partitions)
        except TimeoutError:
            raise StreamworkerError(f"the two workers did not form a group within {_JOIN_S:g} s") from None


@asynccontextmanager
async def set_up(say: Callable[[str], None], environ: Mapping[str, str] = os.environ) -> AsyncIterator[Stage]:
    """Start everything, unless the environment names a broker or an upstream, and create topics for the demo.

    Raises:
        StreamworkerError: the named upstream or broker does not answer, or a process does not start.
    """
    run = f"demo-{uuid4().hex[:6]}"
    async with AsyncExitStack() as stack:
        stack.enter_context(_quiet_log())
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="streamworker-demo-")))
        base_url, practice = await stack.enter_async_context(_upstream(environ, say))
        if practice is None:
            await _require_answer(load(None, dict(environ)))
        bootstrap = stack.enter_context(_broker(environ, say))
        variables = {**environ, **_variables(run, bootstrap, base_url)}
        settings = load(None, variables)
        await stack.enter_async_context(_topics(settings))
        app = App(settings)
        page = Page(_command("gateway"), folder, _environ(variables))
        stack.callback(page.stop)
        second = SecondWorker(folder / "second.log", variables)
        stack.callback(second.kill)
        second.start()  # it takes a second to import its packages; the first worker joins the group before it
        await stack.enter_async_context(_running(app))
        yield Stage(run=run, settings=settings, app=app, second=second, practice=practice, page=page)


def _variables(run: str, bootstrap: str, base_url: str) -> dict[str, str]:
    own = {
        "KAFKA__BOOTSTRAP_SERVERS": bootstrap,
        "UPSTREAMS__DEFAULT__BASE_URL": base_url,
        "WORKER__GROUP_ID": f"streamworker.{run}",
        "WORKER__SESSION_TIMEOUT_S": str(SESSION_TIMEOUT_S),
        "TELEMETRY__HTTP_HOST": "127.0.0.1",
        "TELEMETRY__HTTP_PORT": "0",
        **{
            f"TOPICS__{name}": f"streamworker.{run}.{name.lower()}"
            for name in ("JOBS", "EVENTS", "CONTROL", "DLQ")
        },
    }
    return {PREFIX + name: value for name, value in own.items()}


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "streamworker", *arguments]


def _environ(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a child, which finds this package also where it is not installed.

    The child reads no configuration file, as this process does not: a user's file has upstreams that are paid for.
    """
    source = str(Path(__file__).parents[2])
    paths = [source, *filter(None, [variables.get("PYTHONPATH")])]
    own = {name: value for name, value in variables.items() if name != _CONFIG}
    return {**own, "PYTHONPATH": os.pathsep.join(paths)}


@asynccontextmanager
async def _topics(settings: Settings) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_KAFKA_S) as limit, open_admin(settings) as admin:
            await admin.create(partitions=PARTITIONS)
            limit.reschedule(None)
            try:
                yield
            finally:
                await admin.delete()
    except TimeoutError:
        if not limit.expired():
            raise
        where = settings.kafka.bootstrap_servers
        raise StreamworkerError(f"the broker {where} did not answer within {_KAFKA_S:g} s") from None


@asynccontextmanager
async def _running(app: App) -> AsyncIterator[None]:
    """Run the first worker, and wait until it owns partitions."""
    task = asyncio.create_task(app.run())
    limit = asyncio.timeout(_JOIN_S)
    try:
        async with limit:
            while not app.partitions:
                if task.done():
                    task.result()
                    raise StreamworkerError("the worker ended during its start")
                await asyncio.sleep(_POLL_S)
        yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise StreamworkerError(f"the worker did not join its group within {_JOIN_S:g} s") from None
    finally:
        app.drain()
        task.cancel()
        await asyncio.wait([task])


async def _require_answer(settings: Settings) -> None:
    """Raise StreamworkerError if the upstream that the environment names does not answer, or refuses the key."""
    upstream = settings.upstreams["default"]
    client = HttpUpstream(upstream)
    try:
        async with asyncio.timeout(_UPSTREAM_S):
            await client.models()
    except TimeoutError:
        raise _no_answer(upstream.base_url, f"no answer within {_UPSTREAM_S:g} s") from None
    except UpstreamError as failure:
        error = failure.error
        if error.http_status not in _REACHABLE or error.http_status in {401, 403}:
            raise _no_answer(upstream.base_url, f"{error.code}: {client.scrub(error.message)}") from None
    finally:
        await client.close()


def _no_answer(base_url: str, reason: str) -> StreamworkerError:
    return StreamworkerError(
        f"the upstream {base_url} (from {_UPSTREAM}) cannot be used: {reason}. "
        f"Unset the variable for the practice upstream"
    )


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Log errors only, so that the worker's log lines do not disturb the display."""
    with TemporaryFile() as log:
        configure_logging("json", "info", log)
        yield
        configure_logging("json", "error")


@contextmanager
def _broker(environ: Mapping[str, str], say: Callable[[str], None]) -> Iterator[str]:
    if given := environ.get(_BROKER):
        say(f"broker     {given} (from {_BROKER})")
        yield given
        return
    with EmbeddedBroker() as broker:
        say(f"broker     {broker.bootstrap} (embedded)")
        yield broker.bootstrap


@asynccontextmanager
async def _upstream(
    environ: Mapping[str, str], say: Callable[[str], None]
) -> AsyncIterator[tuple[str, PracticeUpstream | None]]:
    if given := environ.get(_UPSTREAM):
        say(f"upstream   {given} (from {_UPSTREAM})")
        yield given, None
        return
    async with PracticeUpstream() as practice:
        say(f"upstream   {practice.base_url} (practice)")
        yield practice.base_url, practice
