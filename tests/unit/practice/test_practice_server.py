"""HTTP of the practice upstream: errors, keep-alive, the log, stopping."""

import asyncio
import socket
from typing import Any

import orjson
import pytest

from streamworker.practice import PracticeUpstream, expected_text, expected_tool_calls, expected_usage, serve
from tests.unit.practice.practice_client import MESSAGES, Connection, answer, connected, ended


async def refused(connection: Connection) -> tuple[int, dict[str, Any]]:
    status, _, body = await connection.whole()
    assert list(body) == ["error"]
    return status, body["error"]


async def test_status_is_sent_with_its_retry_headers_and_code(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        connection.ask("p?status=429&retry_after=2&retry_after_ms=1500&code=insufficient_quota")
        status, headers, body = await connection.whole()
    assert (status, headers["retry-after"], headers["retry-after-ms"]) == (429, "2", "1500")
    assert body["error"]["code"] == "insufficient_quota"
    assert (await ended(practice)).outcome == "fault"


@pytest.mark.parametrize("status", [500, 524, 529])
async def test_status_without_a_standard_reason_phrase_is_sent(
    practice: PracticeUpstream, status: int
) -> None:
    async with connected(practice) as connection:
        connection.ask(f"p?status={status}")
        assert (await refused(connection))[0] == status


async def test_html200_sends_a_page_of_html(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        connection.ask("p?html200")
        status, headers = await connection.head()
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert (await connection.reader.readexactly(int(headers["content-length"]))).startswith(
            b"<!DOCTYPE html>"
        )


@pytest.mark.parametrize(("model", "stream"), [("p?json200", True), ("p", False)])
async def test_request_without_stream_or_with_json200_gets_a_whole_completion(
    practice: PracticeUpstream, model: str, stream: bool
) -> None:
    model = f"{model}{'&' if '?' in model else '?'}deltas=3&choices=2&tool_calls&reasoning"
    async with connected(practice) as connection:
        connection.ask(model, stream=stream)
        status, headers, body = await connection.whole()
    assert (status, headers["content-type"], body["object"]) == (200, "application/json", "chat.completion")
    assert [choice["message"]["content"] for choice in body["choices"]] == expected_text(model, MESSAGES)
    assert body["choices"][1]["message"]["tool_calls"] == expected_tool_calls(model, 1)
    assert body["choices"][0]["message"]["reasoning_content"] == "thought 1 thought 2 thought 3 "
    assert body["usage"] == expected_usage(model, MESSAGES)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"{", "JSON"),
        (b"[]", "JSON object"),
        (b'{"messages":[]}', "'model'"),
        (b'{"model":"p"}', "'messages'"),
        (b'{"model":"p","messages":[],"stream":"yes"}', "'stream'"),
        (b'{"model":"p","messages":[],"n":0}', "'n'"),
        (b'{"model":"p","messages":[],"n":true}', "'n'"),
        (b'{"model":"p?speed=1&deltas=x","messages":[]}', "unknown option 'speed'; option 'deltas'"),
        (b'{"model":"p?deltas=3&break_after=4","messages":[],"stream":true}', "only 3 deltas"),
    ],
)
async def test_invalid_body_is_refused_with_the_name_of_its_member(
    practice: PracticeUpstream, body: bytes, named: str
) -> None:
    async with connected(practice) as connection:
        connection.request("POST", "/v1/chat/completions", body)
        status, error = await refused(connection)
    assert status == 400
    assert named in error["message"]
    call = await ended(practice)
    assert (call.outcome, call.status) == ("refused", 400)


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/chat/completions"), ("POST", "/chat/completions")])
async def test_unknown_path_gets_a_404_in_the_same_shape(
    practice: PracticeUpstream, method: str, path: str
) -> None:
    async with connected(practice) as connection:
        connection.request(method, path)
        status, error = await refused(connection)
    assert (status, error["code"]) == (404, "not_found")
    assert not practice.calls


@pytest.mark.parametrize(
    ("headers", "status", "logged"),
    [
        ({}, 401, None),
        ({"Authorization": "Bearer no"}, 401, "wrong"),
        ({"Authorization": "Bearer s3"}, 200, "matched"),
    ],
)
async def test_bearer_is_checked_and_never_logged(
    headers: dict[str, str], status: int, logged: str | None
) -> None:
    async with PracticeUpstream(api_key="s3") as practice, connected(practice) as connection:
        connection.ask("p?deltas=1", headers=headers)
        assert (await connection.head())[0] == status
        call = await ended(practice)
    assert call.headers.get("authorization") == logged
    assert "s3" not in repr(call)


async def test_one_connection_serves_stream_after_stream(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        for _ in range(3):
            connection.ask("p?deltas=3")
            await connection.head()
            assert (await connection.http_chunks())[-1] == b"data: [DONE]\n\n"
    await ended(practice, 3)
    assert [call.outcome for call in practice.calls] == ["completed"] * 3


async def test_request_sent_during_an_answer_is_served_after_it(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        connection.ask("p?deltas=5&pace_ms=5")
        await connection.head()
        connection.request("GET", "/healthz")
        assert len(await connection.http_chunks()) == 1 + 5 + 1
        assert (await connection.head())[0] == 200


async def test_client_that_expects_100_continue_gets_it(practice: PracticeUpstream) -> None:
    body = orjson.dumps({"model": "p?deltas=1", "messages": []})
    async with connected(practice) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: {len(body)}"
        connection.writer.write(head.encode() + b"\r\n\r\n")
        assert (await connection.head())[0] == 100
        connection.writer.write(body)
        assert (await connection.whole())[0] == 200


async def test_client_of_http_1_0_gets_a_body_without_chunks(practice: PracticeUpstream) -> None:
    body = orjson.dumps({"model": "p?deltas=1", "messages": [], "stream": True})
    async with connected(practice) as connection:
        head = f"POST /v1/chat/completions HTTP/1.0\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.writer.write(head.encode() + body)
        assert "transfer-encoding" not in (await connection.head())[1]
        text = await connection.reader.read()
    assert text.startswith(b"data: {")
    assert text.endswith(b"data: [DONE]\n\n")


async def test_invalid_http_gets_a_400_and_the_connection_is_closed(practice: PracticeUpstream) -> None:
    async with connected(practice) as connection:
        connection.writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        assert (await refused(connection))[0] == 400
        assert await connection.reader.read() == b""


async def test_models_health_and_call_log_are_served(practice: PracticeUpstream) -> None:
    await answer(practice, "p?deltas=2")
    await answer(practice, "p?deltas=3")
    async with connected(practice) as connection:
        connection.request("GET", "/v1/models")
        assert {model["object"] for model in (await connection.whole())[2]["data"]} == {"model"}
        connection.request("GET", "/calls?limit=1")
        _, _, log = await connection.whole()
    assert (log["total"], log["max_open"], log["open_streams"], log["outcomes"]) == (
        2,
        1,
        0,
        {"completed": 2},
    )
    assert [(call["model"], call["deltas_sent"]) for call in log["calls"]] == [("p?deltas=3", 3)]


async def test_log_is_bounded_in_calls_and_content() -> None:
    async with PracticeUpstream(maxlen=2, content_limit=10) as practice:
        for _ in range(3):
            await answer(practice, "p?text=" + "abcd%20" * 5)
        await ended(practice, 2)
        assert [call.number for call in practice.calls] == [2, 3]
        assert practice.calls[-1].content_sent == ["abcd abcd "]
        assert practice.calls[-1].deltas_sent == 5


async def test_client_that_does_not_read_blocks_only_its_own_stream(
    practice: PracticeUpstream,
) -> None:
    async with connected(practice) as slow:
        sock: socket.socket = slow.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
        slow.ask("p?deltas=1000000&big_delta=50000000")
        assert await answer(practice, "p?deltas=2")
        assert practice.calls[0].deltas_sent == 0
    await ended(practice, 2)
    assert practice.calls[0].outcome == "client_closed"


async def test_stop_closes_stalled_and_idle_connections_and_leaves_no_task() -> None:
    practice = PracticeUpstream()
    await practice.start()
    before = asyncio.all_tasks()
    async with connected(practice) as stalled, connected(practice) as idle:
        stalled.ask("p?stall_after=0")
        await stalled.head()
        idle.request("GET", "/healthz")
        await idle.head()
        await practice.stop()
        assert asyncio.all_tasks() <= before
        assert await stalled.reader.read() == b""
    assert [call.outcome for call in practice.calls] == ["stopped"]
    await practice.stop()


async def test_serve_calls_started_and_stops_when_cancelled() -> None:
    said: asyncio.Queue[str] = asyncio.Queue()
    serving = asyncio.create_task(
        serve(PracticeUpstream(), "127.0.0.1", 0, started=lambda practice: said.put_nowait(practice.base_url))
    )
    url = await asyncio.wait_for(said.get(), 5)
    assert url.startswith("http://127.0.0.1:")
    assert url.endswith("/v1")
    port = int(url.split(":")[2].split("/")[0])
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
