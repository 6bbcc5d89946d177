"""`GET /v1/ws` with the `websockets` client: identity, messages, limits, and every way in which it ends."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_typed
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streamworker.client.ids import new_job_id
from streamworker.gateway import websocket_session, websocket_subscription
from streamworker.gateway.feeds import BrokerUnavailable
from streamworker.gateway.websocket_frames import BadFrame, Cancel, Ping, Submit, Subscribe, read
from tests.integration.stage import eventually
from tests.unit.gateway.served import ACME, ALL, OTHER, READ_ONLY, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.unit.gateway.served import Served

JOB = "acme.0199-job"
connect: Any = connect_typed
"""Its types of subprotocols and origins are not those of text."""
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


class Client:
    """A websocket, and its messages as values."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def send(self, type_: str, **members: Any) -> None:
        await self.socket.send(json.dumps({"type": type_, **members}))

    async def receive(self) -> dict[str, Any]:
        async with asyncio.timeout(5):
            return dict(json.loads(await self.socket.recv()))

    async def until(self, type_: str) -> list[dict[str, Any]]:
        """Return the messages up to the next one of this type."""
        messages = [await self.receive()]
        while messages[-1]["type"] != type_:
            messages.append(await self.receive())
        return messages

    async def closed(self) -> tuple[int, list[dict[str, Any]]]:
        """Return the close code and the messages before it."""
        messages = []
        try:
            while True:
                messages.append(await self.receive())
        except ConnectionClosed as end:
            return 0 if end.rcvd is None else end.rcvd.code, messages


@asynccontextmanager
async def websocket(
    gateway: Served,
    key: str | None = ACME,
    *,
    protocols: tuple[str, ...] = ("streamworker.v1",),
    **options: Any,
) -> AsyncIterator[Client]:
    """Connect; `welcome` is taken where there is a key."""
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    url = f"ws://127.0.0.1:{gateway.server.port}/v1/ws"
    async with connect(
        url, subprotocols=list(protocols), additional_headers=headers, compression=None, **options
    ) as socket:
        client = Client(socket)
        if key is not None:
            assert (await client.receive())["type"] == "welcome"
        yield client


# Identity


async def test_websocket_with_a_key_is_welcomed_with_its_limits(gateway: Served) -> None:
    """A key does not expire."""
    async with connect(
        f"ws://127.0.0.1:{gateway.server.port}/v1/ws",
        subprotocols=["streamworker.v1"],
        additional_headers={"Authorization": f"Bearer {ACME}"},
    ) as socket:
        welcome = json.loads(await socket.recv())

    assert socket.subprotocol == "streamworker.v1"
    assert welcome == {
        "type": "welcome",
        "expires_at": None,
        "limits": {"subscriptions": 256, "message_bytes": 65_536, "submit_bytes": 1_000_000},
    }


@pytest.mark.parametrize("way", ["header", "protocol", "query", "message"])
async def test_websocket_takes_a_read_token_in_four_ways(gateway: Served, way: str) -> None:
    """Browsers can set no header: a subprotocol, the query, or the first message."""
    token, expires_at = gateway.gateway.authenticator.tokens.sign([JOB], "read", 600)
    protocols = ["streamworker.v1", *([f"bearer.{token}"] if way == "protocol" else [])]
    headers = {"Authorization": f"Bearer {token}"} if way == "header" else {}
    query = f"?access_token={token}" if way == "query" else ""
    url = f"ws://127.0.0.1:{gateway.server.port}/v1/ws{query}"
    async with connect(url, subprotocols=protocols, additional_headers=headers) as socket:
        client = Client(socket)
        if way == "message":
            await client.send("auth", token=token)
        welcome = await client.receive()

    assert socket.subprotocol == "streamworker.v1"
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(expires_at))
    assert welcome["expires_at"] == f"{seconds}.000Z"


async def test_websocket_without_auth_message_is_closed_with_4408(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `ping` does not prolong the time."""
    monkeypatch.setattr(websocket_session, "AUTH_S", 0.2)
    async with websocket(gateway, None) as client:
        await client.send("ping")
        code, messages = await client.closed()

    assert (code, messages) == (4408, [{"type": "pong"}])


@pytest.mark.parametrize(
    "first", [{"type": "subscribe", "id": "1", "job_id": JOB}, {"type": "auth", "token": "swk_wrong"}]
)
async def test_websocket_without_a_valid_credential_is_closed_with_4401(
    gateway: Served, first: dict[str, Any]
) -> None:
    """Nothing is served before it."""
    async with websocket(gateway, None) as client:
        await client.socket.send(json.dumps(first))
        code, messages = await client.closed()

    assert code == 4401
    assert [message["type"] for message in messages] in ([], ["error"])
    assert gateway.log.opened == []


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"additional_headers": {"Authorization": "Bearer swk_wrong"}}, 401, "unauthenticated"),
        ({"subprotocols": ["streamworker.v1", "bearer.swk_wrong"]}, 401, "unauthenticated"),
        ({"subprotocols": ["another"]}, 400, "invalid_request"),
        ({"subprotocols": None}, 400, "invalid_request"),
        ({"origin": "https://evil.example.com"}, 403, "origin_not_allowed"),
        ({"origin": "null"}, 403, "origin_not_allowed"),
    ],
)
async def test_websocket_that_is_refused_has_a_status(
    gateway: Served, options: dict[str, Any], status: int, code: str
) -> None:
    """Before the upgrade, errors are HTTP responses."""
    given = {"subprotocols": ["streamworker.v1"], "additional_headers": {"Authorization": f"Bearer {ACME}"}}
    with pytest.raises(InvalidStatus) as refused:
        await connect(f"ws://127.0.0.1:{gateway.server.port}/v1/ws", **given | options)

    assert refused.value.response.status_code == status
    assert json.loads(refused.value.response.body or b"{}")["error"]["code"] == code


async def test_websocket_request_without_upgrade_is_426(gateway: Served) -> None:
    """The path is a websocket."""
    status, value, headers = await gateway.call("GET", "/v1/ws")

    assert (status, value["error"]["code"], headers["Upgrade"]) == (426, "upgrade_required", "websocket")


@pytest.mark.parametrize("origin", ["https://app.example.com", "own"])
async def test_websocket_of_an_allowed_origin_is_served(tmp_path: Path, origin: str) -> None:
    """Those that are configured, and the page that the gateway serves itself."""
    async with served(tmp_path, cors_origins="https://app.example.com") as gateway:
        given = gateway.url if origin == "own" else origin
        async with websocket(gateway, origin=given) as client:
            await client.send("ping")
            assert await client.receive() == {"type": "pong"}


async def test_websocket_of_a_page_under_another_name_is_refused_without_authentication(
    tmp_path: Path,
) -> None:
    """Any page can give its own name to a loopback address (DNS rebinding)."""
    async with served(tmp_path, auth="off") as gateway:
        port = gateway.server.port
        with pytest.raises(InvalidStatus) as refused:
            await connect(
                f"ws://evil.example.com:{port}/v1/ws",
                host="127.0.0.1",
                port=port,
                subprotocols=["streamworker.v1"],
                origin=f"http://evil.example.com:{port}",
            )
        async with websocket(gateway, None, origin=gateway.url) as client:
            assert (await client.receive())["type"] == "welcome"

    assert refused.value.response.status_code == 403


# Subscriptions


async def test_subscription_delivers_events_and_its_end(gateway: Served) -> None:
    """`live` comes once, when the replay is over."""
    gateway.log.publish(JOB, ["a"], end=None)
    async with websocket(gateway) as client:
        await client.send("subscribe", id="1", job_id=JOB)
        replayed = await client.until("live")
        gateway.log.publish(JOB, ["b"], attempt="a2")
        followed = await client.until("end")

    events = gateway.log.events[JOB]
    assert replayed[0] == {"type": "subscribed", "id": "1", "job_id": JOB, "resumed_from": "start"}
    assert [m for m in replayed + followed if m["type"] == "event"] == [
        {"type": "event", "id": "1", "cursor": one.cursor, "event": json.loads(one.value)} for one in events
    ]
    assert followed[-1] == {"type": "end", "id": "1", "reason": "ended", "cursor": events[-1].cursor}
    assert gateway.log.open_feeds == 0


async def test_subscription_resumes_behind_a_cursor(gateway: Served) -> None:
    """And one with the cursor of an ending is over at once."""
    gateway.log.publish(JOB, ["a", "b"])
    known = gateway.log.events[JOB]
    async with websocket(gateway) as client:
        await client.send("subscribe", id="1", job_id=JOB, cursor=known[1].cursor)
        first = await client.until("end")
        await client.send("subscribe", id="1", job_id=JOB, cursor=known[-1].cursor)
        second = await client.until("end")

    assert first[0]["resumed_from"] == known[1].cursor
    assert [m["cursor"] for m in first if m["type"] == "event"] == [one.cursor for one in known[2:]]
    assert second == [
        {"type": "subscribed", "id": "1", "job_id": JOB, "resumed_from": known[-1].cursor},
        {"type": "end", "id": "1", "reason": "ended", "cursor": known[-1].cursor},
    ]


async def test_subscriptions_of_one_websocket_do_not_mix(gateway: Served) -> None:
    """100 jobs, each with its own id and its own events."""
    jobs = {str(number): f"acme.{number}-{'x' * number}" for number in range(100)}
    async with websocket(gateway) as client:
        for id_, job_id in jobs.items():
            gateway.log.publish(job_id, ["a"], end=None)
            await client.send("subscribe", id=id_, job_id=job_id)
        await eventually(lambda: gateway.log.open_feeds == 100)
        for job_id in jobs.values():
            gateway.log.publish(job_id, ["b"], attempt="a2")
        received: dict[str, list[str]] = {id_: [] for id_ in jobs}
        ended = 0
        while ended < 100:
            message = await client.receive()
            ended += message["type"] == "end"
            if message["type"] == "event":
                assert message["event"]["job_id"] == jobs[message["id"]]
                received[message["id"]].append(message["event"]["type"])

    assert set(map(tuple, received.values())) == {("started", "delta", "started", "delta", "usage")}


async def test_unsubscribe_ends_one_subscription(gateway: Served) -> None:
    """Its id may be used again; the others go on."""
    gateway.log.publish(JOB, ["a"], end=None)
    async with websocket(gateway) as client:
        for id_ in ("1", "2"):
            await client.send("subscribe", id=id_, job_id=JOB)
            await client.until("live")
        await client.send("unsubscribe", id="1")
        ended = await client.receive()
        await client.send("subscribe", id="1", job_id=JOB)
        await client.until("live")
        gateway.log.publish(JOB, [], attempt="a2")
        ends = [*await client.until("end"), *await client.until("end")]

    assert ended == {"type": "end", "id": "1", "reason": "unsubscribed"} | {
        "cursor": gateway.log.events[JOB][1].cursor
    }
    assert {m["id"] for m in ends if m["type"] == "end"} == {"1", "2"}


@pytest.mark.parametrize("cursor", [None, "3.0.w"])
async def test_unsubscribe_before_the_feed_is_open_ends_the_subscription(
    gateway: Served, cursor: str | None
) -> None:
    """A view may subscribe and be gone in one turn. The end has the cursor that the client gave."""
    gateway.log.publish(JOB, ["a"], end=None)
    async with websocket(gateway) as client:
        await client.send("subscribe", id="1", job_id=JOB, cursor=cursor)
        await client.send("unsubscribe", id="1")
        ended = (await client.until("end"))[-1]
        await client.send("subscribe", id="1", job_id=JOB)
        again = await client.until("live")

    # Where the feed was open already, its own cursor counts.
    assert (ended["id"], ended["reason"]) == ("1", "unsubscribed")
    assert again[0]["type"] == "subscribed"
    assert gateway.log.open_feeds == 0


async def test_subscription_whose_feed_fails_ends_alone(gateway: Served) -> None:
    """With an error and the cursor from which to subscribe again."""
    gateway.log.publish(JOB, ["a"], end=None)
    async with websocket(gateway) as client:
        await client.send("subscribe", id="1", job_id=JOB)
        await client.until("live")
        gateway.log.error = BrokerUnavailable("gone")
        gateway.log.changed.notify()
        ended = await client.receive()
        error = await client.receive()
        await client.send("ping")
        pong = await client.receive()

    assert (ended["type"], ended["reason"]) == ("end", "error")
    assert ended["cursor"] == gateway.log.events[JOB][1].cursor
    assert (error["type"], error["id"], error["error"]["code"]) == ("error", "1", "broker_unavailable")
    assert pong == {"type": "pong"}


# Jobs


async def test_job_submitted_over_a_websocket_is_followed(gateway: Served) -> None:
    """`submitted`, then as `subscribe`."""
    async with websocket(gateway) as client:
        await client.send("submit", id="1", job={"request": REQUEST}, subscribe=True, key="conversation")
        submitted = await client.receive()
        subscribed = await client.receive()
        gateway.log.publish(submitted["job_id"], ["a"])
        messages = await client.until("end")

    [(topic, key, record)] = gateway.writer.records
    assert submitted == {"type": "submitted", "id": "1"} | {
        "job_id": record["job_id"],
        "cursor": f"{gateway.log.partition(record['job_id'])}.0.w",
    }
    assert (topic, key) == ("streamworker.jobs", "conversation")
    assert record["metadata"] == {"tenant": "acme"}
    assert (subscribed["type"], subscribed["job_id"]) == ("subscribed", record["job_id"])
    assert [m["event"]["type"] for m in messages if m["type"] == "event"] == ["started", "delta", "usage"]


async def test_job_is_cancelled_over_a_websocket(gateway: Served) -> None:
    """`cancelling` says that the command is written."""
    async with websocket(gateway) as client:
        await client.send("cancel", id="c", job_id=JOB, reason="not needed")
        answer = await client.receive()

    assert answer == {"type": "cancelling", "id": "c"}
    [(topic, key, record)] = gateway.writer.records
    assert (topic, key) == ("streamworker.control", JOB)
    assert record == {"type": "cancel", "job_id": JOB, "reason": "not needed", "v": 1}


@pytest.mark.parametrize(
    ("key", "message", "code"),
    [
        (ACME, {"type": "subscribe", "job_id": "other.1"}, "job_not_found"),
        (ACME, {"type": "cancel", "job_id": "other.1"}, "job_not_found"),
        (ACME, {"type": "subscribe", "job_id": "acme.no-time"}, "job_not_found"),
        (ACME, {"type": "subscribe", "job_id": JOB, "cursor": "nonsense"}, "invalid_cursor"),
        (ACME, {"type": "subscribe", "job_id": JOB, "since": "yesterday"}, "invalid_request"),
        (ACME, {"type": "submit", "job": {}}, "invalid_job"),
        (ACME, {"type": "submit", "job": {"request": REQUEST, "job_id": "other.1"}}, "outside_tenant"),
        (ACME, {"type": "submit", "job": {"request": REQUEST, "reply_to": "t"}}, "invalid_job"),
        (ACME, {"type": "submit", "job": {"request": REQUEST}, "key": ""}, "invalid_request"),
        (ACME, {"type": "unsubscribe"}, "invalid_request"),
        (READ_ONLY, {"type": "submit", "job": {"request": REQUEST}}, "insufficient_scope"),
        (READ_ONLY, {"type": "cancel", "job_id": JOB}, "insufficient_scope"),
    ],
)
async def test_message_that_cannot_be_carried_out_is_an_error_with_its_id(
    gateway: Served, key: str, message: dict[str, Any], code: str
) -> None:
    """The connection goes on."""
    async with websocket(gateway, key) as client:
        await client.socket.send(json.dumps({"id": "7", **message}))
        error = await client.receive()
        await client.send("ping")
        pong = await client.receive()

    assert (error["type"], error["id"], error["error"]["code"]) == ("error", "7", code)
    assert set(error["error"]) >= {"message", "type", "param", "code", "retriable"}
    assert pong == {"type": "pong"}
    assert gateway.writer.records == []


# Messages that are not of the protocol


@pytest.mark.parametrize(
    "message",
    [
        "",
        "nonsense",
        "[]",
        "1",
        "{}",
        '{"type":"shout"}',
        '{"type":1}',
        '{"type":"subscribe"}',
        '{"type":"subscribe","id":"1"}',
        '{"type":"subscribe","id":"","job_id":"acme.1"}',
        '{"type":"subscribe","id":1,"job_id":"acme.1"}',
        '{"type":"subscribe","id":"1","job_id":"a b"}',
        '{"type":"subscribe","id":"1","job_id":"acme.1","replay":"all"}',
        '{"type":"subscribe","id":"1","job_id":"acme.1","cursor":7}',
        '{"type":"subscribe","id":"1","job_id":"acme.1","extra":7}',
        '{"type":"submit","id":"1","job":"text"}',
        '{"type":"cancel","id":"1","job_id":"acme.1","reason":"' + "x" * 501 + '"}',
        '{"type":"auth","token":null}',
        '{"type":"ping","id":"1","id":' + "[" * 5000,
        b"binary",
    ],
)
async def test_message_that_is_not_of_the_protocol_closes_with_4400(
    gateway: Served, message: str | bytes
) -> None:
    """The error before the close does not repeat it."""
    async with websocket(gateway) as client:
        await client.socket.send(message)
        code, messages = await client.closed()

    assert code == 4400
    assert all(m["type"] == "error" and m["error"]["code"] == "invalid_request" for m in messages)
    assert "shout" not in json.dumps(messages)


async def test_id_that_is_in_use_closes_with_4400(gateway: Served) -> None:
    """An error message with it would be taken for one of the open subscription."""
    gateway.log.publish(JOB, ["a"], end=None)
    async with websocket(gateway) as client:
        await client.send("subscribe", id="1", job_id=JOB)
        await client.until("live")
        await client.send("subscribe", id="1", job_id=JOB)
        code, _ = await client.closed()

    assert code == 4400
    assert gateway.log.open_feeds == 0


async def test_id_that_is_in_use_by_a_message_that_has_not_begun_closes_with_4400(gateway: Served) -> None:
    """Both messages come in one read, and nothing is left of the first one."""
    gateway.log.publish(JOB, ["a"], end=None)
    async with websocket(gateway) as client:
        sent = b"".join(_masked({"type": "subscribe", "id": "1", "job_id": JOB}) for _ in range(2))
        client.socket.transport.write(sent)
        code, _ = await client.closed()

    assert code == 4400
    assert gateway.log.open_feeds == 0


async def test_subscription_and_its_end_in_one_read(gateway: Served) -> None:
    """The subscription has not begun when its end is read; the end has the cursor that the client gave."""
    gateway.log.publish(JOB, ["a"], end=None)
    async with websocket(gateway) as client:
        subscribe = {"type": "subscribe", "id": "1", "job_id": JOB, "cursor": "3.0.w"}
        client.socket.transport.write(_masked(subscribe) + _masked({"type": "unsubscribe", "id": "1"}))
        ended = await client.receive()
        await client.send("ping")
        pong = await client.receive()

    assert ended == {"type": "end", "id": "1", "reason": "unsubscribed", "cursor": "3.0.w"}
    assert pong == {"type": "pong"}


def _masked(value: dict[str, Any]) -> bytes:
    """Return a value as a text frame of a client, masked with zeros."""
    payload = json.dumps(value).encode()
    assert len(payload) < 126
    return bytes([0x81, 0x80 | len(payload), 0, 0, 0, 0]) + payload


@pytest.mark.parametrize(
    ("size", "type_", "code"), [(70_000, "auth", 1009), (1_100_000, "submit", 1009), (70_000, "submit", None)]
)
async def test_message_that_is_too_large_closes_with_1009(
    gateway: Served, size: int, type_: str, code: int | None
) -> None:
    """64 KiB, and a job's limit for `submit`."""
    text = "x" * size
    members = {"token": text} if type_ == "auth" else {"id": "1", "job": {"request": REQUEST, "job_id": text}}
    async with websocket(gateway) as client:
        await client.send(type_, **members)
        if code is None:
            assert (await client.receive())["error"]["code"] == "invalid_job"
        else:
            assert (await client.closed())[0] == code


async def test_messages_in_fragments_are_put_together(gateway: Served) -> None:
    """RFC 6455 section 5.4."""
    async with websocket(gateway) as client:
        await client.socket.send(part for part in ['{"type"', ':"pi', 'ng"}'])
        assert await client.receive() == {"type": "pong"}


# Limits and ends


async def test_websocket_has_256_subscriptions_at_most(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more is refused; those that are open stay."""
    monkeypatch.setattr(websocket_session, "MAX_SUBSCRIPTIONS", 2)
    gateway.log.publish(JOB, ["a"], end=None)
    async with websocket(gateway) as client:
        for id_ in ("1", "2"):
            await client.send("subscribe", id=id_, job_id=JOB)
            await client.until("live")
        await client.send("subscribe", id="3", job_id=JOB)
        error = await client.receive()
        open_feeds = gateway.log.open_feeds

    assert (error["id"], error["error"]["code"]) == ("3", "too_many_streams")
    assert open_feeds == 2
    await eventually(lambda: gateway.log.open_feeds == 0)


async def test_websocket_with_all_of_its_subscriptions_submits_and_cancels(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that follows as many jobs as it may can stop them. A submit that subscribes is a subscription."""
    monkeypatch.setattr(websocket_session, "MAX_SUBSCRIPTIONS", 1)
    gateway.log.publish(JOB, ["a"], end=None)
    async with websocket(gateway) as client:
        await client.send("subscribe", id="1", job_id=JOB)
        await client.until("live")
        await client.send("cancel", id="2", job_id=JOB)
        assert await client.receive() == {"type": "cancelling", "id": "2"}
        await client.send("submit", id="3", job={"request": REQUEST})
        assert (await client.receive())["type"] == "submitted"
        await client.send("submit", id="4", job={"request": REQUEST}, subscribe=True)
        assert (await client.receive())["error"]["code"] == "too_many_streams"


async def test_websocket_has_256_unanswered_messages_at_most(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Kafka does not acknowledge; subscriptions are counted apart."""
    monkeypatch.setattr(websocket_session, "MAX_UNANSWERED", 1)
    gateway.log.publish(JOB, ["a"], end=None)
    gateway.writer.gate = asyncio.Event()
    async with websocket(gateway) as client:
        await client.send("cancel", id="1", job_id=JOB)
        await client.send("cancel", id="2", job_id=JOB)
        error = await client.receive()
        await client.send("subscribe", id="3", job_id=JOB)
        assert (await client.receive())["type"] == "subscribed"
        gateway.writer.gate.set()
        await client.until("cancelling")
        await client.send("cancel", id="2", job_id=JOB)
        assert await client.until("cancelling")

    assert (error["id"], error["error"]["code"]) == ("2", "too_many_requests")


async def test_websocket_over_the_limit_of_its_key_is_refused(tmp_path: Path) -> None:
    """429 before the upgrade, 4429 behind it."""
    async with served(tmp_path, limits={"max_streams": 1}) as gateway, websocket(gateway):
        with pytest.raises(InvalidStatus) as refused:
            async with websocket(gateway):
                pass
        async with websocket(gateway, None) as client:
            await client.send("auth", token=ACME)
            code, messages = await client.closed()

    assert refused.value.response.status_code == 429
    assert code == 4429
    assert messages[0]["error"]["code"] == "too_many_streams"


async def test_websocket_with_its_key_as_a_subprotocol_counts_as_a_request(tmp_path: Path) -> None:
    """As it does with a header."""
    protocols = ("streamworker.v1", f"bearer.{ACME}")
    async with served(tmp_path, limits={"requests_per_minute": 1}) as gateway:
        async with websocket(gateway, None, protocols=protocols):
            pass
        with pytest.raises(InvalidStatus) as refused:
            async with websocket(gateway, None, protocols=protocols):
                pass

    assert refused.value.response.status_code == 429


async def test_websocket_messages_count_as_requests(tmp_path: Path) -> None:
    """The allowance of the key is for both."""
    async with served(tmp_path, limits={"requests_per_minute": 3}) as gateway, websocket(gateway) as client:
        for number in range(3):
            await client.send("cancel", id=str(number), job_id=JOB)
        types = [(await client.receive())["type"] for _ in range(3)]

    assert sorted(types) == ["cancelling", "cancelling", "error"]


@pytest.mark.parametrize(
    ("settings", "reason", "code"),
    [({"max_stream_age_s": 0.1}, "age", 1012), ({"drain_s": 0.1}, "shutdown", 1012)],
)
async def test_websocket_that_ends_asks_its_client_to_connect_again(
    tmp_path: Path, settings: dict[str, Any], reason: str, code: int
) -> None:
    """With a time that is drawn for each connection."""
    async with served(tmp_path, **settings) as gateway, websocket(gateway) as client:
        gateway.log.publish(JOB, ["a"], end=None)
        await client.send("subscribe", id="1", job_id=JOB)
        if reason == "shutdown":
            gateway.gateway.drain.begin()
        closed, messages = await client.closed()
        await eventually(lambda: gateway.log.open_feeds == 0)

    assert closed == code
    assert messages[-1]["type"] == "closing"
    assert messages[-1]["reason"] == reason
    assert 1000 <= messages[-1]["reconnect_after_ms"] <= 5000


async def test_websocket_whose_token_expires_is_closed_with_4401(gateway: Served) -> None:
    """Unless it is renewed before."""
    tokens = gateway.gateway.authenticator.tokens
    gateway.log.publish(JOB, ["a"], end=None)
    async with websocket(gateway, tokens.sign([JOB], "read", 2)[0]) as client:
        await client.send("subscribe", id="1", job_id=JOB)
        token, expires_at = tokens.sign([JOB], "read", 3)
        await client.send("auth", token=token)
        await client.until("welcome")
        code, messages = await client.closed()

    assert code == 4401
    assert messages[-1] == {"type": "closing", "reason": "token_expired"} | {
        "reconnect_after_ms": messages[-1]["reconnect_after_ms"]
    }
    assert time.time() > expires_at - 0.1


async def test_websocket_of_a_removed_key_is_closed_with_4401(tmp_path: Path) -> None:
    """Also one that only listens. One whose key is still there stays open."""
    async with served(tmp_path, keep_alive_s=0.05) as gateway:
        gateway.log.publish(JOB, ["a"], end=None)
        async with websocket(gateway) as client, websocket(gateway, ALL) as other:
            await client.send("subscribe", id="1", job_id=JOB)
            await client.until("live")
            file = tmp_path / "keys.toml"
            gateway.gateway.authenticator._keys._checked = -100.0
            file.write_text(file.read_text().replace("[keys.k0]", "[keys.another]"))
            code, messages = await client.closed()
            await other.send("ping")
            assert (await other.receive())["type"] == "pong"

    assert code == 4401
    assert (messages[-1]["type"], messages[-1]["reason"]) == ("closing", "token_expired")


async def test_websocket_renewed_for_other_jobs_is_closed_with_4403(gateway: Served) -> None:
    """A subscription does not outlive the right to it."""
    gateway.log.publish(JOB, ["a"], end=None)
    async with websocket(gateway) as client:
        await client.send("subscribe", id="1", job_id=JOB)
        await client.until("live")
        await client.send("auth", token=ALL)
        await client.until("welcome")
        await client.send("auth", token=OTHER)
        code, _ = await client.closed()

    assert code == 4403


async def test_subscription_that_opens_while_the_credential_changes_is_checked_again(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new credential does not allow the job, which does not exist for it."""
    gateway.log.publish(JOB, ["a"], end=None)
    opened, go_on, open_feed = asyncio.Event(), asyncio.Event(), gateway.log.open

    async def slowly(*arguments: Any, **options: Any) -> Any:
        opened.set()
        await go_on.wait()
        return await open_feed(*arguments, **options)

    monkeypatch.setattr(gateway.log, "open", slowly)
    async with websocket(gateway) as client:
        await client.send("subscribe", id="1", job_id=JOB)
        await opened.wait()
        await client.send("auth", token=OTHER)
        await client.until("welcome")
        go_on.set()
        refused = await client.receive()

    assert (refused["type"], refused["id"], refused["error"]["code"]) == ("error", "1", "job_not_found")
    assert gateway.log.open_feeds == 0


async def test_websocket_client_that_reads_nothing_is_disconnected(tmp_path: Path) -> None:
    """What waits for it is bounded; the events stay in the log."""
    async with served(tmp_path, stall_s=0.3) as gateway:
        gateway.log.publish(JOB, ["x" * 10_000] * 2000, end=None)
        async with websocket(gateway, max_queue=1, close_timeout=0.1) as client:
            await client.send("subscribe", id="1", job_id=JOB)
            await eventually(lambda: gateway.log.open_feeds == 1)
            await eventually(lambda: gateway.unsent_bytes > 0)
            waiting = gateway.unsent_bytes
            await eventually(lambda: gateway.log.open_feeds == 0)

    assert gateway.metric("gateway_streams_closed_total", face="websocket", reason="stalled") == 1
    assert waiting < 1_000_000


def narrow_socket(gateway: Served) -> socket.socket:
    """Return a connected socket that the system buffers little for."""
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 131_072)
    narrow.connect(gateway.address)
    narrow.setblocking(False)
    return narrow


async def test_websocket_subscription_that_gets_no_turn_ends_alone(tmp_path: Path) -> None:
    """Its client takes the events of others; what it has not got can be had with the cursor, on the same connection."""
    jobs = [f"acme.job{number}" for number in range(8)]
    cursors = dict.fromkeys(jobs, "")
    async with served(tmp_path, stall_s=1) as gateway:
        for job_id in jobs:
            gateway.log.publish(job_id, ["x" * 10_000] * 500, end=None)
        async with websocket(gateway, max_queue=1, close_timeout=0.1, sock=narrow_socket(gateway)) as client:
            for job_id in jobs:
                await client.send("subscribe", id=job_id, job_id=job_id)
            while (message := await client.receive())["type"] != "end":
                if message["type"] == "event":
                    cursors[message["id"]] = message["cursor"]
                    await asyncio.sleep(0.03)  # the pace of this client
            stalled = message["id"]
            known = [one.cursor for one in gateway.log.events[stalled]]
            assert message["reason"] == "stalled"
            assert cursors[stalled] == (message["cursor"] if message["cursor"] in known else "")

            await client.send("ping")
            await client.until("pong")
            assert 0 < gateway.log.open_feeds < len(jobs)
            for job_id in jobs:
                await client.send("unsubscribe", id=job_id)
            await eventually(lambda: gateway.log.open_feeds == 0)
            await client.send("subscribe", id="again", job_id=stalled, cursor=message["cursor"])
            event = await client.receive()
            while event["type"] != "event" or event["id"] != "again":
                event = await client.receive()

    assert event["cursor"] == known[known.index(cursors[stalled]) + 1 if cursors[stalled] else 0]
    closed = "gateway_streams_closed_total"
    assert gateway.metric(closed, face="subscription", reason="stalled") >= 1
    assert gateway.metric(closed, face="websocket", reason="stalled") == 0


async def test_websocket_with_many_subscriptions_that_reads_nothing_is_written_little(tmp_path: Path) -> None:
    """They write one after another, not all of them whenever there is room."""
    async with served(tmp_path, stall_s=0.5) as gateway:
        jobs = [f"acme.job{number}" for number in range(100)]
        for job_id in jobs:
            gateway.log.publish(job_id, ["x" * 10_000] * 50, end=None)
        most = 0
        async with websocket(gateway, max_queue=1, close_timeout=0.1, sock=narrow_socket(gateway)) as client:
            for job_id in jobs:
                await client.send("subscribe", id=job_id, job_id=job_id)
            await eventually(lambda: gateway.log.open_feeds == len(jobs))
            while gateway.log.open_feeds:
                most = max(most, gateway.unsent_bytes)
                await asyncio.sleep(0.01)

    assert 0 < most < 300_000
    assert gateway.metric("gateway_streams_closed_total", face="websocket", reason="stalled") == 1


async def test_websocket_subscription_of_a_quiet_job_gets_fresh_cursors(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that resumes with one skips what was searched."""
    monkeypatch.setattr(websocket_subscription, "POSITION_S", 0.05)
    monkeypatch.setattr(websocket_session, "LOOK_S", 0.02)
    async with websocket(gateway) as client:
        await client.send("subscribe", id="1", job_id=(job_id := f"acme.{new_job_id()}"))
        await client.until("live")
        position = await client.receive()
        assert position == {
            "type": "event",
            "id": "1",
            "cursor": f"{gateway.log.partition(job_id)}.99.w",
            "event": {"type": "position"},
        }
        gateway.log.publish(job_id, ["a"])
        messages = await client.until("end")

    kinds = [message["event"]["type"] for message in messages if message["type"] == "event"]
    assert [kind for kind in kinds if kind != "position"] == ["started", "delta", "usage"]


async def test_websocket_subscription_of_a_busy_job_gets_no_positions(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its events have cursors."""
    monkeypatch.setattr(websocket_subscription, "POSITION_S", 1.0)
    monkeypatch.setattr(websocket_session, "LOOK_S", 0.1)
    async with websocket(gateway) as client:
        await client.send("subscribe", id="1", job_id=JOB, cursor=await gateway.log.place(JOB))
        await client.until("live")
        for _ in range(6):
            gateway.log.publish(JOB, ["a"], end=None)
            await asyncio.sleep(0.25)
        gateway.log.publish(JOB, [])
        messages = await client.until("end")

    assert "position" not in {message["event"]["type"] for message in messages if message["type"] == "event"}


async def test_websocket_client_that_leaves_releases_its_subscriptions(gateway: Served) -> None:
    """Whether it says goodbye or not."""
    gateway.log.publish(JOB, ["a"], end=None)
    async with websocket(gateway) as client:
        await client.send("subscribe", id="1", job_id=JOB)
        await client.until("live")
        client.socket.transport.abort()
        await eventually(lambda: gateway.log.open_feeds == 0)

    assert gateway.metric("gateway_streams_open", face="websocket") == 0


# Frames


def test_read_returns_the_message_or_says_what_is_wrong() -> None:
    """Lone surrogates are repaired, as in job records."""
    assert read(b'{"type":"ping"}', 10) == Ping()
    assert read(b'{"type":"cancel","id":"1","job_id":"a"}', 10) == Cancel(id="1", job_id="a")
    found = read(b'{"type":"submit","id":"1","job":{"request":{"a":"\\ud83d"}}}', 1000)
    assert isinstance(found, Submit)
    assert isinstance(read(b'{"type":"subscribe","id":"1","job_id":"a"}', 10), Subscribe)
    with pytest.raises(BadFrame, match="type must be auth, subscribe, unsubscribe, submit, cancel or ping"):
        read(b'{"type":"secret"}', 10)
    with pytest.raises(OverflowError):
        read(b'{"type":"submit","id":"1","job":{}}', 10)
