"""`/v1/files` and `/v1/batches`: every malformed request has its status, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import pytest

from streamworker.gateway.batches.records import BatchRecord, write_state
from streamworker.gateway.batches.routes import _name
from streamworker.gateway.batches.runner import window_s
from streamworker.gateway.batches.store import FolderStore, StoreError
from tests.unit.gateway.batches import MemoryBatches
from tests.unit.gateway.served import ACME, ALL, OTHER, READ_ONLY, Served, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

LINE = b'{"custom_id":"a","body":{"model":"m","messages":[]}}\n'


@pytest.fixture
def batches(tmp_path: Path) -> MemoryBatches:
    return MemoryBatches(tmp_path, max_file_bytes=1000)


@pytest.fixture
async def gateway(tmp_path: Path, batches: MemoryBatches) -> AsyncIterator[Served]:
    async with served(tmp_path, batches=batches) as running:
        yield running


def form(content: bytes = LINE, *, purpose: str | None = "batch", name: str = "in.jsonl") -> aiohttp.FormData:
    """Return an upload as OpenAI's clients send it."""
    data = aiohttp.FormData()
    if purpose is not None:
        data.add_field("purpose", purpose)
    data.add_field("file", content, filename=name, content_type="application/octet-stream")
    return data


async def upload(gateway: Served, key: str = ACME, **more: Any) -> str:
    """Upload a file; return its id."""
    status, value, _ = await gateway.call("POST", "/v1/files", key=key, data=form(**more))
    assert status == 200, value
    return str(value["id"])


def create(file_id: str, **over: Any) -> dict[str, Any]:
    """Return the body of a request that makes a batch."""
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return {name: value for name, value in {**body, **over}.items() if value is not ...}


async def test_upload_is_stored_and_described(gateway: Served, batches: MemoryBatches) -> None:
    """The object has the bytes, the name, and a time after which the file is deleted."""
    status, value, _ = await gateway.call("POST", "/v1/files", data=form(LINE * 3))

    assert status == 200
    assert value["object"] == "file"
    assert value["bytes"] == 3 * len(LINE)
    assert value["filename"] == "in.jsonl"
    assert value["purpose"] == "batch"
    assert value["expires_at"] - value["created_at"] == batches.settings.kept_s
    assert batches.contents() == [LINE * 3]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 2000000", 413),
        ("Content-Type: multipart/form-data\r\nContent-Length: 10", 400),
        ("Content-Type: application/json\r\nContent-Length: 10", 415),
    ],
)
async def test_upload_that_its_head_rules_out_is_not_asked_for(
    gateway: Served, batches: MemoryBatches, headers: str, status: int
) -> None:
    """A client that waits for 100 does not send gigabytes in vain."""
    reader, writer = await asyncio.open_connection(*gateway.address)
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\nExpect: 100-continue\r\n"
    writer.write(f"{head}{headers}\r\n\r\n".encode())
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(f"HTTP/1.1 {status} ".encode())
    writer.close()

    assert batches.contents() == []


async def test_upload_is_asked_for(gateway: Served, batches: MemoryBatches) -> None:
    """Behind a head that is right."""
    part = '--b\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
    body = part.format("purpose", "") + "batch\r\n" + part.format("file", '; filename="in.jsonl"')
    body += LINE.decode() + "\r\n--b--\r\n"
    reader, writer = await asyncio.open_connection(*gateway.address)
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\nExpect: 100-continue\r\n"
    head += f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(5):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body.encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()

    assert batches.contents() == [LINE]


async def test_purpose_may_follow_the_file(gateway: Served) -> None:
    """The order of the form's parts is the client's."""
    data = aiohttp.FormData()
    data.add_field("file", LINE, filename="in.jsonl")
    data.add_field("purpose", "batch")

    status, _, _ = await gateway.call("POST", "/v1/files", data=data)

    assert status == 200


@pytest.mark.parametrize(
    ("over", "status", "code"),
    [
        ({"purpose": "fine-tune"}, 400, "invalid_request"),
        ({"purpose": None}, 400, "invalid_request"),
        ({"content": b"x" * 1001}, 413, "too_large"),
    ],
    ids=["other purpose", "no purpose", "too large"],
)
async def test_upload_that_is_refused_leaves_no_file(
    gateway: Served, batches: MemoryBatches, over: dict[str, Any], status: int, code: str
) -> None:
    """Neither in the store nor in the list."""
    got, value, _ = await gateway.call("POST", "/v1/files", data=form(**over))

    assert (got, value["error"]["code"]) == (status, code)
    assert batches.contents() == []
    assert (await gateway.call("GET", "/v1/files"))[1]["data"] == []


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{}", "application/json", 415),
        (b"", "multipart/form-data; boundary=b", 400),
        (b"", "multipart/form-data", 400),
        (b"--b\r\n", "multipart/form-data; boundary=b", 400),
        (b"--other\r\n\r\n--other--\r\n", "multipart/form-data; boundary=b", 400),
        (
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            400,
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + b"p" * 5000 + b"\r\n--b--\r\n",
            "multipart/form-data; boundary=b",
            413,
        ),
        (
            b"--b\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c--\r\n--b--\r\n",
            "multipart/form-data; boundary=b",
            400,
        ),
        (
            (
                b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n'
                b'--b\r\nContent-Disposition: form-data; name="file"; filename="b"\r\n\r\ny\r\n--b--\r\n'
            ),
            "multipart/form-data; boundary=b",
            400,
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="\xc2\x8f\x00"\r\n\r\nx\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            400,
        ),
    ],
    ids=[
        "JSON",
        "empty",
        "no boundary",
        "cut",
        "other boundary",
        "no file",
        "long field",
        "nested",
        "two files",
        "invalid header",
    ],
)
async def test_form_that_is_not_valid_has_its_status(
    gateway: Served, batches: MemoryBatches, body: bytes, content_type: str, status: int
) -> None:
    """No malformed form is an internal error, and none leaves a file that a client could see."""
    got, value, _ = await gateway.call("POST", "/v1/files", data=body, headers={"Content-Type": content_type})

    assert got == status, value
    assert value["error"]["message"]
    assert (await gateway.call("GET", "/v1/files"))[1]["data"] == []
    assert batches.table.files("acme") == []
    assert batches.contents() == []


async def test_upload_that_the_client_breaks_off_leaves_nothing(
    gateway: Served, batches: MemoryBatches
) -> None:
    """A part of a file is not a file."""
    _, writer = await asyncio.open_connection(*gateway.address)
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n"
        f"Authorization: Bearer {ACME}\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf'
    )
    writer.write(head.encode())
    await writer.drain()
    writer.close()
    await writer.wait_closed()

    assert (await gateway.call("GET", "/v1/files"))[1]["data"] == []
    assert batches.contents() == []


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a.jsonl", "a.jsonl"),
        ("/etc/passwd", "passwd"),
        ("C:\\x\\a.jsonl", "a.jsonl"),
        ('a"b;c\r\nd', "abcd"),
        ("", "batch.jsonl"),
        (None, "batch.jsonl"),
        ("ä", "batch.jsonl"),
        ("n" * 300, "n" * 255),
    ],
)
def test_file_name_has_no_path_and_is_safe_in_a_header(given: str | None, kept: str) -> None:
    """It comes from a client, and returns in Content-Disposition."""
    assert _name(given) == kept


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("24h", 86_400),
        ("7d", 604_800),
        ("90m", 5400),
        ("30s", 30),
        ("0s", None),
        ("", None),
        ("24", None),
        ("h", None),
        ("-1h", None),
        ("1.5h", None),
        ("1w", None),
        ("１h", None),
        ("9999999d", None),
    ],
)
def test_completion_window_is_a_number_with_a_unit(text: str, seconds: int | None) -> None:
    """OpenAI takes 24h only; the gateway takes other windows, too."""
    assert window_s(text) == seconds


async def test_batch_is_made_of_a_file(gateway: Served) -> None:
    """It begins as validating, and its window bounds its time."""
    file_id = await upload(gateway)

    status, value, _ = await gateway.call(
        "POST", "/v1/batches", json=create(file_id, metadata={"a": "b"}, completion_window="1h")
    )

    assert status == 200
    assert (value["object"], value["status"]) == ("batch", "validating")
    assert value["input_file_id"] == file_id
    assert value["expires_at"] - value["created_at"] == 3600
    assert value["metadata"] == {"a": "b"}
    assert (await gateway.call("GET", f"/v1/batches/{value['id']}"))[1] == value


@pytest.mark.parametrize(
    ("over", "param"),
    [
        ({"input_file_id": "file-unknown"}, "input_file_id"),
        ({"input_file_id": ...}, "input_file_id"),
        ({"input_file_id": 1}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": ...}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": ...}, "completion_window"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "v" * 513}}, "metadata"),
        ({"metadata": {"n" * 65: "v"}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"other": 1}, "other"),
    ],
)
async def test_batch_that_is_not_valid_is_refused_with_the_parameter(
    gateway: Served, over: dict[str, Any], param: str
) -> None:
    """The message says what is wrong, `param` where."""
    file_id = await upload(gateway)

    status, value, headers = await gateway.call("POST", "/v1/batches", json=create(file_id, **over))

    assert status == 400
    assert value["error"]["param"] == param
    assert headers["x-should-retry"] == "false"
    assert (await gateway.call("GET", "/v1/batches"))[1]["data"] == []


async def test_output_of_a_batch_is_not_an_input(gateway: Served, batches: MemoryBatches) -> None:
    """Its purpose is another one."""
    file_id = await upload(gateway)
    file = batches.table.file(file_id)
    assert file is not None
    batches.table.apply(file_id, write_state(file).replace(b'"purpose":"batch"', b'"purpose":"batch_output"'))

    status, value, _ = await gateway.call("POST", "/v1/batches", json=create(file_id))

    assert (status, value["error"]["param"]) == (400, "input_file_id")


async def test_request_that_an_sdk_repeats_makes_one_batch(gateway: Served) -> None:
    """The response of the first one was lost; the lines must not be paid for twice."""
    body = create(await upload(gateway))
    _, first, _ = await gateway.call("POST", "/v1/batches", json=body)
    status, again, headers = await gateway.call(
        "POST", "/v1/batches", json=body, headers={"x-stainless-retry-count": "1"}
    )
    _, new, _ = await gateway.call("POST", "/v1/batches", json=body)

    assert (status, again["id"]) == (200, first["id"])
    assert headers["Idempotent-Replay"] == "true"
    assert new["id"] != first["id"]


async def test_batch_with_a_number_of_any_size_is_made(gateway: Served) -> None:
    """JSON has no limit; a member that is accepted and not used may have every value."""
    body = create(await upload(gateway), output_expires_after={"anchor": "created_at", "seconds": 1 << 70})
    status, first, _ = await gateway.call("POST", "/v1/batches", json=body)
    _, again, _ = await gateway.call(
        "POST", "/v1/batches", json=dict(reversed(body.items())), headers={"x-stainless-retry-count": "1"}
    )

    assert (status, again["id"]) == (200, first["id"])


@pytest.mark.parametrize("headers", [{"x-stainless-retry-count": "1"}, {"Idempotency-Key": "nightly"}])
@pytest.mark.parametrize("arrives", [True, False])
async def test_retry_of_a_batch_that_was_not_acknowledged_makes_no_second_one(
    gateway: Served, batches: MemoryBatches, headers: dict[str, str], *, arrives: bool
) -> None:
    """Kafka may have the first record, or get it yet: the retry writes the same id, so that no line is paid for twice."""
    body = create(await upload(gateway))
    first_headers = {} if "Idempotency-Key" not in headers else headers
    batches.is_available, batches.loses_acknowledgements = arrives, arrives
    refused, _, refusal = await gateway.call("POST", "/v1/batches", json=body, headers=first_headers)
    batches.is_available, batches.loses_acknowledgements = True, False
    status, value, _ = await gateway.call("POST", "/v1/batches", json=body, headers=headers)

    assert (refused, refusal["x-should-retry"], status) == (503, "true", 200)
    assert {key for key in batches.written if key.startswith("batch_")} == {value["id"]}
    assert [one["id"] for one in (await gateway.call("GET", "/v1/batches"))[1]["data"]] == [value["id"]]


async def test_idempotency_key_makes_one_batch(gateway: Served) -> None:
    """Two requests at the same time are one batch; another body under the key is a mistake."""
    body = create(await upload(gateway))
    headers = {"Idempotency-Key": "nightly"}
    both = await asyncio.gather(
        *(gateway.call("POST", "/v1/batches", json=body, headers=headers) for _ in range(2))
    )
    status, value, _ = await gateway.call(
        "POST", "/v1/batches", json={**body, "completion_window": "1h"}, headers=headers
    )
    other, _, _ = await gateway.call("POST", "/v1/batches", json=body, key=ALL, headers=headers)

    assert len({made["id"] for _, made, _ in both}) == 1
    assert (status, value["error"]["code"]) == (409, "idempotency_mismatch")
    assert other == 200
    assert len((await gateway.call("GET", "/v1/batches", key=ALL))[1]["data"]) == 2


@pytest.mark.parametrize("key", ["", "k" * 201])
async def test_idempotency_key_that_is_not_valid_is_refused(gateway: Served, key: str) -> None:
    """It is kept in memory, so its length is bounded."""
    body = create(await upload(gateway))

    status, _, _ = await gateway.call("POST", "/v1/batches", json=body, headers={"Idempotency-Key": key})

    assert status == 400


async def test_cancel_is_repeatable_until_the_batch_has_ended(
    gateway: Served, batches: MemoryBatches
) -> None:
    """200 `cancelling`, again the same, then 400."""
    _, made, _ = await gateway.call("POST", "/v1/batches", json=create(await upload(gateway)))
    path = f"/v1/batches/{made['id']}/cancel"
    first = await gateway.call("POST", path)
    second = await gateway.call("POST", path)
    ended = batches.table.batch(made["id"])
    assert isinstance(ended, BatchRecord)
    cancelled = msgspec.structs.replace(ended, status="cancelled", ended_at=5)
    batches.table.apply(made["id"], write_state(cancelled))
    third = await gateway.call("POST", path)

    assert (first[0], first[1]["status"]) == (200, "cancelling")
    assert second[1] == first[1]
    assert (third[0], third[1]["error"]["code"]) == (400, "invalid_request")


PATHS = (
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{file}"),
    ("GET", "/v1/files/{file}/content"),
    ("DELETE", "/v1/files/{file}"),
    ("POST", "/v1/files"),
    ("GET", "/v1/batches"),
    ("GET", "/v1/batches/{batch}"),
    ("POST", "/v1/batches/{batch}/cancel"),
    ("POST", "/v1/batches"),
)


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_endpoint_without_a_credential_is_401(gateway: Served, method: str, path: str) -> None:
    """No anonymous request learns whether a file exists."""
    status, value, headers = await gateway.call(method, path.format(file="f", batch="b"), key=None)

    assert (status, value["error"]["code"]) == (401, "unauthenticated")
    assert headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_endpoint_does_not_take_a_read_token(gateway: Served, method: str, path: str) -> None:
    """A token is for jobs: it names ids of jobs, not of files."""
    _, value, _ = await gateway.call(
        "POST", "/v1/tokens", json={"jobs": ["acme.*"], "scope": "read cancel", "ttl_s": 60}
    )

    status, body, _ = await gateway.call(method, path.format(file="f", batch="b"), key=value["token"])

    assert (status, body["error"]["code"]) == (403, "insufficient_scope")


@pytest.mark.parametrize(("method", "path"), [one for one in PATHS if one[0] != "GET"])
async def test_endpoint_that_writes_needs_its_scope(gateway: Served, method: str, path: str) -> None:
    """A key that reads creates, deletes and cancels nothing."""
    status, body, _ = await gateway.call(method, path.format(file="f", batch="b"), key=READ_ONLY)

    assert (status, body["error"]["code"]) == (403, "insufficient_scope")


@pytest.mark.parametrize(("method", "path"), [one for one in PATHS if "{" in one[1]])
@pytest.mark.parametrize("key", [ACME, OTHER, ALL])
async def test_unknown_file_or_batch_is_404(gateway: Served, method: str, path: str, key: str) -> None:
    """For every key."""
    status, body, _ = await gateway.call(method, path.format(file="file-x", batch="batch_x"), key=key)

    assert (status, body["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(("method", "path"), [one for one in PATHS if "{" in one[1]])
async def test_file_or_batch_of_another_tenant_is_404(gateway: Served, method: str, path: str) -> None:
    """It answers as one that does not exist, and stays."""
    file_id = await upload(gateway)
    _, made, _ = await gateway.call("POST", "/v1/batches", json=create(file_id))

    status, body, _ = await gateway.call(method, path.format(file=file_id, batch=made["id"]), key=OTHER)

    assert (status, body["error"]["code"]) == (404, "not_found")
    assert (await gateway.call("GET", f"/v1/files/{file_id}"))[0] == 200
    assert (await gateway.call("GET", f"/v1/batches/{made['id']}"))[1]["status"] == "validating"


async def test_key_without_a_tenant_sees_all(gateway: Served) -> None:
    """It is the operator's."""
    file_id = await upload(gateway, key=OTHER)

    assert (await gateway.call("GET", f"/v1/files/{file_id}", key=ALL))[0] == 200
    assert [one["id"] for one in (await gateway.call("GET", "/v1/files", key=ALL))[1]["data"]] == [file_id]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files?limit=0",
        "/v1/files?limit=10001",
        "/v1/files?limit=x",
        "/v1/files?limit=1&limit=2",
        "/v1/files?order=up",
        "/v1/files?page=2",
        "/v1/batches?limit=101",
        "/v1/batches?limit=-1",
        "/v1/batches?limit=99999999999999999999",
        "/v1/batches?order=asc",
    ],
)
async def test_query_of_a_list_that_is_not_valid_is_400(gateway: Served, path: str) -> None:
    """A misspelt parameter is not ignored."""
    status, body, _ = await gateway.call("GET", path)

    assert (status, body["error"]["code"]) == (400, "invalid_request")


async def test_content_is_an_attachment_with_the_file_name(gateway: Served) -> None:
    """A browser saves it and does not render it. A form encodes a quotation mark as %22 (WHATWG HTML)."""
    file_id = await upload(gateway, content=LINE, name='a"b.jsonl')

    status, text, headers = await gateway.call("GET", f"/v1/files/{file_id}/content")

    assert (status, text) == (200, LINE.decode())
    assert headers["Content-Disposition"] == 'attachment; filename="a%22b.jsonl"'
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["Content-Length"] == str(len(LINE))
    assert headers["X-Content-Type-Options"] == "nosniff"


async def test_content_that_the_store_has_lost_is_404(gateway: Served, batches: MemoryBatches) -> None:
    """The object is there, the bytes were deleted behind the gateway's back."""
    file_id = await upload(gateway)
    (batches.folder / file_id).unlink()

    status, body, _ = await gateway.call("GET", f"/v1/files/{file_id}/content")

    assert (status, body["error"]["code"]) == (404, "not_found")


async def test_file_is_deleted_with_its_content(gateway: Served, batches: MemoryBatches) -> None:
    """One person's text can be erased."""
    file_id = await upload(gateway)

    status, body, _ = await gateway.call("DELETE", f"/v1/files/{file_id}")

    assert (status, body) == (200, {"id": file_id, "object": "file", "deleted": True})
    assert batches.contents() == []
    assert (await gateway.call("GET", f"/v1/files/{file_id}"))[0] == 404


async def test_file_whose_content_cannot_be_deleted_stays(gateway: Served, batches: MemoryBatches) -> None:
    """A file that was gone from the list could not be erased by its owner any more."""

    class Fails(FolderStore):
        async def delete(self, name: str) -> None:
            raise StoreError(f"file {name} cannot be deleted: Read-only file system")

    file_id = await upload(gateway)
    whole, batches.store = batches.store, Fails(batches.folder)
    status, body, _ = await gateway.call("DELETE", f"/v1/files/{file_id}")
    batches.store = whole

    assert (status, body["error"]["code"]) == (503, "overloaded")
    assert (await gateway.call("DELETE", f"/v1/files/{file_id}"))[0] == 200
    assert batches.contents() == []


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
async def test_gateway_without_batches_answers_501_with_the_reason(tmp_path: Path, path: str) -> None:
    """The message names the settings."""
    async with served(tmp_path) as plain:
        status, body, _ = await plain.call("GET", path)

    assert (status, body["error"]["code"]) == (501, "not_configured")
    assert "topics.results and topics.batches" in body["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
async def test_gateway_that_has_not_read_the_state_answers_503(
    gateway: Served, batches: MemoryBatches, path: str
) -> None:
    """An empty list would be wrong."""
    batches.is_ready = False

    status, body, headers = await gateway.call("GET", path)

    assert (status, body["error"]["code"]) == (503, "broker_unavailable")
    assert headers["Retry-After"]


async def test_upload_that_kafka_does_not_take_leaves_no_file(
    gateway: Served, batches: MemoryBatches
) -> None:
    """The client sends it again."""
    batches.is_available = False

    status, body, headers = await gateway.call("POST", "/v1/files", data=form())

    assert (status, body["error"]["code"]) == (503, "broker_unavailable")
    assert headers["x-should-retry"] == "true"
    assert batches.contents() == []


# Limits of a tenant


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[Served]:
    """A gateway that keeps two files and two batches for each tenant."""
    limited = MemoryBatches(tmp_path, max_files=2, max_batches=2)
    async with served(tmp_path, batches=limited) as running:
        yield running


async def refused(gateway: Served, key: str, path: str, **body: Any) -> dict[str, Any]:
    """Send a request that is one too many; return the error."""
    status, value, headers = await gateway.call("POST", path, key=key, **body)
    assert (status, headers["x-should-retry"]) == (429, "false")
    assert "Retry-After" not in headers
    error: dict[str, Any] = value["error"]
    return error


async def test_upload_beyond_the_files_of_a_tenant_is_429_until_one_is_deleted(narrow: Served) -> None:
    """The message has the number, the setting and the advice; other tenants are not concerned."""
    first = await upload(narrow)
    await upload(narrow)
    error = await refused(narrow, ACME, "/v1/files", data=form())
    other = await upload(narrow, key=OTHER)
    await narrow.call("DELETE", f"/v1/files/{first}")

    assert (error["type"], error["code"], error["retriable"]) == ("rate_limit_error", "too_many_files", False)
    assert error["message"].startswith("there are 2 files, at most 2 are kept (batch.max_files): delete some")
    assert other
    assert await upload(narrow)


async def test_upload_that_is_one_too_many_is_not_stored(tmp_path: Path) -> None:
    """Neither its content nor a record of it."""
    limited = MemoryBatches(tmp_path, max_files=1)
    async with served(tmp_path, batches=limited) as gateway:
        await upload(gateway)
        await refused(gateway, ACME, "/v1/files", data=form(b"secret"))

    assert limited.contents() == [LINE]
    assert len(limited.written) == 1


async def test_batch_beyond_those_of_a_tenant_is_429(narrow: Served) -> None:
    """Ended ones count too; a repeated request gives the batch that it has made."""
    file_id = await upload(narrow)
    for number in range(2):
        headers = {"Idempotency-Key": f"key {number}"}
        status, _, _ = await narrow.call(
            "POST", "/v1/batches", json=create(file_id, metadata={"n": str(number)}), headers=headers
        )
        assert status == 200
    error = await refused(narrow, ACME, "/v1/batches", json=create(file_id))
    again, _, answered = await narrow.call(
        "POST",
        "/v1/batches",
        json=create(file_id, metadata={"n": "1"}),
        headers={"Idempotency-Key": "key 1"},
    )
    other_file = await upload(narrow, key=OTHER)
    other, _, _ = await narrow.call("POST", "/v1/batches", key=OTHER, json=create(other_file))

    assert error["code"] == "too_many_batches"
    assert (
        "at most 2 are kept (batch.max_batches): ended ones are deleted after 2592000 s" in error["message"]
    )
    assert (again, answered["Idempotent-Replay"]) == (200, "true")
    assert other == 200


async def test_files_of_keys_without_a_tenant_are_counted_apart(narrow: Served) -> None:
    """Such a key sees the files of all tenants, but they are not its own."""
    for key in (ACME, OTHER):
        await upload(narrow, key=key)
        await upload(narrow, key=key)

    await upload(narrow, key=ALL)
    await upload(narrow, key=ALL)
    assert (await refused(narrow, ALL, "/v1/files", data=form()))["code"] == "too_many_files"
