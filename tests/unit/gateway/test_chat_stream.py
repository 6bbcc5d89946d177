"""Events of a job as the chunks of an OpenAI stream."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from streamworker.gateway.chat_stream import PING, ChatStream
from streamworker.gateway.errors import ApiError
from tests.chats import JOB, NOW, chunks_of, delta, encoded, ended, failed, frames, played_by, started, text

SEED = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "apertus-70b-instruct"}


def chunk(*choices: dict[str, Any], **members: Any) -> dict[str, Any]:
    """Return a chunk of an upstream that named nothing."""
    head = {"id": f"chatcmpl-{JOB}", "object": "chat.completion.chunk", "created": NOW // 1000, "model": "m"}
    return head | {"choices": list(choices)} | members


def choice(members: dict[str, Any], index: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"index": index, "delta": members, "finish_reason": finish} | more


# Chunks


def test_chunk_without_members_of_an_upstream_is_named_after_job_and_attempt() -> None:
    """`id` after the job, `created` and `model` from `started`."""
    read = played_by([started(), text("Ciao"), ended()])

    assert read.chunks == [chunk(choice({"content": "Ciao"}))]
    assert read.is_done


def test_chunk_has_the_members_that_its_upstream_gave() -> None:
    """They hold until an event brings other ones, each of which replaces all."""
    first = SEED | {"created": 7, "system_fingerprint": "fp", "service_tier": "flex"}
    records = [
        started(),
        text("a", chunk=first),
        text("b"),
        text("c", chunk={"id": "other", "created": 8.0, "model": "n"}),
    ]
    heads = [{n: v for n, v in c.items() if n != "choices"} for c in played_by([*records, ended()]).chunks]

    assert heads[0] == heads[1] == first
    assert heads[2] == {"id": "other", "object": "chat.completion.chunk", "created": 8, "model": "n"}


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"id": "", "model": "", "created": 0, "object": ""},
        {"id": None, "model": None, "created": None},
        {"id": 5, "model": ["m"], "created": "now"},
        {"created": -1},
        {"created": 1e30},
        {"created": True},
    ],
)
def test_members_that_are_not_usable_are_replaced(members: dict[str, Any]) -> None:
    """Empty, null, or of another type: OpenAI's clients expect strings and a number."""
    read = played_by([started(), text("a", chunk=members), ended()])

    assert read.chunks == [chunk(choice({"content": "a"}))]


def test_delta_is_sent_byte_for_byte() -> None:
    """Numbers of any size, escapes and members that are not known are not decoded."""
    raw = b'{"content":"\\u00e9\\u2028","n":123456789012345678901234567890,"f":1.0e2,"x":{"y":[null]}}'
    record = b'{"type":"delta","seq":1,"choice":0,"delta":' + raw + b',"finish_reason":null}'

    assert raw in frames([started(), record])


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_line_end_between_members_does_not_end_the_event(end: str) -> None:
    """An event written by another program may be indented."""
    record = f'{{"type":"delta","choice":0,"delta":{{{end}"content": "a"}},"finish_reason":null}}'.encode()

    assert played_by([started(), record, ended()]).chunks == [chunk(choice({"content": "a"}))]


def test_log_probabilities_and_finish_reason_stand_beside_the_delta() -> None:
    """As the upstream sent them."""
    logprobs = {"content": [{"token": "a", "logprob": -0.5}]}
    read = played_by([started(), delta({}, logprobs=logprobs, finish_reason="len\ngth"), ended()])

    assert read.chunks == [chunk(choice({}, finish="len\ngth", logprobs=logprobs))]


def test_unknown_members_return_to_the_chunk_or_to_the_choice() -> None:
    """Those that are known to be the chunk's are put there; any other one beside the delta."""
    read = played_by([started(), text("a", extra={"x_groq": {"id": 1}, "matched_stop": 2}), ended()])

    assert read.chunks == [chunk(choice({"content": "a"}, matched_stop=2), x_groq={"id": 1})]


def test_unknown_members_never_replace_known_ones() -> None:
    """An upstream that is a gateway itself sends `streamworker`, for example."""
    extra = {
        "streamworker": {"job_id": "other"},
        "usage": {},
        "choices": [],
        "id": "x",
        "delta": {},
        "index": 9,
    }
    read = played_by(
        [started(), text("a", extra=extra), delta(choice=None, extra={"id": "x"}), ended()],
        include_usage=True,
    )

    assert read.chunks[0] == chunk(choice({"content": "a"}), usage=None)
    assert read.chunks[-1]["streamworker"]["job_id"] == JOB
    assert len(read.chunks) == 2


def test_chunk_without_choices_is_restored() -> None:
    """Azure's first chunk, for example. It is not a first delta."""
    filters = {"prompt_filter_results": [1]}
    stream = ChatStream(JOB)
    stream.started(started())
    body = stream.delta(delta(choice=None, extra=filters, chunk={"id": "c"}))

    assert not stream.has_delta
    assert chunks_of(body).chunks == [chunk(id="c", **filters)]


def test_event_without_choice_and_members_is_not_a_chunk() -> None:
    """Readers would get a chunk that says nothing."""
    assert frames([started(), delta(choice=None)]) == b""


def test_keep_alive_is_a_comment() -> None:
    """A blank line behind it is what proxies flush on; openai-python ignores it without an `id` before."""
    assert PING == b": ping\n\n"


# Usage


MEMBER = {"job_id": JOB, "usage_source": "upstream", "status": "completed"}
USAGE = {"prompt_tokens": 15, "completion_tokens": 2}


def test_usage_is_a_chunk_of_its_own_if_it_is_asked_for() -> None:
    """As OpenAI's: behind the last delta, without choices; null in every other chunk."""
    records = [started(), text("a"), delta(finish_reason="stop"), ended()]
    read = played_by(records, include_usage=True)

    assert read.chunks == [
        chunk(choice({"content": "a"}), usage=None),
        chunk(choice({}, finish="stop"), usage=None),
        chunk(usage=USAGE, streamworker=MEMBER),
    ]
    assert all("usage" not in chunk for chunk in played_by(records).chunks)


def test_usage_that_is_not_known_is_null() -> None:
    """It is never written as zero."""
    read = played_by([started(), text("a"), ended(usage=None, usage_source="none")], include_usage=True)

    assert read.chunks[-1]["usage"] is None
    assert read.chunks[-1]["streamworker"]["usage_source"] == "none"


def test_usage_keeps_numbers_of_any_size() -> None:
    """It is the terminal event's, as it is."""
    usage = {"completion_tokens": 10**30, "details": {"x": [1.5, None]}}

    assert played_by([started(), ended(usage=usage)], include_usage=True).chunks[-1]["usage"] == usage


def finish_mode(*records: bytes) -> list[dict[str, Any]]:
    return played_by([started(), *records], include_usage=True, usage_place="finish").chunks


def test_usage_on_the_finish_chunk_waits_for_the_terminal_event() -> None:
    """The chunk with the last finish reason is held until the usage is known."""
    stream = ChatStream(JOB, include_usage=True, usage_place="finish")
    stream.started(started())
    assert stream.delta(text("a")) != b""
    assert stream.delta(delta({"content": "!"}, finish_reason="stop")) == b""
    body = stream.ended(ended())

    assert chunks_of(body).chunks == [
        chunk(choice({"content": "!"}, finish="stop"), usage=USAGE, streamworker=MEMBER)
    ]


def test_usage_is_on_the_last_of_several_finish_chunks() -> None:
    """A held chunk is sent when another one follows."""
    chunks = finish_mode(
        delta(finish_reason="stop"), text("b", choice=1), delta(choice=1, finish_reason="length"), ended()
    )

    assert [("usage" in c, c["choices"][0]["index"]) for c in chunks] == [(False, 0), (False, 1), (True, 1)]


def test_usage_has_a_chunk_with_an_empty_delta_where_no_finish_chunk_is_last() -> None:
    """So `choices[0]` of every chunk exists."""
    chunks = finish_mode(text("a", choice=2), ended())

    assert chunks[-1] == chunk(choice({}, index=2), usage=USAGE, streamworker=MEMBER)


def test_unknown_members_of_chunks_without_choices_go_to_the_next_chunk_in_finish_mode() -> None:
    """Of Azure's first chunk, and of llama.cpp's last one."""
    azure, llama = {"prompt_filter_results": [1]}, {"timings": {"n": 2}}
    first = delta(choice=None, extra=azure)
    last = delta(choice=None, extra=llama)
    chunks = finish_mode(first, text("a"), delta(finish_reason="stop"), last, ended())
    unasked = played_by([started(), first, text("a"), last, ended()], usage_place="finish").chunks

    assert chunks[0] == chunk(choice({"content": "a"}), **azure)
    assert chunks[-1] == chunk(choice({}, finish="stop"), usage=USAGE, streamworker=MEMBER, **llama)
    assert unasked == [chunk(choice({"content": "a"}), **azure), chunk(choice({}), **llama)]


# Ends


@pytest.mark.parametrize("place", ["chunk", "finish"])
def test_broken_stream_ends_in_usage_and_error(place: Any) -> None:
    """What was generated is paid for, so its usage is sent. `[DONE]` is not."""
    end = failed("truncated", "interrupted", usage={"completion_tokens": 3}, usage_source="estimated")
    read = played_by([started(), text("a"), end], include_usage=True, usage_place=place)

    assert read.chunks[-1]["usage"] == {"completion_tokens": 3}
    assert read.chunks[-1]["streamworker"] == MEMBER | {"usage_source": "estimated", "status": "interrupted"}
    assert read.error == {
        "message": "about truncated",
        "type": "upstream_error",
        "param": None,
        "code": "truncated",
        "retriable": True,
        "job_id": JOB,
    }
    assert not read.is_done


def test_held_finish_chunk_is_sent_before_an_error() -> None:
    """What the upstream said is not lost because its end failed."""
    records = [started(), delta({"content": "a"}, finish_reason="stop"), failed("truncated", "interrupted")]
    read = played_by(records, include_usage=True, usage_place="finish")

    assert read.text == "a"
    assert read.error is not None


def test_job_that_failed_before_text_ends_in_an_error_alone() -> None:
    """No usage was reported for it."""
    read = played_by([started(), delta({"role": "assistant"}), failed("rate_limited")], include_usage=True)

    assert len(read.chunks) == 1
    assert read.error is not None


def test_rejected_job_ends_in_an_error_without_started() -> None:
    """A rejection is the only event of its attempt."""
    read = played_by([failed("invalid_job", "rejected")])

    assert read.chunks == []
    assert read.error is not None
    assert read.error["code"] == "invalid_job"


def test_failure_of_the_gateway_releases_what_is_held() -> None:
    """A chunk that waits for its usage, and text that waits to be merged."""
    stream = ChatStream(JOB, include_usage=True, usage_place="finish")
    stream.started(started())
    stream.delta(delta({"content": "a"}, finish_reason="stop"))
    stream.delta(text("b"), merge=True)
    read = chunks_of(stream.fail(ApiError(503, "broker_unavailable", "m")))

    assert read.text == "ab"
    assert read.error == {
        "message": "m",
        "type": "server_error",
        "param": None,
        "code": "broker_unavailable",
        "retriable": True,
        "job_id": JOB,
    }
    assert stream.is_over


# New attempts


def test_new_attempt_after_text_is_an_error() -> None:
    """The text that was sent is void, and cannot be taken back."""
    read = played_by([started("a"), text("one"), started("b"), text("two"), ended()])

    assert read.text == "one"
    assert read.error is not None
    assert (read.error["code"], read.error["retriable"]) == ("attempt_superseded", True)


INVISIBLE = [
    delta({"role": "assistant"}),
    delta({"role": "assistant", "content": ""}),
    delta({"content": None, "tool_calls": []}),
    delta({}),
    delta(choice=None, extra={"x_groq": 1}),
]
VISIBLE = [
    text("a"),
    delta({"reasoning": "a"}),
    delta({"refusal": "a"}),
    delta({"tool_calls": [{"index": 0}]}),
    delta({"content": [{"type": "text", "text": "a"}]}),
    delta({}, finish_reason="stop"),
    text("b", choice=1),
]


@pytest.mark.parametrize("record", INVISIBLE)
def test_new_attempt_before_text_is_not_seen(record: bytes) -> None:
    """Roles and empty deltas show nothing."""
    read = played_by([started("a"), record, started("b"), text("two"), ended()])

    assert (read.text, read.error, read.is_done) == ("two", None, True)


@pytest.mark.parametrize("record", VISIBLE)
def test_new_attempt_is_seen_after_anything_that_was_generated(record: bytes) -> None:
    """Text, reasoning, refusals, calls, and finish reasons."""
    assert played_by([started("a"), record, started("b"), ended()]).error is not None


def test_role_is_not_sent_again_by_a_new_attempt() -> None:
    """Readers that add deltas up would have `assistantassistant`. Other choices get theirs."""
    role = {"role": "assistant"}
    records = [started("a"), delta(role), started("b"), delta(role | {"content": ""}), delta(role, choice=1)]
    read = played_by([*records, text("a"), delta(role | {"content": "b"}), ended()])

    assert [c["choices"][0]["delta"] for c in read.chunks] == [
        role,
        {"content": ""},
        role,
        {"content": "a"},
        role | {"content": "b"},
    ]


def test_held_parts_of_a_void_attempt_are_dropped() -> None:
    """Nothing of them was sent yet."""
    stream = ChatStream(JOB, include_usage=True, usage_place="finish")
    stream.started(started("a"))
    stream.delta(text("void"), merge=True)
    stream.delta(delta(choice=None, extra={"x_groq": 1}))
    body = stream.started(started("b", model="n")) + stream.delta(text("valid")) + stream.ended(ended())
    read = chunks_of(body)

    assert read.text == "valid"
    assert {c["model"] for c in read.chunks} == {"n"}
    assert not any("x_groq" in c for c in read.chunks)


# Merging


def merged(*records: bytes) -> list[dict[str, Any]]:
    return played_by([started(), *records, ended()], merge=[True]).chunks


def test_text_of_one_choice_is_merged() -> None:
    """Deltas that differ in their text alone become one chunk."""
    assert merged(text("a"), text("b"), text("é\n🐟")) == [chunk(choice({"content": "abé\n🐟"}))]


@pytest.mark.parametrize(
    "between",
    [
        text("x", choice=1),
        delta({"reasoning": "x"}),
        delta({"role": "assistant"}),
        delta({"tool_calls": []}),
        delta(finish_reason="stop"),
        text("x", chunk={"id": "new"}),
        text("x", extra={"y": 1}),
        text("x", logprobs={}),
        delta(choice=None, extra={"x_groq": 1}),
    ],
)
def test_any_other_delta_keeps_its_place_between_merged_texts(between: bytes) -> None:
    """The order is the upstream's."""
    chunks = merged(text("a"), text("b"), between, text("c"), text("d"))

    assert len(chunks) == 3
    assert chunks[0]["choices"][0]["delta"] == {"content": "ab"}
    assert chunks[2]["choices"][0]["delta"] == {"content": "cd"}


def test_delta_that_is_not_to_be_merged_releases_held_text_first() -> None:
    """A reader that has caught up gets chunk by chunk again."""
    stream = ChatStream(JOB)
    stream.started(started())
    assert stream.delta(text("a"), merge=True) == b""

    assert chunks_of(stream.delta(text("b"))).text == "ab"


def test_flush_without_held_text_is_empty() -> None:
    """It is called after each batch."""
    assert ChatStream(JOB).flush() == b""


# Bad events


@pytest.mark.parametrize("record", [b"", b"null", b"[]", b'{"choice":0}', b'{"choice":"0","delta":{}}'])
def test_record_that_is_not_a_delta_raises(record: bytes) -> None:
    """The caller ends the stream with an error; no text is left out in silence."""
    stream = ChatStream(JOB)
    with pytest.raises(msgspec.MsgspecError):
        stream.delta(record)


def test_terminal_event_of_a_later_version_is_an_error_if_it_did_not_complete() -> None:
    """Statuses and codes that are not known are passed on."""
    read = played_by([started(), encoded({"type": "usage", "status": "paused"})])

    assert read.error is not None
    assert (read.error["code"], read.error["type"]) == ("paused", "upstream_error")
    assert json.dumps(read.error).count("paused") == 2
