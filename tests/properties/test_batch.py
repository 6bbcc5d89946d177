"""Rules of the batch modules that decide, for any input."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from streamworker.batch.accounting import Accounts
from streamworker.batch.files import LocalOutput
from streamworker.batch.identity import JobIds, JobRef, digest_of
from streamworker.batch.index import LineIndex, State
from streamworker.batch.lines import Fault, LineSplitter, Request, read_line
from streamworker.batch.output import EndedJob, error_line, output_line
from streamworker.batch.plan import NotABatchLine, read_prior
from streamworker.batch.progress import Progress
from streamworker.batch.window import MAX_CHUNK_JOBS, Window
from tests.properties.strategies import pieces_of

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.dictionaries(st.text(), JSON, max_size=4).map(
    lambda extra: {**extra, "model": "m", "messages": [{"role": "user"}], "stream": False}
)
DIGESTS = st.integers(0, 40).map(lambda number: number.to_bytes(16, "big"))


def read_all(chunks: list[bytes]) -> list[Any]:
    splitter = LineSplitter()
    lines = [line for chunk in chunks for line in splitter.feed(chunk)]
    return [*lines, *splitter.finish()]


@given(
    st.binary(max_size=200) | st.lists(st.binary(max_size=20)).map(b"\n".join), st.lists(st.integers(0, 300))
)
def test_lines_do_not_depend_on_the_chunks(text: bytes, cuts: list[int]) -> None:
    """However the file is read, the lines are those between its LFs, without the blank ones."""
    whole = read_all([text])

    assert read_all(pieces_of(text, cuts)) == whole
    body = text.removeprefix(b"\xef\xbb\xbf")
    assert [line.text for line in whole] == [line for line in body.split(b"\n") if line.strip(b" \t\r")]
    assert all(text[line.offset : line.offset + line.length] == line.text for line in whole)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_a_request_or_a_fault(text: bytes) -> None:
    """Nothing raises, and a fault has a message."""
    read = read_line(text)

    assert isinstance(read, Request | Fault)
    assert isinstance(read, Request) or read.message


@given(st.text(min_size=1, max_size=100), BODIES, st.randoms())
def test_digest_does_not_depend_on_order_or_spaces(custom_id: str, body: dict[str, Any], random: Any) -> None:
    """A file that another program has written anew has the same jobs."""

    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            names = list(value)
            random.shuffle(names)
            return {name: shuffled(value[name]) for name in names}
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    line = {"custom_id": custom_id, "body": body}
    one = read_line(json.dumps(line).encode())
    other = read_line(
        json.dumps(shuffled(line), indent=1, ensure_ascii=False).replace("\n", " ").encode("utf-8", "replace")
    )

    assert isinstance(one, Request)
    assert isinstance(other, Request)
    assert one.digest == other.digest == digest_of(one.custom_id, json.loads(one.body))


@given(st.lists(st.tuples(DIGESTS, st.text(max_size=2)), max_size=200), st.data())
def test_index_equals_a_dictionary(lines: list[tuple[bytes, str]], data: st.DataObject) -> None:
    """Lookups by digest and by custom id, and the counts of states."""
    index, digests = LineIndex(), dict[bytes, int]()
    states: list[State] = []
    names: dict[str, set[int]] = {}
    for digest, name in lines:
        if digest not in digests:
            digests[digest] = index.add(digest, name, (1, 2, 3))
            states.append(State.PENDING)
            names.setdefault(name, set()).add(digests[digest])
    for line in range(len(states)):
        states[line] = data.draw(st.sampled_from(State))
        index.set_state(line, states[line])

    for number in range(41):
        assert index.find(number.to_bytes(16, "big")) == digests.get(number.to_bytes(16, "big"))
    for _, name in lines:
        assert set(index.named(name)) == names.get(name, set())
    assert index.counts == [Counter(states)[state] for state in State]
    assert index.ended == sum(state in {State.COMPLETED, State.FAILED} for state in states)


@given(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 250),
    st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True),
)
def test_job_ids_are_read_by_their_own_run_only(digest: bytes, round_: int, run: str) -> None:
    """Whatever the names of runs are."""
    key = JobIds(f"b.{run}.").job_id(digest, round_).encode()

    assert JobIds(f"b.{run}.").read(key) == JobRef(digest, round_)
    assert JobIds(f"b.{run}x.").read(key) is None
    assert JobIds(f"b.{run[:-1]}.").read(key) is None or run.endswith(".")


@given(
    st.text(max_size=30),
    JSON,
    st.sampled_from(["completed", "failed", "interrupted", "expired", "cancelled"]),
    JSON,
)
def test_output_lines_are_one_line_for_every_reader(
    custom_id: str, completion: Any, status: str, error: Any
) -> None:
    """They are JSON, they have one line end, and they are read back as what they are."""
    text = json.dumps(completion, ensure_ascii=False).encode("utf-8", "replace")
    job = EndedJob(
        job_id="j",
        attempt="a",
        status=status,
        usage_source="none",
        error=error if isinstance(error, dict) else None,
        completion=msgspec.Raw(text),
    )
    line = (
        output_line(bytes(16), custom_id, job)
        if status == "completed"
        else error_line(bytes(16), custom_id, job)[0]
    )

    assert len(line.decode().splitlines()) == 1
    assert line.endswith(b"\n")
    prior = read_prior(line)
    assert (prior.digest, prior.is_error) == (bytes(16), status != "completed")
    assert json.loads(line)["custom_id"] == custom_id.encode("utf-8", "replace").decode()


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_text_is_a_prior_line_or_is_refused(text: bytes) -> None:
    """A file with other lines is not overwritten."""
    try:
        prior = read_prior(text)
    except NotABatchLine:
        return
    assert isinstance(json.loads(text), dict)
    assert prior.code


@given(st.integers(1, 5000), st.integers(0, 6000))
def test_window_never_exceeds_its_size_and_never_stops(size: int, in_flight: int) -> None:
    """Room is at most what is free and a chunk, and there is some when nothing is in flight."""
    room = Window(size).room(in_flight)

    assert 0 <= room <= MAX_CHUNK_JOBS
    assert room == 0 or in_flight + room <= size
    assert Window(size).room(0) >= 1


@given(
    st.lists(
        st.tuples(
            JSON | st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens", "cost"]), JSON),
            st.text(),
        )
    )
)
def test_accounts_take_any_usage(usages: list[tuple[Any, str]]) -> None:
    """One odd line never spoils the sums: every line is counted, and no sum is negative."""
    accounts = Accounts()
    for usage, source in usages:
        accounts.add_completed(usage, source)
        accounts.add_failed("code", usage, source)

    assert accounts.completed == accounts.failed == accounts.codes["code"] == len(usages)
    assert min(accounts.tokens.input, accounts.tokens.output, accounts.reported_cost, accounts.unknown) >= 0
    assert accounts.unknown <= 2 * len(usages)


@given(st.lists(st.floats(0, 30), max_size=50), st.integers(0, 100))
def test_progress_is_finite(steps: list[float], total: int) -> None:
    """At any time, for any series of endings."""
    now = 0.0
    progress = Progress(now)
    for step in steps:
        now += step
        progress.ended(now, 5)
        done = min(total, 3)
        shown = progress.snapshot(now, total=total, completed=done, failed=0, in_flight=1, oldest=("c", 0.0))
        assert shown.lines_per_s >= 0
        assert shown.bar_text()
        assert shown.plain_text()
        assert json.dumps(shown.as_object())


LINE = st.integers(0, 99).map(
    lambda number: f'{{"id":"x{number}","custom_id":"c{number}","error":{{"code":"e"}}}}\n'.encode()
)


@settings(max_examples=40)
@given(st.lists(LINE, max_size=6), st.integers(0, 500), st.lists(LINE, max_size=3))
def test_file_that_ends_anywhere_continues_after_its_last_whole_line(
    before: list[bytes], cut: int, after: list[bytes]
) -> None:
    """A torn last line is removed, and whole lines are never changed."""
    text = b"".join(before)[:cut]
    whole = text[: text.rfind(b"\n") + 1]

    async def append(path: Path) -> list[str | None]:
        output = LocalOutput(path, path)
        output.lock()
        found = [entry.line.custom_id async for entry in output.prior()]
        await output.begin(anew=False)
        for line in after:
            output.write(line, is_error=False)
        await output.sync()
        await output.close()
        return found

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "out.jsonl"
        part = Path(directory) / "out.jsonl.part"
        part.write_bytes(text)
        found = asyncio.run(append(path))
        written = part.read_bytes() if part.exists() else b""

    assert written == whole + b"".join(after)
    assert len(found) == whole.count(b"\n")
