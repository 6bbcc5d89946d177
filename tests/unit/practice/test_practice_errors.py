"""Errors in every shape, keep-alives, the sentinel, and missing or broken answers."""

import asyncio
import gzip
import time
from email.utils import parsedate_to_datetime

import orjson
import pytest

from streamworker.practice import PracticeUpstream
from streamworker.practice.errors import ERRORS
from streamworker.practice.events import KEEPALIVES
from tests.unit.practice.practice_client import answer, connected, ended

BODIES = {
    "openai": b'{"error":{"message":',
    "vllm": b'"code":503,',
    "vllm_flat": b'{"object":"error","message":',
    "sglang": b'{"error":{"object":"error",',
    "llamacpp": b'{"error":{"code":503,',
    "llamacpp_field": b'{"error":{"code":503,',
    "openrouter": b'{"error":{"code":503,"message":',
    "groq": b'{"error":{"message":',
    "event": b'{"error":{"message":',
    "event_flat": b'{"message":',
    "event_text": b'{"error":{"message":',
    "tgi": b'"error_type":"generation"',
    "string": b'{"error":"The practice',
    "xai": b'{"code":"practice_fault","error":"The',
    "litellm": b'"type":"None","param":"None","code":"503"',
    "google": b'[{"error":{"code":503,',
    "detail": b'{"detail":"The',
    "message": b'{"message":"The practice upstream failed as its script says. Status 503.","id":"req-practice"}',
    "anthropic": b'{"type":"error","error":{"type":"server_error",',
    "stream": b'data: {"error":{"message":',
    "html": b"<!DOCTYPE html>",
    "text": b"The practice upstream failed",
    "empty": b"",
}
FRAMES = {
    **{name: b"data: " + start for name, start in BODIES.items() if start.startswith((b"{", b"["))},
    "vllm": b'data: {"error":{"code":500,"message":',
    "llamacpp": b'data: {"error":{"code":500,',
    "openrouter": b'"finish_reason":"error"',
    "llamacpp_field": b'error: {"code":500,',
    "groq": b'"x_groq":{"error":"The',
    "event": b'event: error\ndata: {"error":{',
    "event_flat": b'event: error\ndata: {"message":',
    "event_text": b"event: error\ndata: The practice",
    "tgi": BODIES["tgi"],
    "litellm": b'"type":"None","param":"None","code":"500"',
    "google": b'data: [{"error":{"code":500,',
    "message": b'data: {"message":"The practice upstream failed as its script says.","id":',
    "stream": b'data: {"error":{',
    "html": b"<!DOCTYPE html>",
    "text": b"data: The practice upstream failed",
    "empty": b'"delta":{"content":""}',
}


def test_every_error_shape_has_an_expectation() -> None:
    assert set(BODIES) == set(FRAMES) == set(ERRORS)


@pytest.mark.parametrize("shape", ERRORS)
async def test_error_body_has_its_shape(practice: PracticeUpstream, shape: str) -> None:
    async with connected(practice) as connection:
        connection.ask(f"p?status=503&error={shape}")
        status, headers = await connection.head()
        body = await connection.reader.readexactly(int(headers["content-length"]))

    assert status == 503
    assert BODIES[shape] in body
    assert (body == b"") is (shape == "empty")
    assert (headers["content-type"] == "application/json") is (shape not in {"html", "text", "stream"})


@pytest.mark.parametrize("shape", ERRORS)
async def test_error_frame_has_its_shape(practice: PracticeUpstream, shape: str) -> None:
    chunks = await answer(practice, f"p?deltas=3&error_frame_after=1&error={shape}")

    assert FRAMES[shape] in chunks[2]
    assert len(chunks) == 3
    assert (await ended(practice)).outcome == "fault"


async def test_error_code_is_a_number_if_the_shape_has_one(practice: PracticeUpstream) -> None:
    chunks = await answer(practice, "p?deltas=3&error_frame_after=0&error=vllm&code=400")

    assert orjson.loads(chunks[0].removeprefix(b"data: "))["error"]["code"] == 400


async def test_error200_has_an_error_as_body_of_a_200(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        connection.ask("p?error200&error=xai&code=busy")
        status, headers, body = await connection.whole()

    assert (status, headers["content-type"], body["code"]) == (200, "application/json", "busy")


async def test_retry_headers_are_sent_as_given(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        connection.ask("p?status=429&retry_after=nan&retry_after_ms=-1&should_retry=false")
        given = (await connection.whole())[1]
        connection.ask("p?status=429&retry_after_date=90")
        dated = (await connection.whole())[1]

    assert [given[name] for name in ("retry-after", "retry-after-ms", "x-should-retry")] == [
        "nan",
        "-1",
        "false",
    ]
    assert 85 <= parsedate_to_datetime(dated["retry-after"]).timestamp() - time.time() <= 90


@pytest.mark.parametrize(
    ("how", "read"),
    [("close", b""), ("half", b"HTTP/1.1 200 OK\r\ncontent-ty"), ("garbage", b"220 practice.ex")],
)
async def test_no_answer_closes_the_connection_after_its_bytes(
    practice: PracticeUpstream, how: str, read: bytes
) -> None:
    async with connected(practice) as connection:
        connection.ask(f"p?no_answer={how}")
        assert (await connection.reader.read())[: len(read) or 1] == read


async def test_no_answer_resets_or_stalls_the_connection(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        connection.ask("p?no_answer=reset")
        with pytest.raises(ConnectionResetError):
            await connection.reader.read()
    async with connected(practice) as connection:
        connection.ask("p?no_answer=stall")
        await practice.until(lambda: practice.open_streams == 1)
    assert (await ended(practice, 2)).outcome == "client_closed"


async def test_end_after_ends_the_body_as_http_requires(practice: PracticeUpstream) -> None:
    assert len(await answer(practice, "p?deltas=9&end_after=4")) == 1 + 4


async def test_cut_after_ends_inside_an_http_chunk(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        connection.ask("p?deltas=9&cut_after=1")
        await connection.head()
        await connection.http_chunk()
        await connection.http_chunk()
        with pytest.raises(asyncio.IncompleteReadError) as caught:
            await connection.http_chunk()

    assert caught.value.partial.endswith(b'"content":"half')


async def test_garbage_after_sends_an_event_that_is_not_json(practice: PracticeUpstream) -> None:
    assert (await answer(practice, "p?deltas=9&garbage_after=1"))[-1] == b"data: Internal Server Error\n\n"


@pytest.mark.parametrize("kind", KEEPALIVES)
async def test_keepalive_is_sent_before_every_delta_and_before_the_first_one(
    practice: PracticeUpstream, kind: str
) -> None:
    chunks = await answer(practice, f"p?deltas=2&keepalive={kind}&first_delta_ms=5&ping_ms=2")
    sign = KEEPALIVES[kind] + b"\n\n"

    assert [index for index, chunk in enumerate(chunks) if chunk == sign] == [0, 1, 3, 5]


async def test_keepalive_all_sends_every_kind_in_turn(practice: PracticeUpstream) -> None:
    chunks = await answer(practice, "p?deltas=12&keepalive=all")

    assert chunks[1:-1:2] == [sign + b"\n\n" for sign in KEEPALIVES.values()]


@pytest.mark.parametrize(
    ("how", "end"),
    [
        ("blanks", b"data:  [DONE] \n\n"),
        ("no_space", b"data:[DONE]\n\n"),
        ("no_newline", b"data: [DONE]"),
        ("named", b"event: done\ndata: [DONE]\n\n"),
    ],
)
async def test_done_option_selects_the_bytes_of_the_sentinel(
    practice: PracticeUpstream, how: str, end: bytes
) -> None:
    assert (await answer(practice, f"p?deltas=1&done={how}"))[-1] == end


async def test_done_junk_sends_junk_after_the_sentinel(practice: PracticeUpstream) -> None:
    assert (await answer(practice, "p?deltas=1&done=junk"))[-1].startswith(b"data: [DONE]\n\ndata: ")


async def test_format_selects_bom_space_and_lines(practice: PracticeUpstream) -> None:
    assert (await answer(practice, "p?deltas=1&format=bom"))[0] == b"\xef\xbb\xbf"
    assert (await answer(practice, "p?deltas=1&format=no_space"))[0].startswith(b"data:{")
    lines = (await answer(practice, "p?deltas=1&format=multiline"))[0].removesuffix(b"\n\n").split(b"\n")
    assert len(lines) > 2
    assert orjson.loads(b"\n".join(line.removeprefix(b"data: ") for line in lines))["choices"]


async def test_gzip_is_flushed_after_every_write(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        connection.ask("p?deltas=2&encoding=gzip")
        assert (await connection.head())[1]["content-encoding"] == "gzip"
        chunks = await connection.http_chunks()

    assert len(chunks) == 1 + 2 + 1 + 1
    assert gzip.decompress(b"".join(chunks)).endswith(b"data: [DONE]\n\n")


async def test_encoding_lie_sends_the_header_and_plain_bytes(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        connection.ask("p?deltas=1&encoding=lie")
        assert (await connection.head())[1]["content-encoding"] == "gzip"
        assert (await connection.http_chunks())[-1] == b"data: [DONE]\n\n"


@pytest.mark.parametrize(("fault", "missing"), [("", 0), ("&close_after=1", 1)])
async def test_framing_length_sends_a_body_of_that_length_or_cuts_it(
    practice: PracticeUpstream, fault: str, missing: int
) -> None:
    async with connected(practice) as connection:
        connection.ask(f"p?deltas=3&choices=2&framing=length{fault}")
        _, headers = await connection.head()
        body = await connection.reader.read()

    assert "transfer-encoding" not in headers
    assert (int(headers["content-length"]) > len(body)) is bool(missing)
    assert (await ended(practice)).sent.bytes == len(body)
