"""Reading an input once: its lines, its faults, and what is counted of it."""

from __future__ import annotations

import asyncio
import json
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.batch import intake as module
from streamworker.batch.identity import JobIds
from streamworker.batch.index import State
from streamworker.batch.intake import SHOWN_FAULTS, Intake
from streamworker.batch.jobs import JobWriter
from streamworker.batch.lines import FaultCode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable


class Source:
    """An input in memory. `chunks` counts what was read of it."""

    name: str = "i.jsonl"

    def __init__(self, lines: Iterable[Any], size: int = 64) -> None:
        texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        self.text = b"".join(text + b"\n" for text in texts)
        self.size = size
        self.read_bytes = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        for at in range(0, len(self.text), self.size):
            self.read_bytes = min(at + self.size, len(self.text))
            yield self.text[at : at + self.size]

    async def read(self, offset: int, length: int) -> bytes:
        return self.text[offset : offset + length]


def line(custom_id: str, model: str = "m", content: str = "Hi") -> dict[str, Any]:
    """Return a line."""
    return {
        "custom_id": custom_id,
        "body": {"model": model, "messages": [{"role": "user", "content": content}]},
    }


WRITER = JobWriter(JobIds("b.r."), "r", metadata={}, on_break="restart")


async def read(source: Source, **options: Any) -> Intake:
    """Read an input."""
    defaults: dict[str, Any] = {"max_job_bytes": 1_000_000, "writer": WRITER}
    intake = Intake(source, **defaults | options)
    await intake.run()
    return intake


def codes(intake: Intake) -> list[tuple[int, str]]:
    """Return line number and code of each fault."""
    return [(number, fault.code.code) for number, fault in intake.faults]


async def test_every_line_is_indexed_with_its_place() -> None:
    """However the file is read; blank lines have a number and no entry."""
    for size in (1, 64, 10_000):
        source = Source([line("a"), b"", line("b"), b"  ", b"{"], size)
        intake = await read(source)
        places = zip(intake.index.numbers, intake.index.offsets, intake.index.lengths, strict=True)

        texts = [(number, source.text[offset : offset + length]) for number, offset, length in places]
        assert [number for number, _ in texts] == [1, 3, 5]
        assert [text.strip() for _, text in texts] == [
            text for text in source.text.split(b"\n") if text.strip()
        ]
        assert (intake.bytes, intake.sha256) == (len(source.text), sha256(source.text).hexdigest())


@pytest.mark.parametrize(("limit", "lines"), [(None, 5), (1, 1), (3, 3), (5, 5), (9, 5)])
async def test_limit_counts_lines_that_are_not_blank(limit: int | None, lines: int) -> None:
    """Faulty ones too: it is that of the file."""
    source = Source([line("a"), b"", b"{", line("c"), line("d"), line("e")])

    assert len((await read(source, limit=limit)).index) == lines


async def test_input_is_not_read_beyond_its_limit() -> None:
    """A file of any size may be tried with `--limit`."""
    source = Source([line(f"c{number}") for number in range(1000)])
    await read(source, limit=2)

    assert source.read_bytes < 1000


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
async def test_last_line_needs_no_end(end: bytes) -> None:
    """Editors and programs leave it out; a fault in it is one all the same."""
    source = Source([line("a")])
    source.text += json.dumps(line("b")).encode() + end
    assert len((await read(source)).index) == 2

    source.text = source.text.rstrip() + b"\n{" + end
    assert codes(await read(source)) == [(3, "invalid_json_line")]


async def test_first_faults_are_kept_and_all_are_counted() -> None:
    """A file of another program has one in every line."""
    intake = await read(Source([b"{" for _ in range(SHOWN_FAULTS + 5)]))

    assert codes(intake) == [(number, "invalid_json_line") for number in range(1, 21)]
    assert (intake.faulty, intake.index.counts[State.FAULTY]) == (SHOWN_FAULTS + 5, SHOWN_FAULTS + 5)


async def test_equal_faulty_lines_are_different_lines() -> None:
    """Each has an output line of its own, which is the same at each start."""
    first, second = await read(Source([b"{"] * 3)), await read(Source([b"{"] * 3))
    digests = [first.index.digest(number) for number in range(3)]

    assert len(set(digests)) == 3
    assert digests == [second.index.digest(number) for number in range(3)]


async def test_many_equal_faulty_lines_take_no_longer_than_different_ones() -> None:
    """A file of garbage must not occupy a gateway: the number of lookups grows with the logarithm of its lines."""
    source = Source([b"{"] * 3000, 1 << 20)
    intake = Intake(source, max_job_bytes=1_000_000, writer=WRITER)
    lookups, find = 0, intake.index.find

    def counted(digest: bytes) -> int | None:
        nonlocal lookups
        lookups += 1
        return find(digest)

    intake.index.find = counted  # type: ignore[method-assign]
    await intake.run()

    assert len({intake.index.digest(number) for number in range(3000)}) == 3000
    assert lookups < 3000 * 30


async def test_custom_id_that_is_used_again_is_a_fault_of_the_later_line() -> None:
    """Whatever its body is; the message names the first line that has it."""
    intake = await read(Source([line("a"), b"", line("b"), line("a", content="other"), line("a")]))

    assert codes(intake) == [(4, "duplicate_custom_id"), (5, "duplicate_custom_id")]
    assert [fault.message for _, fault in intake.faults] == ["custom_id is that of line 1"] * 2
    assert intake.index.counts[State.PENDING] == 2


async def test_line_whose_custom_id_is_repeated_is_read_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a megabyte long, and be repeated in every other line; what is kept is bounded."""
    monkeypatch.setattr(module, "_MAX_REPEATED", 2)
    source = Source([line(name) for name in [*"abc", *("a" * 50), *"bca"]])
    reads: list[int] = []
    again = source.read

    async def noted(offset: int, length: int) -> bytes:
        reads.append(offset)
        return await again(offset, length)

    source.read = noted  # type: ignore[method-assign]
    intake = await read(source)

    assert intake.faulty == 53
    assert len(reads) == 4  # a, b, and after the two were dropped: c, a


async def test_custom_id_of_a_faulty_line_may_be_used_by_a_valid_one() -> None:
    """The line that was corrected may stand below the wrong one."""
    intake = await read(Source([line("a") | {"method": "PUT"}, line("a")]))

    assert codes(intake) == [(1, "invalid_method")]
    assert list(intake.index.named("a")) == [1]


async def test_custom_ids_whose_hashes_are_equal_are_different(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index keeps hashes only; the text of the file decides."""
    monkeypatch.setattr("streamworker.batch.index.hash", lambda _: 7, raising=False)
    intake = await read(Source([line(f"c{number}") for number in range(5)]))

    assert (intake.faulty, intake.index.counts[State.PENDING]) == (0, 5)


@pytest.mark.parametrize("spare", [0, 1])
async def test_job_may_have_exactly_the_allowed_bytes(spare: int) -> None:
    """It is the whole record that counts, with metadata and ids, and not the line."""
    text = "x" * 20_000
    measured = await read(Source([line("a", content=text)]), max_job_bytes=1)
    size = int(measured.faults[0][1].message.split()[4])
    intake = await read(Source([line("a", content=text)]), max_job_bytes=size - spare)

    assert codes(intake) == [(1, "too_large")] * spare
    if spare:
        assert intake.faults[0][1].message == (
            f"its job would have {size} bytes, worker.max_job_bytes is {size - 1}"
        )
        assert intake.index.fault(0) == FaultCode.TOO_LARGE


async def test_small_jobs_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing each job twice would double the time of a start."""
    written: list[str] = []

    class Writer(JobWriter):
        def write(self, request: Any, round_: int) -> tuple[bytes, bytes]:
            written.append(request.custom_id)
            return super().write(request, round_)

    monkeypatch.setattr(module, "_MARGIN", 1000)
    writer = Writer(JobIds("b.r."), "r", metadata={}, on_break="restart")
    lines = [line("small"), line("large", content="x" * 9500)]
    intake = await read(Source(lines), max_job_bytes=10_000, writer=writer)

    assert (written, intake.faulty) == (["large"], 0)


async def test_models_are_counted_up_to_a_hundred() -> None:
    """A file with a model per line must not fill the memory; those that are known are counted on."""
    lines = [line(f"c{number}", model=f"m{number % 120}") for number in range(240)]
    intake = await read(Source(lines, 10_000))

    assert len(intake.models) == 100
    assert set(intake.models.values()) == {2}


async def test_other_tasks_run_while_a_long_input_is_read() -> None:
    """Every hundred lines at least."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await read(Source([line(f"c{number}") for number in range(1000)], 1 << 20))
    counting.cancel()

    assert turns >= 10
