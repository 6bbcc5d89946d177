"""`map`: a window of jobs at a time, items taken lazily, results as jobs end. Without Kafka."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.client.blocking import BlockingClient, _Loop
from streamworker.client.mapping import results_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

LIMIT_S = 10


class EndsOnDemand:
    """A client whose jobs end when the test says so. It counts the jobs in flight."""

    def __init__(self) -> None:
        self.started: dict[str, asyncio.Event] = {}
        self.cancelled: set[str] = set()
        self.most = 0
        self._open = 0
        self._changed = asyncio.Condition()

    async def complete(self, *, request: dict[str, Any], **_: Any) -> str:
        """Wait for the test; return the job's name."""
        name: str = request["name"]
        self.started[name] = end = asyncio.Event()
        self._open += 1
        self.most = max(self.most, self._open)
        async with self._changed:
            self._changed.notify_all()
        try:
            if not request.get("ends_at_once"):
                await end.wait()
        except asyncio.CancelledError:
            self.cancelled.add(name)
            raise
        finally:
            self._open -= 1
            async with self._changed:
                self._changed.notify_all()
        if request.get("fails"):
            raise RuntimeError(name)
        return name

    async def until(self, *names: str) -> None:
        """Wait until these jobs have started."""
        async with self._changed:
            await self._changed.wait_for(lambda: set(names) <= set(self.started))

    async def until_cancelled(self, *names: str) -> None:
        """Wait until these jobs were cancelled."""
        async with asyncio.timeout(LIMIT_S), self._changed:
            await self._changed.wait_for(lambda: set(names) == self.cancelled)


def items(count: int, taken: list[int], **members: Any) -> Iterator[dict[str, Any]]:
    """Yield items, and note which were taken."""
    for number in range(count):
        taken.append(number)
        yield {"name": f"job {number}", **members}


async def test_map_takes_no_item_beyond_its_window() -> None:
    """A generator of a million prompts is not drained into memory."""
    client, taken = EndsOnDemand(), list[int]()
    async with asyncio.timeout(LIMIT_S):
        results = results_of(client, items(1_000_000, taken), 3, {})  # type: ignore[arg-type]
        first = asyncio.ensure_future(anext(results))
        await client.until("job 0", "job 1", "job 2")

        client.started["job 1"].set()

        assert str(await first) == "job 1"
        assert len(taken) <= 4
        assert client.most == 3
        await results.aclose()  # type: ignore[attr-defined]
        assert client.cancelled == {"job 0", "job 2"} | set(client.started) - {"job 0", "job 1", "job 2"}


async def test_map_yields_results_in_the_order_in_which_jobs_end() -> None:
    """A slow first job delays no other result."""
    client, taken = EndsOnDemand(), list[int]()
    async with asyncio.timeout(LIMIT_S):
        results = results_of(client, items(3, taken), 3, {})  # type: ignore[arg-type]
        got: list[Any] = []
        for name in ("job 2", "job 0", "job 1"):
            following = asyncio.ensure_future(anext(results))
            await client.until("job 0", "job 1", "job 2")
            client.started[name].set()
            got.append(await following)

        assert got == ["job 2", "job 0", "job 1"]
        with pytest.raises(StopAsyncIteration):
            await anext(results)


async def test_map_takes_items_from_an_asynchronous_iterable() -> None:
    """Items may come from a queue or a database."""

    async def rows() -> AsyncIterator[dict[str, Any]]:
        for row in items(5, [], ends_at_once=True):
            await asyncio.sleep(0)
            yield row

    async with asyncio.timeout(LIMIT_S):
        got = {result async for result in results_of(EndsOnDemand(), rows(), 2, {})}  # type: ignore[arg-type]

    assert {str(one) for one in got} == {f"job {number}" for number in range(5)}


async def test_map_with_an_iterable_that_fails_cancels_what_runs() -> None:
    """The caller's error is raised, and no submission stays in flight."""
    client = EndsOnDemand()

    def broken() -> Iterator[dict[str, Any]]:
        yield from items(2, [])
        raise LookupError("row 2")

    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(LookupError, match="row 2"):
            async for _ in results_of(client, broken(), 5, {}):  # type: ignore[arg-type]
                pytest.fail("no job has ended")

    assert client.cancelled == set(client.started)


async def test_map_raises_the_error_of_a_submission() -> None:
    """Only a submission fails; a job that fails is a result."""
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(RuntimeError, match="job 0"):
            async for _ in results_of(
                EndsOnDemand(),  # type: ignore[arg-type]
                items(1, [], ends_at_once=True, fails=True),
                5,
                {},
            ):
                pytest.fail("the only job has no result")


@pytest.mark.parametrize("window", [0, -1])
async def test_map_without_a_window_is_refused(window: int) -> None:
    """A window of 0 would wait for ever."""
    with pytest.raises(ValueError, match="window must be at least 1"):
        await anext(results_of(EndsOnDemand(), [], window, {}))  # type: ignore[arg-type]


@pytest.fixture
def loop() -> Iterator[_Loop]:
    thread = _Loop()
    yield thread
    thread.stop()


@pytest.fixture
def client() -> EndsOnDemand:
    return EndsOnDemand()


@pytest.fixture
def blocking(loop: _Loop, client: EndsOnDemand) -> BlockingClient:
    return BlockingClient(loop, client)  # type: ignore[arg-type]


def test_blocking_map_takes_items_lazily_in_the_calling_thread(blocking: BlockingClient) -> None:
    """Items may come from a file or a connection that belongs to this thread."""
    taken: list[int] = []
    threads: set[int] = set()

    def rows() -> Iterator[dict[str, Any]]:
        for row in items(1_000_000, taken, ends_at_once=True):
            threads.add(threading.get_ident())
            yield row

    results = blocking.map(rows(), window=4)
    got = [next(results) for _ in range(20)]
    results.close()  # type: ignore[attr-defined]

    assert len(set(got)) == 20
    assert len(taken) <= 20 + 4
    assert threads == {threading.get_ident()}


def test_blocking_map_that_is_left_cancels_what_runs(
    blocking: BlockingClient, loop: _Loop, client: EndsOnDemand
) -> None:
    """`break` in a loop over `map` leaves no submission behind."""

    async def end_first_when_all_run() -> None:
        await client.until("first", "second", "third")
        client.started["first"].set()

    ending = loop.start(end_first_when_all_run())
    results = blocking.map([{"name": "first"}, {"name": "second"}, {"name": "third"}], window=3)
    assert str(next(results)) == "first"
    ending.result(LIMIT_S)
    results.close()  # type: ignore[attr-defined]

    loop.run(client.until_cancelled("second", "third"))


def test_blocking_map_without_a_window_is_refused(blocking: BlockingClient) -> None:
    """The same message as the asynchronous client's."""
    with pytest.raises(ValueError, match="window must be at least 1"):
        next(blocking.map([], window=0))
