"""`/v1/files` and `/v1/batches`: the handlers."""

from __future__ import annotations

import asyncio
import time
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import msgspec
import orjson
from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from streamworker.batch.lines import URL
from streamworker.client.ids import new_job_id
from streamworker.errors import KafkaError
from streamworker.gateway.batches.records import (
    BatchRecord,
    CancellationRecord,
    FileRecord,
    cancellation_key,
    file_value,
)
from streamworker.gateway.batches.runner import window_s
from streamworker.gateway.batches.store import StoreError
from streamworker.gateway.errors import ApiError
from streamworker.gateway.expectations import ask_for_body
from streamworker.gateway.requests import BODY_TIMEOUT_S, check_query, member, read_object

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from streamworker.gateway.auth import Caller
    from streamworker.gateway.batches.service import Batches
    from streamworker.gateway.gateway import Gateway

__all__ = ["routes"]

MAX_FIELD_BYTES = 4096
MAX_FORM_BYTES = 1 << 20
"""What an upload may have besides the file, as far as its Content-Length says it: fields, and the headers of the parts."""

MAX_NAME = 255
MAX_METADATA = 16
RETRY_KEEP_S = 600
MAX_MEMORY = 10_000

_WHY_NOT = "this gateway has no batches: they need topics.results and topics.batches"
_CREATE = ("input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after")
_CHUNK = 1 << 18


def routes(gateway: Gateway) -> list[web.RouteDef]:
    """Return the routes of this module."""
    files, batches = _Files(gateway), _Batches(gateway)
    return [
        web.post("/v1/files", files.create),
        web.get("/v1/files", files.list, allow_head=False),
        web.get("/v1/files/{file_id}", files.get, allow_head=False),
        web.delete("/v1/files/{file_id}", files.delete),
        web.get("/v1/files/{file_id}/content", files.content, allow_head=False),
        web.post("/v1/batches", batches.create),
        web.get("/v1/batches", batches.list, allow_head=False),
        web.get("/v1/batches/{batch_id}", batches.get, allow_head=False),
        web.post("/v1/batches/{batch_id}/cancel", batches.cancel),
    ]


class _Handlers:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def _enter(self, request: web.Request, scope: str) -> tuple[Caller, Batches]:
        """Return the caller, who must hold a key, and the batches. Raises ApiError 401, 403, 501, 503."""
        caller = self._gateway.authenticator.require(request, scope)
        if caller.token is not None:
            raise ApiError(
                403, "insufficient_scope", "files and batches need a key: a read token is for jobs"
            )
        batches = self._gateway.batches
        if batches is None:
            raise ApiError(501, "not_configured", _WHY_NOT)
        if not batches.is_ready:
            raise ApiError(
                503, "broker_unavailable", "this gateway has not read the state of its batches yet"
            )
        return caller, batches

    @staticmethod
    def _file(batches: Batches, caller: Caller, file_id: str) -> FileRecord:
        file = batches.table.file(file_id)
        if file is None or (caller.tenant and file.tenant != caller.tenant):
            raise ApiError(404, "not_found", "there is no file of this id", param="file_id")
        return file


class _Files(_Handlers):
    async def create(self, request: web.Request) -> web.Response:
        caller, batches = self._enter(request, "submit")
        _check_room(
            "too_many_files",
            batches.table.files_of(caller.tenant),
            batches.settings.max_files,
            "delete some: the gateway keeps files of results too",
        )
        if request.content_type != "multipart/form-data":
            raise ApiError(415, "unsupported_media_type", "a file is sent as multipart/form-data")
        if (request.content_length or 0) > batches.settings.max_file_bytes + MAX_FORM_BYTES:
            raise _too_large(batches.settings.max_file_bytes)
        file_id = _new_id("file-")
        try:
            file = await self._received(request, caller, batches, file_id)
            await _written(batches, file_id, file_id, file)
        except BaseException:  # a client that breaks off, too, leaves no content behind
            await batches.store.delete(file_id)
            raise
        return _json(file_value(file))

    @staticmethod
    async def _received(request: web.Request, caller: Caller, batches: Batches, file_id: str) -> FileRecord:
        """Store the upload. Raises ApiError."""
        try:
            form = _Form(await request.multipart())
            await ask_for_body(request)
            upload = await form.file()
            if (purpose := form.fields.get("purpose")) is not None:
                _check_purpose(purpose)  # before a long upload
            size = await batches.store.write(file_id, _limited(upload, batches.settings.max_file_bytes))
            await form.rest()
        except (ValueError, web.RequestPayloadError, HttpProcessingError, EOFError) as error:
            raise ApiError(
                400, "invalid_request", f"the form is not valid ({type(error).__name__})"
            ) from None
        except StoreError as error:
            raise ApiError(503, "overloaded", str(error)) from None
        _check_purpose(form.fields.get("purpose"))
        now = int(time.time())
        return FileRecord(
            id=file_id,
            tenant=caller.tenant,
            bytes=size,
            created_at=now,
            expires_at=now + int(batches.settings.kept_s),
            filename=_name(upload.filename),
            purpose="batch",
        )

    async def list(self, request: web.Request) -> web.Response:
        caller, batches = self._enter(request, "read")
        query = check_query(request, ("purpose", "limit", "after", "order"))
        if (order := query.get("order", "desc")) not in {"asc", "desc"}:
            raise ApiError(400, "invalid_request", "order must be asc or desc", param="order")
        page = batches.table.files(
            caller.tenant,
            purpose=query.get("purpose"),
            after=query.get("after"),
            limit=_limit(query, 10_000, 10_000),
            ascending=order == "asc",
        )
        return _page([file_value(file) for file in page], has_more=page.has_more)

    async def get(self, request: web.Request) -> web.Response:
        caller, batches = self._enter(request, "read")
        return _json(file_value(self._file(batches, caller, request.match_info["file_id"])))

    async def delete(self, request: web.Request) -> web.Response:
        caller, batches = self._enter(request, "submit")
        file = self._file(batches, caller, request.match_info["file_id"])
        try:
            await batches.store.delete(file.id)  # first: while the object is there, a failure can be repeated
        except StoreError as error:
            raise ApiError(503, "overloaded", str(error)) from None
        await _written(batches, file.id, file.id, None)
        return _json({"id": file.id, "object": "file", "deleted": True})

    async def content(self, request: web.Request) -> web.StreamResponse:
        caller, batches = self._enter(request, "read")
        file = self._file(batches, caller, request.match_info["file_id"])
        chunks = batches.store.read(file.id)
        try:
            first = await anext(chunks, b"")
        except FileNotFoundError:
            raise ApiError(404, "not_found", "the store does not have the file any more") from None
        except StoreError as error:
            raise ApiError(503, "overloaded", str(error)) from None
        response = web.StreamResponse(
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Disposition": f'attachment; filename="{file.filename}"',
                "Content-Length": str(file.bytes),
            }
        )
        await response.prepare(request)
        await response.write(first)
        async for chunk in chunks:
            await response.write(chunk)
        await response.write_eof()
        return response


class _Batches(_Handlers):
    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway)
        self._recent = _Recent()

    async def create(self, request: web.Request) -> web.Response:
        caller, batches = self._enter(request, "submit")
        body = await read_object(request, _CREATE)
        digest = sha256(msgspec.json.encode(body, order="sorted")).digest()
        async with self._recent.lock:
            known = self._known(request, caller, digest)
            if known is not None and (batch := batches.table.batch(known)) is not None:
                return _json(batches.table.value(batch), headers={"Idempotent-Replay": "true"})
            _check_room(
                "too_many_batches",
                batches.table.batches_of(caller.tenant),
                batches.settings.max_batches,
                f"ended ones are deleted after {batches.settings.kept_s:.0f} s (batch.kept_s)",
            )
            # A write that is not acknowledged may arrive yet: the client's next try must have the same id.
            batch = self._new_batch(batches, caller, body, known or _new_id("batch_"))
            self._remember(request, caller, digest, batch.id)
            await _written(batches, batch.id, batch.id, batch)
        return _json(batches.table.value(batches.table.batch(batch.id) or batch))

    async def list(self, request: web.Request) -> web.Response:
        caller, batches = self._enter(request, "read")
        query = check_query(request, ("limit", "after"))
        page = batches.table.batches(caller.tenant, after=query.get("after"), limit=_limit(query, 20, 100))
        return _page([batches.table.value(batch) for batch in page], has_more=page.has_more)

    async def get(self, request: web.Request) -> web.Response:
        caller, batches = self._enter(request, "read")
        return _json(batches.table.value(self._batch(batches, caller, request)))

    async def cancel(self, request: web.Request) -> web.Response:
        caller, batches = self._enter(request, "cancel")
        batch = self._batch(batches, caller, request)
        if batch.has_ended:
            raise ApiError(400, "invalid_request", f"the batch cannot be cancelled: it is {batch.status}")
        if not batches.table.is_cancelled(batch.id):
            record = CancellationRecord(batch_id=batch.id, requested_at=int(time.time()))
            await _written(batches, batch.id, cancellation_key(batch.id), record)
        return _json(batches.table.value(self._batch(batches, caller, request)))

    @staticmethod
    def _batch(batches: Batches, caller: Caller, request: web.Request) -> BatchRecord:
        batch = batches.table.batch(request.match_info["batch_id"])
        if batch is None or (caller.tenant and batch.tenant != caller.tenant):
            raise ApiError(404, "not_found", "there is no batch of this id", param="batch_id")
        return batch

    def _new_batch(
        self, batches: Batches, caller: Caller, body: Mapping[str, Any], batch_id: str
    ) -> BatchRecord:
        if (endpoint := member(body, "endpoint", str, "")) != URL:
            raise ApiError(
                400, "invalid_request", f"endpoint must be {URL}, not {endpoint[:64]}", param="endpoint"
            )
        window = member(body, "completion_window", str, "")
        if (seconds := window_s(window)) is None:
            raise ApiError(
                400,
                "invalid_request",
                "completion_window must be a time such as 24h, 90m or 7d",
                param="completion_window",
            )
        file = batches.table.file(file_id := member(body, "input_file_id", str, ""))
        if file is None or (caller.tenant and file.tenant != caller.tenant):
            raise ApiError(400, "invalid_request", f"there is no file {file_id[:80]}", param="input_file_id")
        if file.purpose != "batch":
            raise ApiError(
                400,
                "invalid_request",
                f"the file's purpose is {file.purpose}, not batch",
                param="input_file_id",
            )
        now = int(time.time())
        return BatchRecord(
            id=batch_id,
            tenant=file.tenant,
            input_file_id=file.id,
            completion_window=window,
            created_at=now,
            expires_at=now + seconds,
            metadata=_metadata(body.get("metadata")),
        )

    def _known(self, request: web.Request, caller: Caller, digest: bytes) -> str | None:
        """Return the batch that the same request has made: an SDK repeats a POST whose response it did not get."""
        now = time.monotonic()
        if (key := request.headers.get("Idempotency-Key")) is not None:
            if not 0 < len(key) <= 200:
                raise ApiError(400, "invalid_request", "Idempotency-Key must have 1 to 200 characters")
            found = self._recent.find((caller.account, key), now)
            if found is not None and found[0] != digest:
                raise ApiError(409, "idempotency_mismatch", "this Idempotency-Key was used with another body")
            return None if found is None else found[1]
        if request.headers.get("x-stainless-retry-count", "0") == "0":
            return None
        found = self._recent.find((caller.account, digest), now)
        return None if found is None else found[1]

    def _remember(self, request: web.Request, caller: Caller, digest: bytes, batch_id: str) -> None:
        now = time.monotonic()
        self._recent.add((caller.account, digest), (digest, batch_id), now)
        if (key := request.headers.get("Idempotency-Key")) is not None:
            self._recent.add((caller.account, key), (digest, batch_id), now)


class _Recent:
    """The batches of the last ten minutes by request. Bounded: the oldest is forgotten."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self._entries: dict[object, tuple[float, tuple[bytes, str]]] = {}

    def find(self, key: object, now: float) -> tuple[bytes, str] | None:
        """Return digest and batch of a request."""
        entry = self._entries.get(key)
        return entry[1] if entry is not None and entry[0] > now else None

    def add(self, key: object, value: tuple[bytes, str], now: float) -> None:
        """Remember a request."""
        self._entries.pop(key, None)
        while len(self._entries) >= MAX_MEMORY:
            del self._entries[next(iter(self._entries))]
        self._entries[key] = now + RETRY_KEEP_S, value


class _Form:
    """The parts of an upload, read in the order in which they come."""

    def __init__(self, reader: MultipartReader) -> None:
        self.fields: dict[str, str] = {}
        self._reader = reader

    async def file(self) -> BodyPartReader:
        """Return the part `file`; the fields before it are read. Raises ApiError 400."""
        while (part := await self._next()) is not None:
            if part.name == "file":
                return part
            await self._read_field(part)
        raise ApiError(400, "invalid_request", "the form has no file", param="file")

    async def rest(self) -> None:
        """Read the fields behind the file."""
        while (part := await self._next()) is not None:
            if part.name == "file":
                raise ApiError(400, "invalid_request", "the form has two files", param="file")
            await self._read_field(part)

    async def _next(self) -> BodyPartReader | None:
        part = await _in_time(self._reader.next())
        if part is not None and not isinstance(part, BodyPartReader):
            raise ApiError(400, "invalid_request", "parts of the form must not have parts of their own")
        return part

    async def _read_field(self, part: BodyPartReader) -> None:
        value = bytearray()
        while chunk := await _in_time(part.read_chunk(MAX_FIELD_BYTES)):
            value += chunk
            if len(value) > MAX_FIELD_BYTES:
                raise ApiError(413, "too_large", f"a field of the form has more than {MAX_FIELD_BYTES} bytes")
        if len(self.fields) >= MAX_METADATA:
            raise ApiError(400, "invalid_request", "the form has too many fields")
        self.fields[(part.name or "")[:64]] = value.decode(errors="replace")


async def _limited(part: BodyPartReader, limit: int) -> AsyncIterator[bytes]:
    size = 0
    while chunk := await _in_time(part.read_chunk(_CHUNK)):
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        yield bytes(chunk)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "too_large", f"the file has more than {limit} bytes (batch.max_file_bytes)")


async def _in_time(work: Any) -> Any:
    """Wait for a part of the body. Raises ApiError 408."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await work
    except TimeoutError:
        raise ApiError(
            408, "request_timeout", f"the body has not moved on for {BODY_TIMEOUT_S:g} s"
        ) from None


async def _written(batches: Batches, id_: str, key: str, record: Any) -> None:
    try:
        await batches.write(id_, key, record)
    except KafkaError as error:
        raise ApiError(503, "broker_unavailable", str(error)) from None


def _check_room(code: str, has: int, limit: int, advice: str) -> None:
    """Raise ApiError 429 if a tenant has as many as it may have. Each gateway counts what it has read."""
    if has >= limit:
        kind = code.removeprefix("too_many_")
        raise ApiError(
            429, code, f"there are {has} {kind}, at most {limit} are kept (batch.max_{kind}): {advice}"
        )


def _check_purpose(purpose: str | None) -> None:
    if purpose != "batch":
        raise ApiError(400, "invalid_request", "purpose must be batch", param="purpose")


def _name(name: str | None) -> str:
    """Return a file's name without path and without characters that a header cannot have."""
    plain = (name or "").rpartition("/")[2].rpartition("\\")[2]
    plain = "".join(c for c in plain if c.isprintable() and c.isascii() and c not in '"\\;')
    return plain[:MAX_NAME] or "batch.jsonl"


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    is_valid = isinstance(value, dict) and len(value) <= MAX_METADATA
    if not is_valid or not all(
        isinstance(text, str) and len(name) <= 64 and len(text) <= 512 for name, text in value.items()
    ):
        raise ApiError(
            400,
            "invalid_request",
            "metadata must be an object with at most 16 texts of 512 characters, with names of 64",
            param="metadata",
        )
    return dict(value)


def _limit(query: Mapping[str, str], default: int, most: int) -> int:
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= most and len(text) < 9):
        raise ApiError(400, "invalid_request", f"limit must be a number from 1 to {most}", param="limit")
    return int(text)


def _new_id(prefix: str) -> str:
    """Return a random id that begins with the time, so that the order of ids is that of creation."""
    return prefix + new_job_id().replace("-", "")


def _page(data: list[dict[str, Any]], *, has_more: bool) -> web.Response:
    return _json(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": has_more,
        }
    )


def _json(value: Any, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json", headers=headers)
