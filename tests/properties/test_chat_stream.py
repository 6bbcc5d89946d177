"""The chunks of the OpenAI-compatible endpoint say what the job's events say, and end as the job ended."""

from __future__ import annotations

import json
import warnings
from typing import Any

import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.model import Status
from tests.chats import (
    Chunks,
    chunks_of,
    completion,
    frames,
    played_by,
    read_by_openai,
    records_of,
    started,
    text,
)
from tests.properties.strategies import CHAT_STREAMS
from tests.properties.test_completion import answer_to, body_of, models
from tests.streams import Played, data, play

STREAMS = CHAT_STREAMS | models().map(lambda model: body_of(answer_to(model)))
PLACES = st.sampled_from(["chunk", "finish"])
MERGES = st.lists(st.booleans(), min_size=1, max_size=6)


def choices_of(records: list[bytes]) -> Any:
    """Return the choices that events add up to; None if there are none."""
    whole = completion(records)
    return json.loads(whole.body)["choices"] if whole.body else None


def has_shown(played: Played) -> bool:
    """Whether a reader of the stream has got more than roles and empty deltas."""
    return any(
        event.choice is not None
        and (
            event.finish_reason is not None
            or any(v not in (None, "", [], {}) for name, v in event.delta.items() if name != "role")
        )
        for event in played.deltas
    )


@given(STREAMS, st.booleans(), PLACES, MERGES)
def test_stream_adds_up_to_the_completion_of_its_events(
    upstream: bytes, include_usage: bool, place: Any, merge: list[bool]
) -> None:
    """Another worker that reads the stream makes the same choices of it, whether text was merged or not."""
    played = play(upstream)
    records = records_of(played)
    body = frames(records, merge=merge, include_usage=include_usage, usage_place=place)
    if played.end.status is not Status.COMPLETED or not choices_of(records):
        return
    reread = choices_of(records_of(play(body)))

    assert reread == choices_of(records)


@given(STREAMS, st.booleans(), PLACES, MERGES)
def test_stream_ends_in_done_or_in_an_error_as_the_job_ended(
    upstream: bytes, include_usage: bool, place: Any, merge: list[bool]
) -> None:
    """Never both, and never neither; the error has the code and the words of the terminal event."""
    end = (played := play(upstream)).end
    read = played_by(records_of(played), merge=merge, include_usage=include_usage, usage_place=place)

    assert read.is_done == (end.status is Status.COMPLETED)
    assert (read.error is None) == read.is_done
    if read.error is not None:
        assert end.error is not None
        assert (read.error["code"], read.error["message"]) == (end.error.code, end.error.message)


@given(STREAMS, PLACES)
def test_stream_raises_in_openai_python_if_and_only_if_the_job_did_not_complete(
    upstream: bytes, place: Any
) -> None:
    """All chunks come before the error."""
    played = play(upstream)
    body = frames(records_of(played), include_usage=True, usage_place=place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic warns about members of types that OpenAI does not know
        if played.end.status is Status.COMPLETED:
            assert len(read_by_openai(body)) == len(chunks_of(body).chunks)
        else:
            with pytest.raises(openai.APIError) as raised:
                read_by_openai(body)
            assert played.end.error is not None
            assert raised.value.code == played.end.error.code


@given(STREAMS, st.booleans())
def test_every_chunk_has_a_choice_where_usage_is_on_the_finish_chunk(
    upstream: bytes, include_usage: bool
) -> None:
    """So readers that take `choices[0]` of every chunk work; the usage is on the last chunk, and on no other."""
    played = play(upstream)
    read = played_by(records_of(played), include_usage=include_usage, usage_place="finish")

    assert all(len(chunk["choices"]) == 1 for chunk in read.chunks)
    with_usage = [at for at, chunk in enumerate(read.chunks) if "usage" in chunk]
    if include_usage and read.is_done:
        assert with_usage == [len(read.chunks) - 1]
    else:
        assert with_usage in ([], [len(read.chunks) - 1])
    if with_usage:
        assert read.chunks[-1]["usage"] == msgspec.to_builtins(played.end.usage)


@given(STREAMS)
def test_usage_chunk_is_the_last_one_and_has_no_choices(upstream: bytes) -> None:
    """All chunks before it have `usage: null`, as OpenAI's have."""
    played = play(upstream)
    read = played_by(records_of(played), include_usage=True)

    if read.is_done:
        *before, last = read.chunks
        assert last["choices"] == []
        assert last["usage"] == msgspec.to_builtins(played.end.usage)
        assert last["streamworker"]["usage_source"] == played.end.usage_source.value
        assert all(chunk["usage"] is None for chunk in before)


@given(st.lists(STREAMS, min_size=1, max_size=3), STREAMS, PLACES)
def test_new_attempt_is_seen_only_where_text_was_sent(former: list[bytes], last: bytes, place: Any) -> None:
    """Else the stream is that of the last attempt alone, and no role comes twice."""
    broken = [play(upstream) for upstream in former]
    records = [
        record
        for number, played in enumerate(broken)
        for record in records_of(played, f"a-{number}")[:-1]  # its terminal event was never written
    ]
    played = play(last)
    read = played_by([*records, *records_of(played, "last")], usage_place=place)

    if any(has_shown(one) for one in broken):
        assert read.error is not None
        assert read.error["code"] == "attempt_superseded"
        assert not read.is_done
    else:
        alone = played_by(records_of(played, "last"), usage_place=place)
        assert contents(read) == contents(alone)
        assert read.error == alone.error
        assert finish_reasons(read) == finish_reasons(alone)
        before = sum(event.delta.get("role") is not None for one in broken for event in one.deltas)
        if not before:
            assert roles(read) == roles(alone)


def finish_reasons(read: Chunks) -> list[tuple[int, str]]:
    """Return the finish reasons in their order."""
    return [
        (choice["index"], choice["finish_reason"])
        for chunk in read.chunks
        for choice in chunk["choices"]
        if choice["finish_reason"] is not None
    ]


def contents(read: Chunks) -> list[Any]:
    """Return what was generated, in its order."""
    return [
        content
        for chunk in read.chunks
        for choice in chunk["choices"]
        if (content := choice["delta"].get("content"))
    ]


def roles(read: Chunks) -> int:
    """Return the number of deltas with a role."""
    return sum("role" in choice["delta"] for chunk in read.chunks for choice in chunk["choices"])


@given(STREAMS)
def test_completion_has_the_choices_of_the_stream(upstream: bytes) -> None:
    """Without `stream` the answer has the same choices, and the usage of the terminal event as it is."""
    played = play(upstream)
    records = records_of(played)
    whole = completion(records)

    assert whole.is_over
    if played.end.status is not Status.COMPLETED:
        assert whole.failure is not None
        assert played.end.error is not None
        assert whole.failure.code == played.end.error.code
        assert whole.body == b""
    elif whole.failure is None:
        made = json.loads(whole.body)
        assert made["usage"] == msgspec.to_builtins(played.end.usage)
        assert made["object"] == "chat.completion"


@given(st.lists(st.text(), min_size=1, max_size=40), MERGES)
def test_merged_text_is_the_same_text_in_fewer_chunks(texts: list[str], merge: list[bool]) -> None:
    """Byte for byte, in any pattern of merging."""
    played = play(data(*({"choices": [{"index": 0, "delta": {"content": one}}]} for one in texts), b"[DONE]"))
    records = records_of(played)
    read = played_by(records, merge=merge)

    assert read.text == played.text()
    assert len(read.chunks) <= len(played.deltas)


@given(st.integers(1, 2000), st.integers(1, 400))
def test_merged_chunk_is_bounded(count: int, size: int) -> None:
    """However far a reader is behind, one chunk holds at most 64 KiB of text."""
    records = [started(), *(text("x" * size) for _ in range(count))]
    body = frames([*records, json.dumps({"type": "usage", "status": "completed"}).encode()], merge=[True])

    assert len(chunks_of(body).text) == count * size
    assert max(len(block) for block in body.split(b"\n\n")) < (1 << 16) + 400
