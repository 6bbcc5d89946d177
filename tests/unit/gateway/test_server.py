"""What surrounds every request: invalid HTTP, limits of connections, CORS, request ids, the access log, the drain."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from streamworker.errors import ConfigurationError
from streamworker.gateway import requests, server
from streamworker.gateway.drain import Drain
from streamworker.gateway.server import SEND_BUFFER_BYTES, Server
from tests.integration.stage import eventually
from tests.unit.gateway.served import ACME, READ_ONLY, served

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.gateway.served import Served

CANARY = "canaryKEYq7Zt1"
JOB = {"request": {"model": "m", "messages": [{"role": "user", "content": "hi"}]}}


async def exchange(gateway: Served, data: bytes) -> bytes:
    """Send bytes; return everything that comes until the connection is closed."""
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write(data)
    async with asyncio.timeout(5):
        received = await reader.read()
    writer.close()
    return received


# Invalid HTTP


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\nBad Header: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
    ],
)
async def test_request_that_is_not_http_is_400_and_the_connection_is_closed(
    gateway: Served, data: bytes
) -> None:
    """With the body of all errors; the log repeats nothing of it."""
    with capture_logs() as logs:
        received = await exchange(gateway, data.replace(b"nonsense", CANARY.encode()))

    head, _, body = received.partition(b"\r\n\r\n")
    assert b" 400 " in head[:14], received[:300]
    assert b"aiohttp" not in head
    assert b"application/json" in head
    assert json.loads(body)["error"]["code"] == "invalid_request"
    assert b"x-should-retry: false" in head  # it may have been a POST
    assert CANARY not in str(logs) + received.decode()


async def test_body_with_invalid_chunks_is_refused(gateway: Served) -> None:
    """The job is not written."""
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\nContent-Type: application/json\r\n"
    received = await exchange(gateway, head.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")

    assert b" 400 " in received[:14]
    assert gateway.writer.records == []


async def test_connection_without_a_request_is_closed(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it sends nothing, or its headers byte by byte."""
    monkeypatch.setattr(server, "REQUEST_TIMEOUT_S", 0.1)
    assert await exchange(gateway, b"") == b""
    assert await exchange(gateway, b"GET / HTTP/1.1\r\nHost: ") == b""
    await eventually(lambda: gateway.server.connections == 0)


async def test_body_that_is_announced_too_large_is_refused_before_it_is_sent(gateway: Served) -> None:
    """Clients such as curl wait for a status before they send a large body."""
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write(head.encode() + b"Content-Length: 1000001\r\n\r\n")
    async with asyncio.timeout(5):
        received = await reader.readuntil(b"}}")
    writer.close()

    assert received.startswith(b"HTTP/1.1 413 ")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_large"


@pytest.mark.parametrize(
    ("expectation", "is_asked"), [("100-continue", True), ("100-Continue", True), ("magic", False)]
)
async def test_expectation_of_a_client_is_met_or_ignored(
    gateway: Served, expectation: str, is_asked: bool
) -> None:
    """A client that waits is asked for the body (RFC 9110 section 10.1.1)."""
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\nContent-Type: application/json\r\n"
    body = json.dumps(JOB).encode()
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write(f"{head}Expect: {expectation}\r\nContent-Length: {len(body)}\r\n\r\n".encode())
    async with asyncio.timeout(5):
        if is_asked:
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        status = await reader.readline()
    writer.close()

    assert status == b"HTTP/1.1 202 Accepted\r\n"


ASKED = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize(
    ("line", "headers", "status", "code"),
    [
        ("POST /v1/jobs", {"Authorization": "Bearer swk_wrong"}, 401, "unauthenticated"),
        ("POST /v1/jobs", {"Authorization": "Basic x"}, 401, "unauthenticated"),
        ("POST /v1/jobs", {"Authorization": f"Bearer {READ_ONLY}"}, 403, "insufficient_scope"),
        ("POST /v1/jobs?x=1", {}, 400, "invalid_request"),
        ("POST /v1/jobs", {"Content-Length": "1000001"}, 413, "too_large"),
        ("POST /v1/jobs", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST /v1/jobs", {"Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
        ("PUT /v1/jobs", {}, 405, "method_not_allowed"),
        ("POST /v1/nothing", {}, 404, "not_found"),
        ("POST /v1/chat/completions", {"Authorization": "Bearer swk_wrong"}, 401, "unauthenticated"),
        ("POST /v1/chat/completions", {"Content-Length": "1000001"}, 413, "too_large"),
        ("POST /v1/tokens", {"Content-Length": "1000001"}, 413, "too_large"),
        ("POST /v1/jobs/acme.1/cancel", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST /v1/files", {}, 501, "not_configured"),
    ],
)
async def test_body_that_would_be_refused_is_not_asked_for(
    gateway: Served, line: str, headers: dict[str, str], status: int, code: str
) -> None:
    """The head is enough to refuse it, and the connection, on which the body may follow or not, is closed."""
    sent = {
        "Host": "x",
        "Authorization": f"Bearer {ACME}",
        "Content-Type": "application/json",
        "Content-Length": "100",
        "Expect": "100-continue",
    } | headers
    head = [f"{line} HTTP/1.1", *[f"{name}: {value}" for name, value in sent.items()], "", ""]
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write("\r\n".join(head).encode())
    async with asyncio.timeout(5):
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
    writer.close()

    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"connection: close" in answer.lower()
    assert body["error"]["code"] == code


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/jobs", "/v1/models"])
async def test_expectation_that_is_not_known_is_ignored_everywhere(gateway: Served, path: str) -> None:
    """On paths and for methods that do not exist too: 417 has no place in the contract."""
    status, _, _ = await gateway.call("PUT", path, headers={"Expect": "magic"})

    assert status == (404 if path == "/v1/nothing" else 405)


async def test_client_of_http_1_0_is_not_asked_for_the_body(gateway: Served) -> None:
    """RFC 9110 section 10.1.1: it does not know what 100 means."""
    body = json.dumps(JOB).encode()
    head = f"POST /v1/jobs HTTP/1.0\r\nAuthorization: Bearer {ACME}\r\nContent-Type: application/json\r\n"
    received = await exchange(
        gateway, f"{head}Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )

    assert received.startswith(b"HTTP/1.0 202 ")


async def test_event_stream_in_http_1_0_ends_with_its_connection(gateway: Served) -> None:
    """Although the client asks to keep the connection: it has no other sign of the end."""
    gateway.log.publish("acme.1", ["a"])
    head = f"HTTP/1.0\r\nAuthorization: Bearer {ACME}\r\nConnection: keep-alive\r\n\r\n"
    received = await exchange(gateway, f"GET /v1/jobs/acme.1/events {head}".encode())

    assert b"event: usage" in received
    assert b"keep-alive" not in received


async def test_connection_of_http_1_0_is_kept_behind_a_body_with_a_length(gateway: Served) -> None:
    """If the client asks for it."""
    head = f"HTTP/1.0\r\nAuthorization: Bearer {ACME}\r\nConnection: keep-alive\r\n\r\n"
    reader, writer = await asyncio.open_connection(*gateway.address)
    async with asyncio.timeout(5):
        for _ in range(2):
            writer.write(f"GET /v1/models {head}".encode())
            assert b"Connection: keep-alive" in await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(b"]}")
    writer.close()


async def test_connection_serves_on_behind_a_body_that_was_asked_for(gateway: Served) -> None:
    """And behind a request without a body, whatever it expects."""
    body = json.dumps(JOB).encode()
    head = f"Host: x\r\nAuthorization: Bearer {ACME}\r\nExpect: 100-continue\r\n"
    post = f"POST /v1/jobs HTTP/1.1\r\n{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    get = f"GET /v1/models HTTP/1.1\r\n{head}\r\n"
    reader, writer = await asyncio.open_connection(*gateway.address)
    async with asyncio.timeout(5):
        for _ in range(2):
            writer.write(post.encode())
            assert await reader.readuntil(b"\r\n\r\n") == ASKED
            writer.write(body)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
            await reader.readuntil(b"}")
        writer.write(get.encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        await reader.readuntil(b"]}")
        writer.write(get.encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_body_that_does_not_arrive_is_408(gateway: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection cannot be used any more."""
    monkeypatch.setattr(requests, "BODY_TIMEOUT_S", 0.1)
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write(head.encode() + b"Content-Length: 10\r\n\r\n{")
    received = await reader.readuntil(b"}}")
    writer.close()

    assert received.startswith(b"HTTP/1.1 408 ")


async def asked_for_much(gateway: Served) -> socket.socket:
    """Ask for megabytes on a socket that the system buffers little for."""
    gateway.log.publish("acme.much", ["x" * 10_000] * 500)
    asking = socket.socket()
    asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    asking.connect(gateway.address)
    asking.setblocking(False)
    head = f"GET /v1/jobs/acme.much/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\n"
    await asyncio.get_running_loop().sock_sendall(
        asking, f"{head}Accept: application/json\r\nConnection: close\r\n\r\n".encode()
    )
    await eventually(lambda: gateway.unsent_bytes > 0)
    return asking


async def test_client_that_takes_nothing_of_a_response_is_disconnected(gateway: Served) -> None:
    """What waits for it is freed."""
    gateway.server._stall_s = 0.2
    with await asked_for_much(gateway):
        await eventually(lambda: gateway.server.connections == 0)


async def test_client_that_takes_a_response_slowly_gets_all_of_it(gateway: Served) -> None:
    """It is not cut while it takes something."""
    gateway.server._stall_s = 0.2
    received = bytearray()
    loop = asyncio.get_running_loop()
    with await asked_for_much(gateway) as asking:
        while data := await loop.sock_recv(asking, 1_000_000):
            received += data
            await asyncio.sleep(0.1 if len(received) < 500_000 else 0)

    assert received.endswith(b'"ended":true}')


async def test_connections_over_the_limit_are_refused(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 503, and the connection is closed; those that are open stay."""
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 0)
    status, value, headers = await gateway.call("GET", "/openapi.json")

    assert (status, value["error"]["code"]) == (503, "overloaded")
    assert headers["Connection"] == "close"
    assert headers["Retry-After"] == "2"


async def test_socket_buffers_of_connections_are_small(gateway: Served) -> None:
    """With the system's default, megabytes wait there for a client that does not read."""
    async with gateway.http.get(gateway.url + "/openapi.json"):
        [connection] = gateway.server._runner.server.connections  # type: ignore[union-attr]
        accepted = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
        size = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    assert size == 2 * SEND_BUFFER_BYTES  # Linux reports the double


async def test_port_that_is_in_use_is_a_fault_of_the_configuration(gateway: Served) -> None:
    """With the name of the setting."""
    another = Server(web.Application(), "127.0.0.1", gateway.server.port)
    with pytest.raises(ConfigurationError) as caught:
        await another.start()
    with pytest.raises(ConfigurationError, match=r"gateway\.port: cannot listen on 192\.0\.2\.1"):
        await Server(web.Application(), "192.0.2.1", 0).start()

    assert caught.value.faults == (
        f"gateway.port: 127.0.0.1:{gateway.server.port} is in use; choose another port, or 0 for a free one",
    )


# CORS


async def test_page_of_an_allowed_origin_may_read_responses(tmp_path: Path) -> None:
    """Exactly that origin, without cookies; another one gets no header."""
    async with served(tmp_path, cors_origins="https://app.example.com") as gateway:
        allowed = await gateway.call("GET", "/v1/jobs/acme.x", headers={"Origin": "https://app.example.com"})
        refused = await gateway.call("GET", "/v1/jobs/acme.x", headers={"Origin": "https://evil.example.com"})
        none = await gateway.call("GET", "/v1/jobs/acme.x")

    assert allowed[2]["Access-Control-Allow-Origin"] == "https://app.example.com"
    assert "streamworker-resumed-from" in allowed[2]["Access-Control-Expose-Headers"]
    for _, _, headers in (allowed, refused, none):
        assert headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Credentials" not in headers
    assert "Access-Control-Allow-Origin" not in refused[2]
    assert "Access-Control-Allow-Origin" not in none[2]


@pytest.mark.parametrize(
    ("auth", "origin", "status"),
    [
        ("off", None, 202),
        ("off", "OWN", 202),
        ("off", "https://app.example.com", 202),
        ("off", "https://evil.example.com", 403),
        ("off", "null", 403),
        ("off", "http://[", 403),
        ("keys", "https://evil.example.com", 202),
    ],
)
async def test_page_of_another_origin_makes_no_job_without_authentication(
    tmp_path: Path, auth: str, origin: str | None, status: int
) -> None:
    """A browser sends a POST without a Content-Type without a preflight request; only a key keeps pages away else."""
    async with served(tmp_path, auth=auth, cors_origins="https://app.example.com") as gateway:
        headers = {"Authorization": f"Bearer {ACME}"} if auth == "keys" else {}
        if origin is not None:
            headers["Origin"] = gateway.url if origin == "OWN" else origin
        async with gateway.http.post(
            f"{gateway.url}/v1/jobs",
            data=json.dumps(JOB).encode(),
            headers=headers,
            skip_auto_headers=["Content-Type"],
        ) as response:
            value = await response.json()
        read, _, _ = await gateway.call("GET", "/v1/models", headers=headers, key=None)

    assert (response.status, read) == (status, 200)
    assert len(gateway.writer.records) == (1 if status == 202 else 0)
    assert status == 202 or value["error"]["code"] == "origin_not_allowed"


async def test_preflight_of_an_allowed_origin_names_methods_and_headers(tmp_path: Path) -> None:
    """Without a credential, which browsers do not send with it."""
    ask = {"Access-Control-Request-Method": "POST"} | {
        "Access-Control-Request-Headers": "authorization, x-stainless-os, streamworker-timeout, x-evil, x-stainless-é"
    }
    async with served(tmp_path, cors_origins="https://app.example.com") as gateway:
        allowed = await gateway.call(
            "OPTIONS", "/v1/jobs", key=None, headers={"Origin": "https://app.example.com", **ask}
        )
        refused = await gateway.call(
            "OPTIONS", "/v1/jobs", key=None, headers={"Origin": "https://evil.example.com", **ask}
        )
        plain, _, _ = await gateway.call("OPTIONS", "/v1/jobs", key=None)

    assert (allowed[0], refused[0], plain) == (204, 204, 405)
    assert allowed[2]["Access-Control-Max-Age"] == "7200"
    assert allowed[2]["Access-Control-Allow-Methods"] == "GET, POST, DELETE"
    names = allowed[2]["Access-Control-Allow-Headers"].split(", ")
    assert {"authorization", "last-event-id", "x-stainless-os", "streamworker-timeout"} <= set(names)
    assert "x-evil" not in names
    assert not [name for name in refused[2] if name.startswith("Access-Control")]


# Request ids and the access log


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1.2:3_4", True), ("x" * 129, False), ("a b", False), ("", False)]
)
async def test_request_id_of_the_client_is_kept_if_it_is_plain(
    gateway: Served, given: str, kept: bool
) -> None:
    """Else the gateway makes one."""
    _, _, headers = await gateway.call("GET", "/openapi.json", headers={"X-Request-Id": given})

    assert (headers["X-Request-Id"] == given) is kept
    assert headers["X-Request-Id"]


async def test_log_line_of_a_refused_request_has_the_code_of_its_error(gateway: Served) -> None:
    """An operator sees why a status of 401 or 404 was answered; None for what was not refused."""
    with capture_logs() as logs:
        await gateway.call("GET", "/v1/models")
        await gateway.call("GET", "/v1/nothing")
        await gateway.call("GET", "/v1/models", key="swk_unknown")

    lines = [(line["status"], line["error_code"]) for line in logs if line["event"] == "gateway.request"]
    assert lines == [(200, None), (404, "not_found"), (401, "unauthenticated")]


async def test_secrets_are_in_no_log_line_error_or_metric(gateway: Served) -> None:
    """Wherever a client puts them: header, query, path, body, cursor, websocket."""
    token, _ = gateway.gateway.authenticator.tokens.sign(["acme.1"], "read", 60)
    tampered = token[:-4] + "AAAA"
    bodies = []
    with capture_logs() as logs:
        for key, path in [
            (CANARY, "/v1/jobs/acme.1"),
            (None, f"/v1/jobs/acme.1?access_token={CANARY}"),
            (None, f"/v1/jobs/acme.1?access_token={tampered}"),
            (None, f"/v1/jobs/acme.1?access_token={token}&cursor=x"),
            (None, f"/{CANARY}"),
            (ACME, f"/v1/jobs/acme.1?{CANARY}=1&wait_s={CANARY}"),
        ]:
            bodies.append(await gateway.call("GET", path, key=key))
        job = {
            "request": {"model": CANARY, "messages": [CANARY]},
            "on_break": CANARY,
            "metadata": {"a": CANARY},
        }
        bodies.append(await gateway.call("POST", "/v1/jobs", json=job))
        gateway.writer.errors = [RuntimeError(CANARY)]
        del job["on_break"]
        bodies.append(await gateway.call("POST", "/v1/jobs", json=job))
        bodies.append(await gateway.call("POST", "/v1/jobs", json=job))
    metrics = "".join(
        str(sample) for family in gateway.gateway.metrics.registry.collect() for sample in family.samples
    )

    assert [entry["event"] for entry in logs].count("gateway.request") == len(bodies)
    shown = str(logs) + metrics + repr(gateway.gateway)
    for secret in (CANARY, token, tampered, ACME, token.split(".")[2]):
        assert secret not in shown
    assert bodies[-1][0] == 202
    for _, body, headers in bodies:
        text = json.dumps(body) + str(headers)
        assert token not in text
        assert tampered not in text
        assert CANARY not in text.replace(f"{CANARY}: not a parameter", "")


# The drain


async def test_drain_waits_for_requests_and_not_longer_than_its_time() -> None:
    """It ends as soon as nothing goes on."""
    loop = asyncio.get_running_loop()
    for busy_s, drain_s, expected_s in [(0.1, 10.0, 0.1), (10.0, 0.1, 0.1)]:
        drain = Drain(drain_s)

        async def work(drain: Drain = drain, busy_s: float = busy_s) -> None:
            with drain.request():
                await asyncio.sleep(busy_s)

        working = asyncio.create_task(work())
        await asyncio.sleep(0)
        began = loop.time()
        drain.begin()
        drain.begin()
        await drain.wait()
        took = loop.time() - began
        working.cancel()

        assert expected_s - 0.05 < took < expected_s + 1
        assert drain.is_draining


async def test_drain_without_requests_ends_at_once() -> None:
    """An idle gateway stops without delay."""
    drain = Drain(60)
    drain.begin()
    async with asyncio.timeout(1):
        await drain.wait()

    assert drain.busy == 0


async def test_request_during_the_drain_is_refused(gateway: Served) -> None:
    """503, and the connection is closed, so that the next one goes elsewhere."""
    gateway.gateway.drain.begin()
    status, value, headers = await gateway.call("POST", "/v1/jobs", json=JOB)

    assert (status, value["error"]["code"], headers["x-should-retry"]) == (503, "draining", "true")
    assert headers["Connection"] == "close"
    assert gateway.writer.records == []
