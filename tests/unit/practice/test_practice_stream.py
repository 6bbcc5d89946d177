"""The bytes of each option of a stream."""

import asyncio
from typing import Any

import orjson
import pytest

from streamworker.practice import PracticeUpstream, expected_text, expected_usage
from tests.unit.practice.practice_client import MESSAGES, answer, connected, contents, ended, payloads

HEAD = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"apertus-70b-instruct","choices":['
USAGE = b'"usage":{"prompt_tokens":15,"completion_tokens":2}}'
SEED = (
    HEAD + b'{"index":0,"delta":{"role":"assistant"}}]}',
    HEAD + b'{"index":0,"delta":{"content":"Ciao"}}]}',
    HEAD + b'{"index":0,"delta":{"content":"!"},"finish_reason":"stop"}],' + USAGE,
    b"data: [DONE]",
)
FIFTEEN_WORDS = [{"role": "user", "content": "one " * 15}]


@pytest.mark.parametrize(
    ("option", "ending"),
    [("", b"\n\n"), ("&format=unblanked", b"\n"), ("&format=crlf", b"\r\n\r\n"), ("&format=cr", b"\r\r")],
)
async def test_sample_of_the_seed_page_is_sent_byte_for_byte(
    practice: PracticeUpstream, option: str, ending: bytes
) -> None:
    chunks = await answer(practice, f"apertus-70b-instruct?text=Ciao!{option}", messages=FIFTEEN_WORDS)
    assert chunks == [line + ending for line in SEED]


async def test_default_stream_sends_the_expected_text_with_one_delta_per_write(
    practice: PracticeUpstream,
) -> None:
    chunks = await answer(practice, "practice?deltas=50")
    assert len(chunks) == 1 + 50 + 1
    parsed = payloads(b"".join(chunks))
    assert contents(parsed) == expected_text("practice?deltas=50", MESSAGES)
    assert parsed[-1]["usage"] == expected_usage("practice?deltas=50", MESSAGES)
    call = await ended(practice)
    assert (call.outcome, call.deltas_sent, call.status) == ("completed", 50, 200)
    assert call.content_sent == contents(parsed)
    assert call.usage_sent == parsed[-1]["usage"]
    assert call.started_at <= call.first_byte_at <= call.ended_at


@pytest.mark.parametrize("members", [{"model": "p?deltas=3&choices=2"}, {"model": "p?deltas=3", "n": 2}])
async def test_choices_are_interleaved_and_each_has_its_finish(
    practice: PracticeUpstream, members: dict[str, Any]
) -> None:
    parsed = payloads(b"".join(await answer(practice, **members)))
    assert [chunk["choices"][0]["index"] for chunk in parsed] == [0, 1] * 4
    assert contents(parsed, 2) == expected_text("p?deltas=3&choices=2", MESSAGES)
    assert [chunk["choices"][0].get("finish_reason") for chunk in parsed] == [None] * 6 + ["stop"] * 2
    assert [chunk.get("usage") is not None for chunk in parsed] == [False] * 7 + [True]


async def test_reasoning_comes_before_content_and_tool_calls_after(practice: PracticeUpstream) -> None:
    parsed = payloads(b"".join(await answer(practice, "p?deltas=1&reasoning=2&tool_calls=1")))
    keys = [next(iter(chunk["choices"][0]["delta"])) for chunk in parsed]
    assert keys == ["role"] + ["reasoning_content"] * 2 + ["content"] + ["tool_calls"] * 4
    assert parsed[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_stream_without_deltas_has_a_finish(practice: PracticeUpstream) -> None:
    parsed = payloads(b"".join(await answer(practice, "p?deltas=0&choices=2")))
    assert [chunk["choices"][0]["delta"] for chunk in parsed] == [{"role": "assistant"}] * 2 + [{}] * 2
    assert [chunk["choices"][0].get("finish_reason") for chunk in parsed] == [None, None, "stop", "stop"]
    assert [chunk.get("usage") for chunk in parsed[2:]] == [
        None,
        {"prompt_tokens": 5, "completion_tokens": 0},
    ]


async def test_big_delta_is_sent_in_one_chunk(practice: PracticeUpstream) -> None:
    chunks = await answer(practice, "p?deltas=2&big_delta=300000")
    assert len(payloads(chunks[1])[0]["choices"][0]["delta"]["content"].encode()) == 300_000


async def test_usage_own_is_a_last_chunk_without_choices_and_only_on_request(
    practice: PracticeUpstream,
) -> None:
    unasked = payloads(b"".join(await answer(practice, "p?deltas=2&usage=own")))
    assert all("usage" not in chunk and chunk["choices"] for chunk in unasked)
    asked = await answer(practice, "p?deltas=2&usage=own", stream_options={"include_usage": True})
    last = payloads(b"".join(asked))[-1]
    assert last["choices"] == []
    assert last["usage"] == expected_usage("p?deltas=2&usage=own", MESSAGES)


async def test_usage_running_grows_in_every_chunk(practice: PracticeUpstream) -> None:
    parsed = payloads(b"".join(await answer(practice, "p?deltas=3&usage=running")))
    assert [chunk["usage"]["completion_tokens"] for chunk in parsed] == [0, 1, 2, 3]


async def test_usage_none_and_no_done_send_neither(practice: PracticeUpstream) -> None:
    chunks = await answer(practice, "p?deltas=2&usage=none&no_done", stream_options={"include_usage": True})
    assert b"usage" not in b"".join(chunks)
    assert b"[DONE]" not in chunks[-1]
    assert (await ended(practice)).usage_sent is None


async def test_chunk_bytes_splits_the_body_without_changing_it(practice: PracticeUpstream) -> None:
    whole = await answer(practice, "p?deltas=20")
    pieces = await answer(practice, "p?deltas=20&chunk_bytes=1")
    assert {len(piece) for piece in pieces} == {1}
    assert b"".join(pieces) == b"".join(whole).replace(b"chatcmpl-1", b"chatcmpl-2")


async def test_framing_close_has_no_length_and_ends_with_the_connection(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        connection.ask("p?deltas=2&framing=close")
        _, headers = await connection.head()
        assert headers["connection"] == "close"
        assert not headers.keys() & {"transfer-encoding", "content-length"}
        assert (await connection.reader.read()).endswith(b"data: [DONE]\n\n")


async def sent_before(practice: PracticeUpstream, model: str, error: type[Exception]) -> list[bytes]:
    """Return the HTTP chunks before the connection fails with `error`."""
    chunks: list[bytes] = []
    async with connected(practice) as connection:
        connection.ask(model)
        await connection.head()
        with pytest.raises(error):
            while True:
                chunks.append(await connection.http_chunk() or b"the body ended without an error")
    return chunks


@pytest.mark.parametrize(
    ("fault", "error"), [("break_after", ConnectionResetError), ("close_after", asyncio.IncompleteReadError)]
)
async def test_break_and_close_after_happen_after_exactly_that_number_of_deltas(
    practice: PracticeUpstream, fault: str, error: type[Exception]
) -> None:
    chunks = await sent_before(practice, f"p?deltas=10&{fault}=4", error)
    assert contents(payloads(b"".join(chunks))) == expected_text("p?deltas=4", MESSAGES)
    assert len(chunks) == 1 + 4
    call = await ended(practice)
    assert (call.outcome, call.deltas_sent, call.usage_sent) == ("fault", 4, None)


async def test_fault_after_zero_happens_before_any_chunk(practice: PracticeUpstream) -> None:
    assert await sent_before(practice, "p?close_after=0", asyncio.IncompleteReadError) == []


async def test_fault_after_all_deltas_happens_before_done(practice: PracticeUpstream) -> None:
    chunks = await sent_before(practice, "p?deltas=2&close_after=2", asyncio.IncompleteReadError)
    assert payloads(b"".join(chunks))[-1]["choices"][0]["finish_reason"] == "stop"


async def test_cut_utf8_after_ends_inside_a_character(practice: PracticeUpstream) -> None:
    chunks = await sent_before(practice, "p?deltas=10&cut_utf8_after=4", asyncio.IncompleteReadError)
    assert len(chunks) == 1 + 4 + 1
    with pytest.raises(UnicodeDecodeError, match="unexpected end of data"):
        chunks[-1].decode()


async def test_cut_after_with_framing_close_ends_cleanly(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        connection.ask("p?deltas=10&cut_utf8_after=4&framing=close")
        await connection.head()
        assert (await connection.reader.read()).endswith(b'{"content":"\xf0\x9f')


@pytest.mark.parametrize(
    "option", ["stall_after=4", "first_delta_ms=3600000", "pace_ms=3600000", "slow_headers_ms=3600000"]
)
async def test_stalled_stream_ends_at_once_when_the_client_has_gone(
    practice: PracticeUpstream, option: str
) -> None:
    async with connected(practice) as connection:
        connection.ask(f"p?deltas=10&{option}")
        if option == "stall_after=4":
            await connection.head()
            for _ in range(1 + 4):
                await connection.http_chunk()
        await practice.until(lambda: practice.open_streams == 1)
    call = await ended(practice)
    assert call.outcome == "client_closed"
    assert call.ended_at - call.started_at < 5
    assert (practice.open_streams, practice.max_open) == (0, 1)


async def test_ping_stall_after_sends_comments_and_no_delta(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        connection.ask("p?deltas=10&ping_stall_after=1&ping_ms=1")
        await connection.head()
        chunks = [await connection.http_chunk() for _ in range(2 + 5)]
        assert chunks[2:] == [b": keep-alive\n\n"] * 5
    call = await ended(practice)
    assert (call.outcome, call.deltas_sent) == ("client_closed", 1)


@pytest.mark.parametrize(("fault", "after"), [("error_frame_after", 1), ("error_then_done_after", 2)])
async def test_error_frame_ends_the_body_with_and_without_done(
    practice: PracticeUpstream, fault: str, after: int
) -> None:
    chunks = await answer(practice, f"p?deltas=10&{fault}=4")
    assert set(payloads(chunks[1 + 4])[0]["error"]) == {"message", "type", "param", "code"}
    assert chunks[1 + 4 + 1 :] == [b"data: [DONE]\n\n"] * (after - 1)
    assert (await ended(practice)).outcome == "fault"


async def test_endless_line_waits_for_a_client_that_does_not_read(
    practice: PracticeUpstream,
) -> None:
    async with connected(practice) as connection:
        connection.ask("p?endless_line")
        await connection.head()
        await connection.http_chunk()
        assert b"\n" not in b"".join([await connection.http_chunk() or b"\n" for _ in range(10)])
    assert (await ended(practice)).outcome == "client_closed"


async def test_pace_ms_is_the_time_between_deltas(practice: PracticeUpstream) -> None:
    await answer(practice, "p?deltas=11&pace_ms=10")
    call = await ended(practice)
    assert 0.1 <= call.ended_at - call.first_byte_at < 1


@pytest.mark.parametrize(("option", "spoken"), [("slow_headers_ms=50", False), ("first_delta_ms=50", True)])
async def test_delays_are_before_and_after_the_head(
    practice: PracticeUpstream, option: str, spoken: bool
) -> None:
    await answer(practice, f"p?deltas=1&{option}")
    call = await ended(practice)
    before = call.first_byte_at - call.started_at
    after = call.ended_at - call.first_byte_at
    assert (after if spoken else before) >= 0.05 > (before if spoken else after)


async def test_times_limits_the_number_of_faulty_calls(practice: PracticeUpstream) -> None:
    model = "p?deltas=2&status=503&times=2"
    async with connected(practice) as connection:
        for _ in range(2):
            connection.ask(model)
            assert (await connection.whole())[0] == 503
    assert payloads(b"".join(await answer(practice, model)))
    await ended(practice, 3)
    assert [call.outcome for call in practice.calls] == ["fault", "fault", "completed"]


async def test_json_of_every_chunk_has_the_key_order_of_the_seed(practice: PracticeUpstream) -> None:
    first = (await answer(practice, "p?deltas=1"))[0]
    assert list(orjson.loads(first.removeprefix(b"data: "))) == ["id", "object", "model", "choices"]
