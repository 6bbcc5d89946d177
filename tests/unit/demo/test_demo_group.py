"""How the demo waits for its two workers and its topics. The workers are fakes, the clock is virtual."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("noida_db", reason="needs the demo extra")

from streamworker.config import Settings
from streamworker.demo import stage as module
from streamworker.demo.stage import PARTITIONS, Stage, _running, _topics
from streamworker.errors import StreamworkerError
from streamworker.model import TopicPartition
from tests.turnable import run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class App:
    """The first worker. `owned` has the number of its partitions by the seconds since its start."""

    def __init__(self, owned: dict[float, int], error: Exception | None = None) -> None:
        self.owned = owned
        self.error = error
        self.begun = asyncio.get_running_loop().time()
        self.steps: list[str] = []

    @property
    def partitions(self) -> list[TopicPartition]:
        now = asyncio.get_running_loop().time() - self.begun
        count = next((number for at, number in reversed(self.owned.items()) if at <= now), 0)
        return [TopicPartition("jobs", number) for number in range(count)]

    async def run(self) -> None:
        try:
            await asyncio.sleep(5 if self.error else 1000)
        except asyncio.CancelledError:
            self.steps.append("cancelled")
            raise
        if self.error is not None:
            raise self.error

    def drain(self) -> None:
        self.steps.append("drained")


class Second:
    """The second worker, which owns its half from `owns_at` seconds on, and ends at `ends_at`."""

    def __init__(self, owns_at: float, ends_at: float = 1e9) -> None:
        self._owns_at, self._ends_at = owns_at, ends_at
        self._begun = asyncio.get_running_loop().time()

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._begun

    async def owns(self, partitions: int) -> bool:
        assert partitions == PARTITIONS // 2
        return self._now() >= self._owns_at

    @property
    def running(self) -> bool:
        return self._now() < self._ends_at

    def log_end(self) -> str:
        return "no such option"


def stage_of(app: App, second: Second) -> Stage:
    """Return a stage with these workers."""
    parts: Any = {"app": app, "second": second, "page": None}
    return Stage(run="r", settings=Settings(), practice=None, **parts)


def test_jobs_wait_until_each_worker_owns_its_half() -> None:
    """At first the first worker owns everything, and then for a moment nothing."""

    async def work() -> None:
        app = App({0: 4, 2: 0, 3: 2})
        began = asyncio.get_running_loop().time()
        assert await stage_of(app, Second(owns_at=2.5)).wait_until_shared() == {0, 1}
        assert 3 <= asyncio.get_running_loop().time() - began < 3.2

    run(work())


def test_second_worker_that_ends_is_reported_with_the_end_of_its_log() -> None:
    """At once: it would not come back."""

    async def work() -> None:
        began = asyncio.get_running_loop().time()
        with pytest.raises(StreamworkerError, match="worker B ended: no such option"):
            await stage_of(App({0: 4}), Second(owns_at=1e9, ends_at=1)).wait_until_shared()
        assert asyncio.get_running_loop().time() - began < 1.2

    run(work())


def test_workers_that_form_no_group_are_reported() -> None:
    """After half a minute."""

    async def work() -> None:
        with pytest.raises(StreamworkerError, match="did not form a group within 30 s"):
            await stage_of(App({0: 4}), Second(owns_at=0)).wait_until_shared()

    run(work())


# The first worker


def test_first_worker_runs_while_the_block_does() -> None:
    """It is drained at the end, and awaited."""

    async def work() -> None:
        app = App({2: 4})
        began = asyncio.get_running_loop().time()
        async with _running(app):  # type: ignore[arg-type]  # what it uses of an app
            assert asyncio.get_running_loop().time() - began >= 2
            assert app.steps == []
        assert app.steps == ["drained", "cancelled"]

    run(work())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "the worker did not join its group within 30 s"),
        (StreamworkerError("topic jobs does not exist"), "topic jobs does not exist"),
    ],
)
def test_first_worker_that_does_not_start_is_reported(error: Exception | None, message: str) -> None:
    """By its own error where it has one."""

    async def work() -> None:
        app = App({}, error)
        with pytest.raises(StreamworkerError, match=message):
            async with _running(app):  # type: ignore[arg-type]  # what it uses of an app
                pytest.fail("the block must not run")
        assert app.steps[0] == "drained" or "cancelled" in app.steps

    run(work())


def test_first_worker_that_ends_without_an_error_is_reported() -> None:
    """A signal may have drained it."""

    async def work() -> None:
        app = App({})
        app.run = lambda: asyncio.sleep(1)  # type: ignore[method-assign]
        with pytest.raises(StreamworkerError, match="the worker ended during its start"):
            async with _running(app):  # type: ignore[arg-type]  # what it uses of an app
                pytest.fail("the block must not run")

    run(work())


# Timeouts of others


class Admin:
    """Creates topics after a time, and deletes them."""

    def __init__(self, create_s: float) -> None:
        self.create_s = create_s
        self.steps: list[str] = []

    async def create(self, *, partitions: int) -> None:
        assert partitions == PARTITIONS
        await asyncio.sleep(self.create_s)
        self.steps.append("created")

    async def delete(self) -> None:
        await asyncio.sleep(60)  # it may take its time: the demo is over
        self.steps.append("deleted")


@pytest.fixture
def admin_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Admin]:
    """Return a function that makes the admin client of a test."""

    def made(create_s: float) -> Admin:
        admin = Admin(create_s)

        @asynccontextmanager
        async def opened(_: Settings) -> AsyncIterator[Admin]:
            yield admin

        monkeypatch.setattr(module, "open_admin", opened)
        return admin

    return made


def test_topics_are_there_while_the_block_runs(admin_of: Callable[[float], Admin]) -> None:
    """However long it runs; they are deleted after it, and after an error in it."""

    async def work() -> None:
        admin = admin_of(1)
        async with _topics(Settings()):
            assert admin.steps == ["created"]
            await asyncio.sleep(1000)
        assert admin.steps == ["created", "deleted"]

        admin = admin_of(1)
        with pytest.raises(LookupError):
            async with _topics(Settings()):
                raise LookupError
        assert admin.steps == ["created", "deleted"]

    run(work())


def test_broker_that_does_not_create_topics_in_time_is_reported(admin_of: Callable[[float], Admin]) -> None:
    """With its address."""

    async def work() -> None:
        admin_of(60)
        settings = Settings(kafka={"bootstrap_servers": "kafka:9092"})
        with pytest.raises(StreamworkerError, match="the broker kafka:9092 did not answer within 10 s"):
            async with _topics(settings):
                pytest.fail("the block must not run")

    run(work())


@pytest.mark.parametrize("part", ["topics", "worker"])
def test_timeout_inside_the_block_is_not_taken_for_that_of_a_part(
    admin_of: Callable[[float], Admin], part: str
) -> None:
    """The reason would be a wrong one: the broker and the worker had answered."""

    async def work() -> None:
        admin_of(0)
        around: Any = _topics(Settings()) if part == "topics" else _running(App({0: 4}))  # type: ignore[arg-type]  # what it uses of an app
        with pytest.raises(TimeoutError, match="another one"):
            async with around:
                raise TimeoutError("another one")

    run(work())
