"""Distinctive secrets in every setting and request, and a search for them in every output."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web

from streamworker.app import App
from streamworker.config import load
from streamworker.demo.child import free_port
from streamworker.gateway.app import GatewayApp
from streamworker.gateway.keys import digest_of
from streamworker.kafka.acls import worker_acls
from tests.brokers.security import unsigned_token
from tests.integration.secured import way_in
from tests.integration.stage import Stage, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

    from streamworker.demo.broker import EmbeddedBroker
    from streamworker.practice import PracticeUpstream
    from tests.brokers.apache import ApacheKafka
    from tests.integration.secured import Acls

# The redactor must not recognize these values by a prefix or by their shape.
KEY = "canaryKEYq7Zt1"
FILE_KEY = "canaryFILEKEYw8Yu2"
WRONG = "canaryWRONGe9Xi3"
PROMPT = "canaryPROMPTr0Co4"
METADATA = "canaryMETAt1Vp5"
TEXT = "canaryTEXTy2Ba6"
USERINFO = "canaryUSERu3Ns7"

# An injected bug whose exceptions contain the prompt and the key.
BUG = """
import os
from streamworker.worker import runner

def fall(job, **_):
    prompt = bytes(job.request["messages"])
    with open(os.environ["STREAMWORKER_UPSTREAMS__DEFAULT__API_KEY_FILE"]) as file:
        key = file.read()
    try:
        raise PermissionError(f"Bearer {key}, {key}")
    except PermissionError as error:
        error.add_note(key)
        return int(prompt)

runner.request_body = fall
"""


# The same in the gateway.
GATEWAY_BUG = """
from streamworker.gateway import chat
read_request = chat.read_request

def fall(body, headers, **how):
    if b"falls" not in body:
        return read_request(body, headers, **how)
    raise ValueError(f"{headers['authorization']}: {body!r}")

chat.read_request = fall
"""

# Of the gateway's clients.
API_KEY = "swk_canaryAPIKEYf5Hk2"
WRONG_API_KEY = "swk_canaryWRONGAPIg6Lm9"
WRONG_TOKEN = "canaryWRONGTOKENh7Pq1"
TOKEN_SECRET = base64.urlsafe_b64encode(b"canaryTOKENSECRETj8Rs3 of 32 bytes or more").decode().rstrip("=")


class Echo:
    """An upstream whose errors contain the key, the header and the prompt of the request."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        header = request.headers["authorization"]
        echoed = f"Authorization: {header} ({header.split()[1]}) {json.dumps(body['messages'])}"
        match body["model"]:
            case "echo-401":
                return web.json_response(
                    {"error": {"message": echoed}}, status=401, headers={"x-echo": echoed}
                )
            case "echo-html":
                return web.Response(text=f"<pre>{echoed}</pre>", content_type="text/html")
            case "echo-500":
                return web.Response(text=echoed, status=500)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(f"data: {json.dumps({'error': {'message': echoed}})}\n\n".encode())
        return response

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": str(dict(request.headers))}}, status=401)


@pytest.fixture
async def echo() -> AsyncIterator[str]:
    """The base URL of an `Echo`."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", Echo().answer)
    app.router.add_get("/v1/models", Echo().models)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    await runner.cleanup()


async def command(environment: Mapping[str, str], *arguments: str) -> str:
    """Run a command to its end; return its output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "streamworker", *arguments),
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    return output.decode()


def found(texts: Mapping[str, str], secrets: Mapping[str, str]) -> list[str]:
    """Return the names of the secrets that the texts contain, with their places."""
    return [
        f"{name} in {where}"
        for where, text in texts.items()
        for name, secret in secrets.items()
        if secret in text
    ]


async def test_secrets_are_in_no_output(
    apache: Stage,
    acls: Acls,
    apache_kafka: ApacheKafka,
    echo: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After success, retries, echoes, a crash and rejections, keys are nowhere, and prompts only in records."""
    monkeypatch.setenv("CANARY_KEY", KEY)
    file = tmp_path / "key"
    file.write_text(FILE_KEY)
    port = free_port()
    apache.variables |= way_in(apache_kafka, "SCRAM-SHA-512", tmp_path) | {
        "UPSTREAMS__DEFAULT__API_KEY_ENV": "CANARY_KEY",
        "UPSTREAMS__ECHO__BASE_URL": echo,
        "UPSTREAMS__ECHO__API_KEY_FILE": str(file),
        "UPSTREAMS__ECHO__MODELS": "echo-*",
        "UPSTREAMS__ECHO__MAX_TRIES": "2",
        "UPSTREAMS__REFUSING__BASE_URL": echo,  # apart, because a refused key holds its upstream
        "UPSTREAMS__REFUSING__API_KEY_FILE": str(file),
        "UPSTREAMS__REFUSING__MAX_WAIT_S": "1",
        "WORKER__GROUP_INSTANCE_ID": "canary",  # the second worker takes over at once
        "TELEMETRY__LOG_LEVEL": "debug",
        "TELEMETRY__HTTP_PORT": str(port),
    }
    environment = {f"STREAMWORKER_{name}": value for name, value in apache.variables.items()}
    await acls.give(worker_acls(load(None, environment, needs_keys=False)))
    messages = [{"role": "user", "content": PROMPT}]
    apache.message = lambda job_id: messages  # type: ignore[method-assign]
    members: dict[str, Any] = {"metadata": {"tenant": METADATA}}

    process = await apache.process()
    await apache.submit("slow", f"practice?text={TEXT}&deltas=15&pace_ms=60", **members)
    await apache.until(lambda: apache.deltas("slow") > 3)
    await process.kill()
    process = await apache.process()
    await process.logged("worker.started")
    said = f"practice?text={TEXT}&deltas=3"
    jobs = [("fine", said), ("retried", f"{said}&status=503&times=1"), ("broken", f"{said}&break_after=2")]
    await apache.submit_many([(job_id, model, 0) for job_id, model in jobs], **members)
    echoes = [(model, model, 0) for model in ("echo-html", "echo-500", "echo-frame")]
    await apache.submit_many(echoes, upstream="echo", **members)
    await apache.submit("echo-401", "echo-401", upstream="refusing", **members)
    await apache.submit_bytes(json.dumps({"request": {"messages": messages}, "metadata": METADATA}).encode())
    await apache.submit_bytes(
        f'{{"request": "{PROMPT}'.encode(), headers=[("traceparent", PROMPT.encode() + b"\r\nx: y")]
    )
    letters = await apache.dead_letters(2)
    await apache.ended()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        pages = [await (await session.get(path)).text() for path in ("/livez", "/readyz", "/metrics")]
    checked = await command(environment, "check")
    process.signal(15)  # type: ignore[arg-type]
    await process.exit_code()
    refused = await command(
        {name: value for name, value in environment.items() if "PASSWORD" not in name}
        | {"STREAMWORKER_KAFKA__SASL_PASSWORD": WRONG},
        "run",
    )
    toml = tmp_path / "bad.toml"
    toml.write_text(
        f"[kafka]\nsasl_password = '{WRONG}'\nsasl_oauth_token = '{WRONG}'\n[upstreams.a]\nbase_url = 'http://u:{USERINFO}@h/v1'\n"
        f"api_key = '{WRONG}'\n[upstreams.b]\nbase_url = 'http://h/v1'\napi_key_env = 'sk-{WRONG}'\n"
    )
    bad = await command({}, "check", "--config", str(toml))

    logs = "".join(repr(process.log()) for process in apache.processes)
    assert logs.count("'event': 'job.") >= 7
    assert "Invalid" in refused or "invalid" in refused, refused
    assert "401" in checked or "auth" in checked, checked
    key_of_certificate = apache_kafka.credentials.key.read_text().splitlines()[1]
    keys = {
        "key": KEY, "file key": FILE_KEY, "wrong": WRONG, "password": apache_kafka.credentials.password,
        "user info": USERINFO, "TLS key": key_of_certificate,
    }  # fmt: skip
    contents = {"prompt": PROMPT, "text": TEXT, "metadata": METADATA}
    outputs = {"logs": logs, "pages": "".join(pages), "check": checked, "run": refused, "faults": bad}
    assert found(outputs, keys) == []
    assert PROMPT not in logs
    assert METADATA not in logs
    assert TEXT not in re.sub(r"practice\?text=\w+", "", logs)  # the model's name, as the job gave it
    assert found({"check": checked, "pages": "".join(pages), "run": refused}, contents) == []

    events = [(record.event, json.dumps(record.event) + str(record.headers)) for record in apache.records]
    for event, text in events:
        assert found({event["type"]: text}, keys) == []
        if event["type"] != "usage" or event["error"] is None:
            assert PROMPT not in text
        if event["type"] == "usage":
            assert TEXT not in text
    ends = {event["job_id"]: event for event, _ in events if event["type"] == "usage"}
    for job_id, _, _ in echoes:  # the upstream echoed the secrets, and they were removed
        assert "***" in json.dumps(ends[job_id]["error"])
    assert any(TEXT in text for event, text in events if event["type"] == "delta")
    assert any(PROMPT in letter.value.decode() for letter in letters)
    for letter in letters:
        assert found({"headers": str(letter.headers[-7:]), "value": letter.value.decode()}, keys) == []
        assert found({"headers": str(letter.headers[-7:])}, contents) == []


def open_gateway(stage: Stage, directory: Path) -> None:
    """Write the files of keys and secrets; name them in the stage's settings."""
    keys, secrets = directory / "gateway-keys.toml", directory / "token-secrets"
    keys.write_text(
        f'[keys.canary]\nsha256 = "{digest_of(API_KEY)}"\ntenant = "acme"\n'
        'scopes = ["submit", "read", "cancel", "token"]\n'
    )
    secrets.write_text(f"one:{TOKEN_SECRET}\n")
    stage.variables |= {
        "GATEWAY__KEYS_FILE": str(keys),
        "GATEWAY__TOKEN_SECRETS_FILE": str(secrets),
        "TELEMETRY__LOG_LEVEL": "debug",
    }


class GatewayClient:
    """Makes requests with good and bad credentials; keeps what the gateway answered."""

    def __init__(self, port: int, http: aiohttp.ClientSession) -> None:
        self.port = port
        self.http = http
        self.answers: dict[str, str] = {}

    async def call(
        self, name: str, method: str, path: str, *, key: str = API_KEY, status: int, **options: Any
    ) -> str:
        """Send a request; return the body. `name` says which answer it is."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        url = f"http://127.0.0.1:{self.port}{path}"
        async with self.http.request(method, url, headers=headers, **options) as response:
            body = await response.text()
        assert response.status == status, body
        self.answers[name] = f"{dict(response.headers)} {body}"
        return body

    async def websocket(self, token: str, sent: Sequence[Any], *, until: str) -> None:
        """Connect with a token as a subprotocol and send messages; read to the first message of a type, or to the end."""
        url = f"ws://127.0.0.1:{self.port}/v1/ws"
        async with self.http.ws_connect(url, protocols=("streamworker.v1", f"bearer.{token}")) as socket:
            for message in sent:
                await socket.send_str(message if isinstance(message, str) else json.dumps(message))
            said = []
            async for message in socket:
                said.append(str(message.data))
                if json.loads(message.data)["type"] == until:
                    break
        self.answers[f"websocket to {until}"] = f"{socket.protocol} {''.join(said)} {socket.close_code}"


async def test_secrets_are_in_no_output_of_the_gateway(apache: Stage, tmp_path: Path) -> None:
    """Neither keys, tokens nor prompts, in all ways in which clients give them, with faults, and after a crash."""
    port, probes = free_port(), free_port()
    open_gateway(apache, tmp_path)
    await apache.open()
    worker = await apache.process()
    apache.bug = GATEWAY_BUG
    gateway = await apache.start_command("gateway", {"gateway__port": port, "telemetry__http_port": probes})
    await gateway.logged("gateway.started")
    await worker.logged("partition.opened")
    model = f"practice?text={TEXT}&deltas=3"
    request = {"model": model, "messages": [{"role": "user", "content": PROMPT}]}
    async with aiohttp.ClientSession() as http:
        client = GatewayClient(port, http)
        job = json.loads(
            await client.call(
                "job", "POST", "/v1/jobs?token=read", status=202,
                json={"request": request, "metadata": {"session": METADATA}},
            )
        )  # fmt: skip
        token = job.pop("read_token")
        client.answers["job"] = json.dumps(job)
        await client.call("events", "GET", f"{job['events_url']}&access_token={token}", key="", status=200)
        await client.call("state", "GET", f"/v1/jobs/{job['job_id']}", key=token, status=200)
        await client.call("chat", "POST", "/v1/chat/completions", status=200, json=request)
        stream = request | {"stream": True}
        await client.call("chat stream", "POST", "/v1/chat/completions", status=200, json=stream)
        falls = request | {"user": "falls"}
        await client.call("crash", "POST", "/v1/chat/completions", status=500, json=falls)
        for key in (WRONG_API_KEY, WRONG_TOKEN, f"{token}x"):
            await client.call(f"refused {key[:9]}", "GET", f"/v1/jobs/{job['job_id']}", key=key, status=401)
        wrong = f"{job['events_url']}&access_token={WRONG_TOKEN}"
        await client.call("refused in the query", "GET", wrong, key="", status=401)
        await client.call(
            "key in the query", "GET", f"{job['events_url']}&access_token={API_KEY}", key="", status=401
        )
        await client.call(
            "unknown path", "GET", f"/v1/none?access_token={token}&prompt={PROMPT}", key="", status=404
        )
        await client.call("not JSON", "POST", "/v1/jobs", status=400, data=f'{{"request": "{PROMPT}')
        bad = {"request": request | {"messages": PROMPT}, "deadline": METADATA}
        await client.call("bad job", "POST", "/v1/jobs", status=400, json=bad)
        subscribe = {"type": "subscribe", "id": "1", "job_id": job["job_id"]}
        await client.websocket(token, [subscribe], until="end")
        submit = {"type": "submit", "id": "1", "job": {"request": request}, "subscribe": True}
        await client.websocket(API_KEY, [{"type": "auth", "token": API_KEY}, submit], until="end")
        await client.websocket(token, [{"type": "auth", "token": WRONG_TOKEN}], until="never")
        await client.websocket(token, [f'{{"type": "{PROMPT}"}}'], until="never")
        for path in ("/livez", "/readyz", "/metrics"):
            async with http.get(f"http://127.0.0.1:{probes}{path}") as response:
                client.answers[path] = await response.text()
    gateway.signal(15)  # type: ignore[arg-type]
    await gateway.exit_code()
    logs = "".join(repr(process.log()) for process in apache.processes)

    assert logs.count("'event': 'gateway.request'") >= 14
    assert "gateway.request_failed" in logs
    assert "streamworker_gateway_requests_total" in client.answers["/metrics"]
    keys = {
        "key": API_KEY, "token": token, "signature": token.rpartition(".")[2], "wrong key": WRONG_API_KEY,
        "wrong token": WRONG_TOKEN, "secret": TOKEN_SECRET, "raw secret": "canaryTOKENSECRET",
    }  # fmt: skip
    contents = {"prompt": PROMPT, "metadata": METADATA}
    assert found({"logs": logs}, keys | contents) == []
    assert TEXT not in re.sub(r"practice\?text=\w+", "", logs)  # the model's name, as the job gave it
    assert found(client.answers, keys | {"prompt": PROMPT}) == []
    events = {
        record.event["type"]: json.dumps(record.event) + str(record.headers) for record in apache.records
    }
    assert {"started", "delta", "usage"} <= events.keys()
    assert found(events, keys | {"prompt": PROMPT}) == []


async def test_secrets_are_in_no_repr_of_any_object_of_the_gateway(apache: Stage, tmp_path: Path) -> None:
    """While a job is followed with a token over a websocket, and a chat completion with a key."""
    open_gateway(apache, tmp_path)
    await apache.open()
    settings = apache.settings(gateway__port=0)
    app = GatewayApp(settings)
    running = asyncio.create_task(app.run())
    await eventually(lambda: app.is_working or running.done())
    request = {"model": "practice", "messages": [{"role": "user", "content": PROMPT}]}
    async with aiohttp.ClientSession() as http:
        client = GatewayClient(app.port, http)
        submitted = await client.call(
            "job", "POST", "/v1/jobs?token=read", status=202, json={"request": request}
        )
        token = json.loads(submitted)["read_token"]
        asking = asyncio.create_task(
            client.call("chat", "POST", "/v1/chat/completions", status=200, json=request)
        )
        follow = {"type": "subscribe", "id": "1", "job_id": json.loads(submitted)["job_id"]}
        following = asyncio.create_task(client.websocket(token, [follow], until="end"))
        gauge = "streamworker_gateway_subscriptions"
        await eventually(lambda: app.metrics.registry.get_sample_value(gauge) == 2)
        texts: dict[str, str] = {}
        for thing in gc.get_objects():
            module = str(type(thing).__module__)
            if module.startswith("streamworker.") and not module.startswith("streamworker.practice"):
                with contextlib.suppress(Exception):
                    name = type(thing).__qualname__
                    texts[name] = texts.get(name, "") + f"{thing!r}{thing}"
        asking.cancel()
        following.cancel()
        await asyncio.wait([asking, following])
    app.drain()
    await running

    assert {"GatewayApp", "Gateway", "Authenticator", "Caller", "Session", "ChatRequest"} <= texts.keys()
    secrets = {"key": API_KEY, "token": token, "secret": TOKEN_SECRET, "raw secret": "canaryTOKENSECRET"}
    assert found(texts, secrets | {"prompt": PROMPT}) == []


async def test_secrets_are_not_in_the_log_of_a_crash(
    embedded_broker: EmbeddedBroker, practice: PracticeUpstream, topics: Callable[[str], str], tmp_path: Path
) -> None:
    """The logged exception has its types and frames, but no message and no local variables."""
    file = tmp_path / "key"
    file.write_text(KEY)
    async with Stage(embedded_broker, practice, topics, tmp_path) as stage:
        await stage.open()
        stage.variables |= {
            "UPSTREAMS__DEFAULT__API_KEY_FILE": str(file),
            "TELEMETRY__LOG_LEVEL": "debug",
        }
        stage.message = lambda job_id: [{"role": "user", "content": PROMPT}]  # type: ignore[method-assign]
        stage.bug = BUG
        process = await stage.process()
        await process.logged("partition.opened")
        file.write_text(FILE_KEY)  # the redactor of the log does not know this value
        await stage.submit("j", metadata={"tenant": METADATA})
        [crash, *_] = await process.logged("job.crashed")
        logs = repr(process.log())

    assert [
        (one["exc_type"], one["exc_value"], one["exc_notes"], one["frames"][-1]["name"])
        for one in crash["exception"]
    ] == [("ValueError", "", [], "fall"), ("PermissionError", "", [], "fall")]
    assert found({"logs": logs}, {"key": FILE_KEY, "prompt": PROMPT, "metadata": METADATA}) == []


async def test_secrets_are_in_no_repr_of_any_object(
    apache: Stage, acls: Acls, apache_kafka: ApacheKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`repr` and `str` of every object of a running worker and of its libraries, and every dump of the settings."""
    monkeypatch.setenv("CANARY_KEY", KEY)
    token = unsigned_token()
    for mechanism in ("SCRAM-SHA-256", "OAUTHBEARER"):
        variables = apache.variables | way_in(apache_kafka, mechanism, tmp_path)
        secrets = {"key": KEY, "password": apache_kafka.credentials.password, "token": token}
        if mechanism == "OAUTHBEARER":
            (tmp_path / "secret").write_text(token)
        else:
            variables["KAFKA__SASL_PASSWORD"] = (
                variables.pop("KAFKA__SASL_PASSWORD_FILE") and secrets["password"]
            )
        variables["UPSTREAMS__DEFAULT__API_KEY_ENV"] = "CANARY_KEY"
        settings = load(
            None, {f"STREAMWORKER_{name}": value for name, value in variables.items()} | {"CANARY_KEY": KEY}
        )
        await acls.give(worker_acls(settings))
        app = App(settings)
        running = asyncio.create_task(app.run())
        # Wait until it is ready: aiokafka leaks a TLS connection that is cancelled while it opens, with a warning.
        while not app._readiness()[0]:  # noqa: ASYNC110 - readiness has no event
            await asyncio.sleep(0.02)
        texts = {"settings": f"{settings!r}{settings}{settings.model_dump()}{settings.model_dump_json()}"}
        for thing in gc.get_objects():
            if str(type(thing).__module__).partition(".")[0] in {
                "streamworker",
                "aiokafka",
                "httpx",
                "aiohttp",
            }:
                with contextlib.suppress(Exception):
                    texts[type(thing).__qualname__] = (
                        texts.get(type(thing).__qualname__, "") + f"{thing!r}{thing}"
                    )
        app.drain()
        await running

        assert {"App", "Worker", "HttpUpstream", "GroupConsumer", "AIOKafkaProducer"} <= texts.keys()
        assert found(texts, secrets) == []
