"""Earlier output: which lines stay, which run again, and what the accounts have of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.batch.accounting import Accounts
from streamworker.batch.identity import digest_of, output_id
from streamworker.batch.index import LineIndex, State
from streamworker.batch.lines import FaultCode
from streamworker.batch.plan import NotABatchLine, Verdict, judge, read_prior
from streamworker.batch.ports import PriorEntry
from streamworker.batch.restore import SHOWN_CHANGED, Restore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROUND = 3


def digest(name: str) -> bytes:
    """Return the digest of a line with this custom id."""
    return digest_of(name, {})


def prior(
    name: str | None, *, code: str | None = None, body: Any = None, of: str | None = None, **members: Any
) -> bytes:
    """Return an output line, or with a code an error line. `of` is the line whose digest it has."""
    line: dict[str, Any] = {"id": output_id(digest(of or name or "")), "custom_id": name}
    if code is None:
        line |= {"response": {"status_code": 200, "body": body or {}}, "error": None}
    else:
        line |= {"response": None, "error": {"code": code, "message": "m"} | members.pop("error", {})}
    return json.dumps(line | members).encode()


class Case:
    """An input of three lines, of which the last one is faulty, and what was read of earlier files."""

    def __init__(self, **options: Any) -> None:
        self.index = LineIndex()
        for number, name in enumerate(("a", "b")):
            self.index.add(digest(name), name, (number + 1, 0, 1))
        self.index.add(digest("f"), "f", (3, 0, 1), State.FAULTY, FaultCode.INVALID_URL)
        self.accounts = Accounts()
        defaults: dict[str, Any] = {"changed": "keep", "retry": None, "round_": ROUND}
        self.restore = Restore(self.index, self.accounts, **defaults | options)
        self.entries: list[PriorEntry] = []

    async def prior(self) -> AsyncIterator[PriorEntry]:
        """Yield the entries, as the output does."""
        for entry in self.entries:
            yield entry

    async def run(self, *lines: bytes | tuple[bytes, bool]) -> Case:
        """Read lines; outputs are in file 0, errors in file 1. A pair says whether the line is being run again."""
        for offset, line in enumerate(lines):
            text, is_retried = line if isinstance(line, tuple) else (line, False)
            read = read_prior(text)
            self.entries.append(PriorEntry(int(read.is_error), offset * 10, read, is_retried))
        await self.restore.run(self)  # type: ignore[arg-type]  # only `prior` is used
        return self

    def states(self) -> str:
        """Return the first letter of each line's state; `!` for a faulty line that is in no file."""
        states = map(self.index.state, range(len(self.index)))
        return "".join("!" if state is State.FAULTY else state.name[0] for state in states)

    def dropped(self) -> list[list[int]]:
        """Return the offsets that must be removed, by file."""
        return [list(self.restore.dropped[file]) for file in (0, 1)]


async def test_each_line_is_ended_by_its_first_entry() -> None:
    """A second one, of whichever file, is removed."""
    case = await Case().run(prior("a"), prior("b", code="x"), prior("a", code="x"), prior("b"), prior("a"))

    assert case.states() == "CF!"
    assert case.dropped() == [[30, 40], [20]]
    assert (case.accounts.completed, case.accounts.failed, case.restore.has_work) == (1, 1, True)


async def test_files_without_second_entries_need_no_work() -> None:
    """They stay byte for byte."""
    case = await Case().run(prior("a"), prior("b", code="x"))

    assert (case.dropped(), case.restore.has_work) == ([[], []], False)
    assert list(case.restore.retried_lines) == []


async def test_faulty_line_is_in_the_errors_already() -> None:
    """It is not written a second time."""
    case = await Case().run(prior("f", code="invalid_url"))

    assert case.index.state(2) is State.FAILED
    assert case.accounts.codes == {"invalid_url": 1}


@pytest.mark.parametrize(
    ("retry", "runs"),
    [(None, []), ("retriable", [0]), ("all", [0, 1])],
)
async def test_failed_lines_run_again_as_asked_for(retry: Any, runs: list[int]) -> None:
    """In a round of their own. A line that is faulty would be refused again, whatever is asked for."""
    case = await Case(retry=retry).run(
        prior("a", code="timeout_idle", error={"retriable": True}),
        prior("b", code="upstream_rejected"),
        prior("f", code="invalid_url", error={"retriable": True}),
    )

    assert list(case.restore.retried_lines) == runs
    assert [list(case.restore.retried[file]) for file in (0, 1)] == [[], [line * 10 for line in runs]]
    assert [case.index.round(line) for line in range(3)] == [ROUND * (line in runs) for line in range(3)]
    assert case.states() == "".join("P" if line in runs else "F" for line in range(3))
    assert (case.accounts.failed, case.restore.has_work) == (3 - len(runs), bool(runs))


async def test_completed_line_never_runs_again() -> None:
    """Also with `--retry-failed=all`."""
    case = await Case(retry="all").run(prior("a"))

    assert (case.states()[0], case.restore.has_work) == ("C", False)


async def test_line_of_an_unfinished_round_is_open_in_that_round() -> None:
    """Its job may be running. It is not counted, and its entry is not removed."""
    case = await Case().run((prior("a", code="x"), True), prior("b", code="x"))

    assert (case.restore.continued, case.index.round(0), case.states()) == (1, ROUND, "PF!")
    assert (case.dropped(), case.accounts.failed) == ([[], []], 1)


@pytest.mark.parametrize(
    ("entry", "states"),
    [
        (prior("z", code="x"), "PP!"),
        (prior("a", code="x", of="edited"), "PP!"),
    ],
    ids=["absent", "edited"],
)
async def test_line_of_an_unfinished_round_that_the_input_does_not_have_is_ignored(
    entry: bytes, states: str
) -> None:
    """An edited line has another job."""
    case = await Case().run((entry, True))

    assert (case.restore.continued, case.states()) == (0, states)
    assert [case.index.round(line) for line in range(2)] == [0, 0]
    assert case.restore.absent == 0


async def test_line_of_an_unfinished_round_that_has_ended_meanwhile_is_done() -> None:
    """The start before had written its new ending."""
    case = await Case().run(prior("a"), (prior("a", code="x"), True))

    assert (case.restore.continued, case.states()[0], case.index.round(0)) == (0, "C", 0)


@pytest.mark.parametrize(
    ("policy", "state", "changes", "dropped"),
    [("fail", "C", 1, []), ("keep", "C", 1, []), ("rerun", "P", 0, [0])],
)
async def test_edited_line_that_is_done_is_kept_or_runs(
    policy: Any, state: str, changes: int, dropped: list[int]
) -> None:
    """It is recognized by its custom id; the engine refuses it where the policy says so."""
    case = await Case(changed=policy).run(prior("a", of="edited"))

    assert (case.states()[0], case.restore.changes) == (state, changes)
    assert case.restore.changed == [1] * changes
    assert case.dropped() == [dropped, []]


async def test_edited_line_that_had_failed_runs_with_its_new_body() -> None:
    """Whatever the policy is: nothing that was paid for is lost."""
    case = await Case(changed="fail").run(prior("a", code="x", of="edited"))

    assert (case.states()[0], case.restore.changes, case.dropped()) == ("P", 0, [[], [0]])


async def test_first_edited_lines_are_named() -> None:
    """A message has a limited length; the rest is counted."""
    case = Case()
    names = [f"n{number}" for number in range(SHOWN_CHANGED + 5)]
    for number, name in enumerate(names):
        case.index.add(digest(name), name, (100 + number, 0, 1))
    await case.run(*(prior(name, of="edited" + name) for name in names))

    assert case.restore.changes == SHOWN_CHANGED + 5
    assert case.restore.changed == list(range(100, 100 + SHOWN_CHANGED))


async def test_entry_that_the_input_does_not_have_stays() -> None:
    """Files may be merged: it is counted, and neither removed nor added to the accounts."""
    case = await Case().run(prior("z"), prior(None, code="invalid_json_line", of="z"))

    assert (case.restore.absent, case.dropped(), case.restore.has_work) == (2, [[], []], False)
    assert (case.accounts.completed, case.accounts.failed) == (0, 0)


@pytest.mark.parametrize(
    ("line", "tokens", "estimated", "unknown"),
    [
        (prior("a", body={"usage": {"prompt_tokens": 3, "completion_tokens": 4}}), 7, 0, 0),
        (prior("a", body={"usage": None}), 0, 0, 1),
        (prior("a", body={}), 0, 0, 1),
        (prior("a", body={"usage": "?"}), 0, 0, 1),
        (prior("a", code="x", usage={"completion_tokens": 2}, usage_source="estimated"), 2, 1, 0),
        (prior("a", code="x", usage={"completion_tokens": 2}), 2, 0, 0),
        (prior("a", code="x", usage=None, usage_source="none"), 0, 0, 0),
        (prior("a", code="x"), 0, 0, 0),
    ],
)
async def test_accounts_have_the_usage_of_earlier_lines(
    line: bytes, tokens: int, estimated: int, unknown: int
) -> None:
    """By its source. What is not known counts as unknown where something ran, and never as zero."""
    accounts = (await Case().run(line)).accounts

    assert (accounts.tokens.total, accounts.estimated, accounts.unknown) == (tokens, estimated, unknown)


# Lines of other programs


@pytest.mark.parametrize(
    ("status", "is_error", "retriable"),
    [
        (199, True, False), (200, False, False), (299, False, False), (300, True, False), (400, True, False),
        (404, True, False), (408, True, True), (409, True, True), (429, True, True), (500, True, True),
        (501, True, False), (502, True, True), (503, True, True), (504, True, True), (None, True, False),
    ],
)  # fmt: skip
def test_http_status_says_whether_a_line_has_failed(
    status: int | None, *, is_error: bool, retriable: bool
) -> None:
    """In files without a member `retriable`."""
    response: dict[str, Any] = {"status_code": status, "body": {}}
    line = {"id": "x", "custom_id": "c", "response": response, "error": None}
    read = read_prior(json.dumps(line).encode())

    assert (read.is_error, read.retriable or not read.is_error) == (is_error, retriable or not is_error)


@pytest.mark.parametrize("code", ["batch_expired", "batch_cancelled"])
def test_end_of_a_batch_is_retriable(code: str) -> None:
    """The request itself was not refused, whatever the line says."""
    assert read_prior(prior("a", code=code, error={"retriable": False})).retriable


@pytest.mark.parametrize("code", [None, "", 0])
def test_error_without_a_code_is_unknown(code: Any) -> None:
    """It is still an error."""
    read = read_prior(prior("a", code="x", error={"code": code}))

    assert (read.is_error, read.code) == (True, "unknown")


@pytest.mark.parametrize("text", [b"[" * 3000, b'{"id":"x"}', b'{"id":"x","custom_id":"a","line":"1"}'])
def test_line_that_is_not_of_a_batch_is_refused(text: bytes) -> None:
    """Nested too deep, without a custom id, or with another type."""
    with pytest.raises(NotABatchLine):
        read_prior(text)


def test_line_without_a_custom_id_belongs_to_its_digest_only() -> None:
    """A faulty line may have none, and two of those are not the same line."""
    index = LineIndex()
    index.add(digest("x"), None, (1, 0, 1), State.FAULTY, FaultCode.INVALID_JSON_LINE)

    assert judge(read_prior(prior(None, code="c", of="x")), index) == (Verdict.DONE, 0)
    assert judge(read_prior(prior(None, code="c", of="y")), index) == (Verdict.ABSENT, -1)
