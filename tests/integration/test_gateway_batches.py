"""`/v1/files` and `/v1/batches` with OpenAI's own client, on Apache Kafka, with a worker and the practice upstream."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from streamworker.gateway.app import GatewayApp
from streamworker.telemetry.metrics import PREFIX
from tests.integration.batches import calls_by_prompt, request
from tests.integration.gateways import gateway_process
from tests.integration.stage import eventually
from tests.node import run_node
from tests.unit.gateway.served import ACME, OTHER, READ_ONLY, keys_file

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from openai.types import Batch

    from tests.integration.stage import Stage

pytestmark = pytest.mark.kafka

LIMIT_S = 30
ENDED = {"completed", "failed", "cancelled", "expired"}


class Served:
    """A gateway, and OpenAI's clients of it, which it closes."""

    def __init__(self, app: GatewayApp) -> None:
        self.app = app
        self._clients: dict[str, openai.AsyncOpenAI] = {}

    def client(self, key: str = ACME) -> openai.AsyncOpenAI:
        """Return the client with a key."""
        if key not in self._clients:
            url = f"http://127.0.0.1:{self.app.port}/v1"
            self._clients[key] = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=5, timeout=LIMIT_S)
        return self._clients[key]

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of one of the gateway's metrics; 0 if its series does not exist."""
        registry = self.app.metrics.registry
        return registry.get_sample_value(f"{PREFIX}gateway_{name}", labels) or 0.0

    async def close(self) -> None:
        """Close the clients."""
        for client in self._clients.values():
            await client.close()


@asynccontextmanager
async def gateway(stage: Stage, directory: Path, **over: object) -> AsyncIterator[Served]:
    """Run a gateway with the tests' keys, and files in a folder."""
    settings = stage.settings(
        GATEWAY__PORT="0",
        GATEWAY__KEYS_FILE=str(keys_file(directory)),
        GATEWAY__DRAIN_S="1",
        BATCH__FILES=f"file://{directory}/files",
        BATCH__GROUP_ID=f"{stage.group}-batches",
        **over,
    )
    app = GatewayApp(settings)
    served, task = Served(app), asyncio.create_task(app.run())
    serving = asyncio.create_task(app.serving())
    try:
        await asyncio.wait([task, serving], timeout=LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        await eventually(lambda: app.is_working)
        yield served
    finally:
        await served.close()
        app.drain()
        await asyncio.wait_for(task, LIMIT_S)
        serving.cancel()


@pytest.fixture
async def stage(apache: Stage) -> Stage:
    """Kafka with a results topic and a state topic."""
    state = f"{apache.events_topic}-batches"
    await apache.open(partitions=2, events_partitions=2, results_topic=f"{apache.events_topic}-results")
    await apache.create_topic(state)
    await apache.set_topic(state, **{"cleanup.policy": "compact"})
    apache.variables["TOPICS__BATCHES"] = state
    return apache


def jsonl(lines: Iterable[dict[str, Any]]) -> bytes:
    """Return the bytes of a batch file."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


async def upload(api: openai.AsyncOpenAI, content: bytes, name: str = "requests.jsonl") -> str:
    """Upload a file; return its id."""
    return (await api.files.create(file=(name, content), purpose="batch")).id


async def start(api: openai.AsyncOpenAI, content: bytes, window: str = "24h", **more: Any) -> Batch:
    """Upload a file and create a batch of it."""
    return await api.batches.create(
        input_file_id=await upload(api, content),
        endpoint="/v1/chat/completions",
        completion_window=window,  # type: ignore[arg-type]  # the gateway accepts other windows than 24h
        **more,
    )


async def until(api: openai.AsyncOpenAI, batch_id: str, *statuses: str) -> tuple[Batch, list[Batch]]:
    """Poll a batch until it has one of the statuses; return it and what was seen before."""
    seen: list[Batch] = []
    async with asyncio.timeout(LIMIT_S):
        while True:
            batch = await api.batches.retrieve(batch_id)
            seen.append(batch)
            if batch.status in (statuses or ENDED):
                return batch, seen
            await asyncio.sleep(0.1)


async def lines(api: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """Download an output file; none if there is none."""
    if file_id is None:
        return []
    return [json.loads(line) for line in (await api.files.content(file_id)).content.split(b"\n") if line]


async def test_openai_client_runs_a_batch_unchanged(stage: Stage, tmp_path: Path) -> None:
    """Upload, create, poll, download: every line is in one of the two files, and output lines are strictly valid."""
    wanted = [request(f"line-{number}") for number in range(20)]
    wanted.append(request("refused", "practice?status=400"))
    async with gateway(stage, tmp_path) as app, stage.worker():
        api = app.client()
        made = await start(api, jsonl(wanted), metadata={"of": "test"})
        batch, _ = await until(api, made.id)
        output, errors = await lines(api, batch.output_file_id), await lines(api, batch.error_file_id)
        listed = await api.files.list(purpose="batch_output")

    await eventually(lambda: app.metric("batches_ended_total", status="completed") == 1)
    assert app.metric("batch_lines_total", outcome="completed") == 20
    assert app.metric("batch_lines_total", outcome="failed") == 1
    assert app.metric("batch_duration_seconds_count", status="completed") == 1
    assert app.metric("batches", status="completed") == 1
    assert (app.metric("batches", status="in_progress"), app.metric("batches_running")) == (0, 0)
    assert made.status == "validating"
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 21, "completed": 20, "failed": 1}
    assert batch.metadata == {"of": "test"}
    assert {line["custom_id"] for line in output} == {f"line-{number}" for number in range(20)}
    for line in output:
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        ChatCompletion.model_validate(line["response"]["body"], strict=True)
    (refused,) = errors
    assert refused["custom_id"] == "refused"
    assert refused["error"]["code"]
    assert refused["error"]["message"]
    assert {file.id for file in listed.data} == {batch.output_file_id, batch.error_file_id}
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert None not in times
    assert times == sorted(times)  # type: ignore[type-var]  # no time is None
    assert batch.usage is not None
    assert batch.usage.output_tokens > 0
    assert set(calls_by_prompt(stage).values()) == {1}


async def test_openai_node_runs_a_batch_unchanged(stage: Stage, tmp_path: Path) -> None:
    """The same walk with openai-node."""
    path = tmp_path / "requests.jsonl"
    path.write_bytes(
        jsonl([*(request(f"line-{n}") for n in range(5)), request("bad", "practice?status=400")])
    )
    async with gateway(stage, tmp_path) as app, stage.worker():
        url = f"http://127.0.0.1:{app.app.port}/v1"
        seen = json.loads(await run_node("openai_batch.cjs", url, ACME, str(path)))

    assert seen["created"] == "validating"
    assert seen["batch"]["status"] == "completed"
    assert seen["batch"]["request_counts"] == {"total": 6, "completed": 5, "failed": 1}
    assert {line["custom_id"] for line in seen["output"]} == {f"line-{n}" for n in range(5)}
    assert [line["custom_id"] for line in seen["errors"]] == ["bad"]
    assert seen["listed"] == [seen["batch"]["id"]]


async def test_openai_batch_of_parasail_runs_unchanged(stage: Stage, tmp_path: Path) -> None:
    """A command that others wrote: it creates the batch, and collects it when it is called again."""
    path, output, errors = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "err.jsonl"))
    path.write_bytes(
        jsonl([*(request(f"line-{n}") for n in range(5)), request("bad", "practice?status=400")])
    )

    async def command(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "openai_batch.run", *arguments, stdout=-1, stderr=-1, cwd=tmp_path
        )
        out, err = await asyncio.wait_for(process.communicate(), LIMIT_S)
        assert process.returncode == 0, err.decode()
        return out.decode()

    async with gateway(stage, tmp_path) as app, stage.worker():
        provider = ("--base-url", f"http://127.0.0.1:{app.app.port}/v1", "--api-key", ACME)
        files = ("-o", str(output), "-e", str(errors))
        await command(str(path), "--create", *files, *provider)
        (made,) = (await app.client().batches.list()).data
        await until(app.client(), made.id)
        said = await command("--resume", made.id, *files, *provider)

    assert "completed" in said
    assert len(output.read_bytes().splitlines()) == 5
    assert [json.loads(line)["custom_id"] for line in errors.read_bytes().splitlines()] == ["bad"]


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n"], ids=["missing", "present", "CRLF"])
async def test_last_line_may_lack_its_end(stage: Stage, tmp_path: Path, content: bytes) -> None:
    """Every valid line is in exactly one file, whatever ends the last one."""
    lines_in = jsonl([request("a"), request("b")]).removesuffix(b"\n") + content
    async with gateway(stage, tmp_path) as app, stage.worker():
        batch, _ = await until(app.client(), (await start(app.client(), lines_in)).id)
        output = await lines(app.client(), batch.output_file_id)

    assert sorted(line["custom_id"] for line in output) == ["a", "b"]
    assert batch.error_file_id is None


@pytest.mark.long
async def test_two_batches_of_one_file_are_two(stage: Stage, tmp_path: Path) -> None:
    """Each runs every line, and has output files of its own."""
    async with gateway(stage, tmp_path) as app, stage.worker():
        api = app.client()
        first = await start(api, jsonl([request("a"), request("b")]))
        second = await api.batches.create(
            input_file_id=first.input_file_id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
        )
        ended = [(await until(api, one.id))[0] for one in (first, second)]
        outputs = [await lines(api, batch.output_file_id) for batch in ended]

    assert first.id != second.id
    assert ended[0].output_file_id != ended[1].output_file_id
    for output in outputs:
        assert sorted(line["custom_id"] for line in output) == ["a", "b"]
    assert set(calls_by_prompt(stage).values()) == {2}


@pytest.mark.long
async def test_batch_survives_kill_9_of_its_gateway(stage: Stage, tmp_path: Path) -> None:
    """Another gateway takes it over when the group has noticed; no line is paid for twice."""
    stage.variables |= {
        "GATEWAY__KEYS_FILE": str(keys_file(tmp_path)),
        "BATCH__FILES": f"file://{tmp_path}/files",
        "BATCH__GROUP_ID": f"{stage.group}-batches",
    }
    wanted = [request(f"line-{n}", "practice?deltas=2&pace_ms=250") for n in range(40)]
    async with stage.worker(), gateway_process(stage, BATCH__WINDOW="10") as (killed, process):
        api = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{killed.port}/v1", api_key=ACME)
        made = await start(api, jsonl(wanted))
        await stage.until(lambda: len(calls_by_prompt(stage)) >= 5)
        await process.kill()
        await api.close()
        async with gateway(stage, tmp_path) as other:
            batch, _ = await until(other.client(), made.id)
            output = await lines(other.client(), batch.output_file_id)

    assert batch.status == "completed"
    assert {line["custom_id"] for line in output} == {f"line-{n}" for n in range(40)}
    assert set(calls_by_prompt(stage).values()) == {1}


async def test_counts_of_a_batch_change_while_it_is_in_progress(stage: Stage, tmp_path: Path) -> None:
    """A client that polls sees progress."""
    wanted = [
        request(f"line-{number}", f"practice?deltas=2&pace_ms={5 if number < 5 else 1500}")
        for number in range(10)
    ]
    async with gateway(stage, tmp_path) as app, stage.worker():
        api = app.client()
        made = await start(api, jsonl(wanted))
        async with asyncio.timeout(LIMIT_S):
            while True:
                batch = await api.batches.retrieve(made.id)
                if batch.request_counts and 0 < batch.request_counts.completed < 10:
                    break
                assert batch.status not in ENDED
                await asyncio.sleep(0.05)
        assert batch.status == "in_progress"
        assert batch.request_counts.total == 10
        ended, _ = await until(api, made.id)

    assert ended.status == "completed"


async def test_invalid_file_fails_with_its_lines_and_sends_nothing(stage: Stage, tmp_path: Path) -> None:
    """Validation is of the whole file: each fault has its line and code."""
    content = jsonl([request("a"), request("a")]) + b"no json\n"
    async with gateway(stage, tmp_path) as app, stage.worker():
        api = app.client()
        batch, _ = await until(api, (await start(api, content)).id)
        empty, _ = await until(api, (await start(api, b"\n\n")).id)

    assert batch.status == "failed"
    assert batch.errors is not None
    assert [(error.line, error.code) for error in batch.errors.data or []] == [
        (2, "duplicate_custom_id"),
        (3, "invalid_json_line"),
    ]
    assert batch.output_file_id is None
    await eventually(lambda: app.metric("batches_ended_total", status="failed") == 2)
    assert app.metric("batch_lines_total", outcome="failed") == 0
    assert empty.status == "failed"
    assert empty.errors is not None
    assert [error.code for error in empty.errors.data or []] == ["empty_file"]
    assert calls_by_prompt(stage) == Counter()


async def test_run_that_cannot_read_its_file_is_counted_and_starts_again(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines are counted once, however often the run starts."""
    monkeypatch.setattr("streamworker.gateway.batches.runner.RETRY_S", (0.1,))
    async with gateway(stage, tmp_path) as app, stage.worker():
        api = app.client()
        file_id = await upload(api, jsonl([request(f"line-{n}") for n in range(3)]))
        path, aside = tmp_path / "files" / file_id, tmp_path / "aside"
        path.rename(aside)
        path.mkdir()
        made = await api.batches.create(
            input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        await eventually(lambda: app.metric("batch_run_failures_total", cause="unavailable") >= 2)
        path.rmdir()
        aside.rename(path)
        batch, _ = await until(api, made.id)
        await eventually(lambda: app.metric("batch_lines_total", outcome="completed") == 3)

    assert batch.status == "completed"
    assert app.metric("batch_run_failures_total", cause="crashed") == 0


async def test_batch_beyond_those_of_the_tenant_raises_the_clients_class_for_429(
    stage: Stage, tmp_path: Path
) -> None:
    """Without a second request: OpenAI's client follows `x-should-retry`."""
    async with gateway(stage, tmp_path, BATCH__MAX_BATCHES="1") as app:
        api = app.client()
        first = await start(api, jsonl([request("a")]))
        with pytest.raises(openai.RateLimitError) as caught:
            await start(api, jsonl([request("b")]))
        posts = [
            app.metric("requests_total", route="/v1/batches", method="POST", status=status)
            for status in ("200", "429")
        ]

    assert first.status == "validating"
    assert caught.value.code == "too_many_batches"
    assert posts == [1, 1]


async def test_cancelled_batch_keeps_what_has_ended(stage: Stage, tmp_path: Path) -> None:
    """Cancelling is answered at once, again with the same, and with 400 once the batch has ended."""
    wanted = [request("fast")] + [request(f"slow-{n}", "practice?deltas=9999&pace_ms=50") for n in range(4)]
    async with gateway(stage, tmp_path, BATCH__WINDOW="3") as app, stage.worker():
        api = app.client()
        made = await start(api, jsonl(wanted))
        await stage.until(lambda: len(calls_by_prompt(stage)) >= 3)
        first = await api.batches.cancel(made.id)
        second = await api.batches.cancel(made.id)
        batch, _ = await until(api, made.id)
        with pytest.raises(openai.BadRequestError):
            await api.batches.cancel(made.id)
        output, errors = await lines(api, batch.output_file_id), await lines(api, batch.error_file_id)

    assert (first.status, second.status) == ("cancelling", "cancelling")
    assert first.cancelling_at == second.cancelling_at
    assert batch.status == "cancelled"
    assert batch.cancelled_at is not None
    assert [line["custom_id"] for line in output] == ["fast"]
    assert {line["custom_id"] for line in errors} == {f"slow-{n}" for n in range(4)}
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}


async def test_batch_that_expires_keeps_what_has_ended(stage: Stage, tmp_path: Path) -> None:
    """Lines that have not ended by the end of the completion window are `batch_expired`."""
    wanted = [request("fast"), request("slow", "practice?deltas=9999&pace_ms=50")]
    async with gateway(stage, tmp_path) as app, stage.worker():
        api = app.client()
        batch, _ = await until(api, (await start(api, jsonl(wanted), "3s")).id)
        output, errors = await lines(api, batch.output_file_id), await lines(api, batch.error_file_id)

    assert batch.status == "expired"
    assert [line["custom_id"] for line in output] == ["fast"]
    assert [(line["custom_id"], line["error"]["code"]) for line in errors] == [("slow", "batch_expired")]


async def test_batch_survives_the_end_of_its_gateway(stage: Stage, tmp_path: Path) -> None:
    """Another gateway takes the batch over; no line is paid for twice."""
    wanted = [request(f"line-{n}", "practice?deltas=2&pace_ms=250") for n in range(30)]
    async with stage.worker():
        async with gateway(stage, tmp_path, BATCH__WINDOW="10") as first:
            made = await start(first.client(), jsonl(wanted))
            await stage.until(lambda: len(calls_by_prompt(stage)) >= 5)
        async with gateway(stage, tmp_path) as second:
            batch, _ = await until(second.client(), made.id)
            output = await lines(second.client(), batch.output_file_id)

    assert batch.status == "completed"
    assert {line["custom_id"] for line in output} == {f"line-{n}" for n in range(30)}
    assert set(calls_by_prompt(stage).values()) == {1}


async def test_any_gateway_answers_for_a_batch_of_another(stage: Stage, tmp_path: Path) -> None:
    """State is in Kafka: a batch that one gateway accepted is seen, cancelled and listed at the other one."""
    async with gateway(stage, tmp_path) as first, gateway(stage, tmp_path) as second, stage.worker():
        made = await start(first.client(), jsonl([request("slow", "practice?deltas=9999&pace_ms=50")]))
        await until(second.client(), made.id, "in_progress")
        cancelled = await second.client().batches.cancel(made.id)
        batch, _ = await until(first.client(), made.id)
        listed = await second.client().batches.list()

    assert cancelled.status == "cancelling"
    assert batch.status == "cancelled"
    assert [one.id for one in listed.data] == [made.id]


async def test_files_and_batches_belong_to_their_tenant(stage: Stage, tmp_path: Path) -> None:
    """Another tenant's file or batch does not exist; a key without the scope cannot create."""
    async with gateway(stage, tmp_path) as app, stage.worker():
        mine, other, reader = app.client(), app.client(OTHER), app.client(READ_ONLY)
        made = await start(mine, jsonl([request("a")]))
        batch, _ = await until(mine, made.id)
        for call in (
            lambda: other.batches.retrieve(made.id),
            lambda: other.batches.cancel(made.id),
            lambda: other.files.retrieve(made.input_file_id),
            lambda: other.files.content(batch.output_file_id or ""),
            lambda: other.files.delete(made.input_file_id),
        ):
            with pytest.raises(openai.NotFoundError):
                await call()
        with pytest.raises(openai.BadRequestError):
            await other.batches.create(
                input_file_id=made.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
        with pytest.raises(openai.PermissionDeniedError):
            await upload(reader, b"x")
        assert (await reader.batches.retrieve(made.id)).id == made.id
        assert (await other.batches.list()).data == []
        assert (await other.files.list()).data == []

    (job_id,) = stage.terminals()
    assert job_id.startswith(f"acme.b.{made.id}.")
    assert stage.terminals()[job_id]["metadata"]["tenant"] == "acme"


async def test_lists_are_newest_first_and_paged_by_id(stage: Stage, tmp_path: Path) -> None:
    """The SDK's own pagination walks through all."""
    async with gateway(stage, tmp_path) as app, stage.worker():
        api = app.client()
        file_id = await upload(api, jsonl([request("a")]))
        made = [
            (
                await api.batches.create(
                    input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h"
                )
            ).id
            for _ in range(5)
        ]
        page = await api.batches.list(limit=2)
        walked = [batch.id async for batch in api.batches.list(limit=2)]
        for batch_id in made:
            await until(api, batch_id)

    assert [batch.id for batch in page.data] == made[:2:-1]
    assert page.has_more
    assert walked == made[::-1]


async def test_deleted_file_is_gone(stage: Stage, tmp_path: Path) -> None:
    """Its object and its content answer 404, and a batch of it fails with the reason."""
    async with gateway(stage, tmp_path) as app:
        api = app.client()
        file_id = await upload(api, b"content")
        assert (await api.files.content(file_id)).content == b"content"
        deleted = await api.files.delete(file_id)
        with pytest.raises(openai.NotFoundError):
            await api.files.content(file_id)
        with pytest.raises(openai.BadRequestError, match="no file"):
            await api.batches.create(
                input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h"
            )

    assert deleted.deleted
    assert not list((tmp_path / "files").glob("*"))
