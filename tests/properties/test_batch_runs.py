"""A batch that is interrupted anywhere, any number of times: each line ends once, and its job is submitted once."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamworker.batch import engine as module
from streamworker.batch.engine import Engine
from streamworker.batch.errors import RunStopped
from streamworker.batch.files import LocalInput, LocalOutput, LocalRunStore
from streamworker.batch.follow import EventFollower
from streamworker.batch.options import BatchOptions, Stop
from streamworker.config import KafkaSettings, Settings
from tests.unit.batch.logs import IDS, events_of, job_id, record
from tests.unit.batch.memory import Kafka, Topics

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.batch.record import RunRecord

LINES = 6


class Store(LocalRunStore):
    """Calls `saved` after each save."""

    def __init__(self, path: Path, saved: Callable[[], None]) -> None:
        super().__init__(path)
        self._saved = saved

    async def save(self, record: RunRecord) -> None:
        await super().save(record)
        self._saved()


class Run:
    """The files of one batch, and starts of it over one Kafka in memory."""

    def __init__(self, directory: Path) -> None:
        self.kafka = Kafka()
        self.parts = [directory / name for name in ("o.jsonl.part", "e.jsonl.part")]
        self.files = [directory / name for name in ("o.jsonl", "e.jsonl")]
        self.input = directory / "i.jsonl"
        self.store = Store(directory / "o.jsonl.run.json", self.note)
        self.saved: list[tuple[bytes, list[int]]] = []
        """Each record of the run that was saved, with the sizes of the files, which are durable before it."""
        self.input.write_text(
            "".join(
                json.dumps({"custom_id": f"c{n}", "body": {"model": "m", "messages": [f"{n}"]}}) + "\n"
                for n in range(LINES)
            )
        )

    def note(self) -> None:
        """Note what is durable now."""
        sizes = [part.stat().st_size if part.exists() else 0 for part in self.parts]
        self.saved.append((self.store.path.read_bytes(), sizes))

    async def start(self, after: int | None) -> bool:
        """Start the run; stop it at once when Kafka has had `after` endings. Return whether it is finished."""
        output = LocalOutput(*self.files)
        output.lock()
        source = LocalInput.open(self.input)
        engine = Engine(
            Settings(topics={"results": "results"}), BatchOptions(topic="jobs", window=2), source, output, self.store
        )  # fmt: skip
        endings = len(self.kafka.endings)

        def stop_in_time() -> None:
            if after is not None and len(self.kafka.endings) - endings >= after:
                engine.stop(Stop.NOW)

        self.kafka.on_ending = stop_in_time
        try:
            stop_in_time()
            await engine.run()
        except RunStopped:
            return False
        finally:
            source.close()
            await output.close()
        return True

    def crash(self, saved: int, shares: tuple[float, float]) -> None:
        """Go back to a saved record, and lose some of what was written to the files since, as `kill -9` and a power cut do."""
        record, sizes = self.saved[saved % len(self.saved)]
        self.store.path.write_bytes(record)
        for part, durable, share in zip(self.parts, sizes, shares, strict=True):
            text = part.read_bytes() if part.exists() else b""
            part.write_bytes(text[: durable + round((len(text) - durable) * share)])

    def lines(self) -> list[tuple[str, bool]]:
        """Return custom id and kind of each line of the finished files."""
        return [
            (json.loads(line)["custom_id"], path == self.files[1])
            for path in self.files
            if path.exists()
            for line in path.read_text().splitlines()
        ]


Crash = tuple[int, int, tuple[float, float]]
"""Endings after which a start is stopped, the record that it has saved last, and how much of the files is left."""


async def interrupted(directory: Path, crashes: list[Crash], failing: set[int]) -> Run:
    """Run a batch through crashes to its end."""
    run = Run(directory)
    run.kafka.answer = lambda name: "failed" if int(name[1:]) in failing else "completed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RunTopics", lambda *arguments: Topics(run.kafka, *arguments))
        for after, saved, shares in crashes:
            if await run.start(after):
                return run
            run.crash(saved, shares)
        assert await run.start(None)
    return run


SHARES = st.tuples(st.floats(0, 1), st.floats(0, 1))


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), SHARES), max_size=3),
    st.sets(st.integers(0, LINES - 1), max_size=3),
)
def test_run_that_crashes_anywhere_ends_each_line_once(crashes: list[Crash], failing: set[int]) -> None:
    """Kafka has the record: what the files lost is read again, and nothing is submitted a second time."""
    with tempfile.TemporaryDirectory() as directory:
        run = asyncio.run(interrupted(Path(directory), crashes, failing))
        lines = run.lines()

    assert sorted(lines) == sorted((f"c{number}", number in failing) for number in range(LINES))
    assert len(run.kafka.jobs) == len(set(run.kafka.jobs)) == LINES


# Endings from events


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["a", "b"]), st.integers(0, 3)), max_size=6),
    st.randoms(use_true_random=False),
    st.data(),
)
def test_follower_that_continues_at_its_positions_misses_no_ending_and_no_text(
    jobs: list[tuple[int, str, int]], random: Any, data: st.DataObject
) -> None:
    """Wherever the first start ended, also within the events of several jobs."""
    streams = {
        number: events_of(job_id(number), [f"{number}{attempt}{at}" for at in range(deltas)], attempt=attempt)
        for number, attempt, deltas in jobs
    }
    log: list[Any] = []
    while streams:
        number = random.choice(sorted(streams))
        log.append(record(job_id(number), streams[number].pop(0), len(log)))
        if not streams[number]:
            del streams[number]
    cut = data.draw(st.integers(0, len(log)))

    async def followed() -> tuple[dict[str, bytes], dict[str, bytes]]:
        whole, continued = Reader({}), Reader({})
        whole.read(log)
        continued.read(log[:cut])
        second = Reader(continued.ended)
        second.read(log[continued.follower.positions().get(0, 0) :])
        return whole.ended, second.ended

    whole, continued = asyncio.run(followed())
    assert continued == whole
    assert len(whole) == len({number for number, *_ in jobs})


class Reader:
    """A follower of one partition. Jobs that have ended are not wanted again."""

    def __init__(self, ended: dict[str, bytes]) -> None:
        self.ended = dict(ended)
        self.follower = EventFollower(
            KafkaSettings(),
            "events",
            {0: 0},
            IDS,
            wants=lambda ref: IDS.job_id(ref.digest, ref.round) not in self.ended,
            on_ending=lambda _, job, *__: self.ended.__setitem__(job.job_id, bytes(job.completion)),
        )

    def read(self, records: list[Any]) -> None:
        """Read records one by one, as small fetches return them."""
        for one in records:
            self.follower.tail.positions[0] = one.offset + 1
            self.follower._read(0, [one], one.offset + 1)
