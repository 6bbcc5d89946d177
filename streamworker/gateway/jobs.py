"""Submits and cancels jobs, for all endpoints."""

from __future__ import annotations

import asyncio
import re
from hashlib import sha256
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from streamworker.errors import KafkaError, RecordTooLarge
from streamworker.gateway.errors import ApiError
from streamworker.gateway.feeds import FeedError, JobNotFound
from streamworker.gateway.gateway import SPAN
from streamworker.gateway.idempotency import Memory
from streamworker.gateway.writer import NotAcknowledged
from streamworker.model import ConsumerRecord, Coordinates, Rejection
from streamworker.telemetry import gateway_metrics as table
from streamworker.wire.control import write_cancel
from streamworker.wire.job import JOB_ID_PATTERN, read_job
from streamworker.wire.json import InvalidJSON, decode, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp import web

    from streamworker.config import Settings
    from streamworker.gateway.auth import Caller
    from streamworker.gateway.feeds import EventLog
    from streamworker.gateway.idempotency import Entry
    from streamworker.gateway.writer import Writer
    from streamworker.model import Headers
    from streamworker.telemetry.metrics import Metrics

__all__ = ["Jobs", "Submitted", "check_job_id", "check_reason", "check_record_key"]

MAX_IDEMPOTENCY_KEY = 200
MAX_RECORD_KEY = 512
MAX_REASON = 500

_JOB_ID = re.compile(JOB_ID_PATTERN + r"\Z")
_SOURCE = Coordinates("gateway", 0, 0)
_TENANT = "tenant"
"""The member of a job's metadata that the gateway sets."""


class Submitted(NamedTuple):
    """A job that Kafka has. `cursor` is the place behind which all of its events are."""

    job_id: str
    cursor: str
    is_replayed: bool = False
    """Whether an earlier request made it."""


class Jobs:
    """Writes jobs and cancel records."""

    def __init__(self, settings: Settings, event_log: EventLog, writer: Writer, metrics: Metrics) -> None:
        self._topic = settings.gateway.topic or settings.topics.jobs[0]
        self._control = settings.topics.control
        self._max_bytes = settings.worker.max_job_bytes
        self._event_log = event_log
        self._writer = writer
        self._metrics = metrics
        self._by_key = Memory()
        self._by_body = Memory()

    async def submit(
        self,
        job: Mapping[str, Any],
        *,
        key: str | None = None,
        tenant: str = "",
        face: str = "jobs",
        job_id: str | None = None,
        trace: Headers = (),
    ) -> Submitted:
        """Write a job; return when all in-sync replicas have it.

        `job` is the object of a job record; values may be `msgspec.Raw`. `job_id` is used if the job has none.
        `trace` is the W3C trace context, as headers of the record.

        Raises:
            ApiError: 400 `invalid_job` with every fault, 403 `outside_tenant`, 413, or 503.
            FeedError: the place of the job's events could not be found out.
        """
        job_id, value = self.encoded(job, tenant=tenant, job_id=job_id)
        cursor = await self._event_log.place(job_id)
        began = monotonic()
        try:
            await self._write(self._topic, key or job_id, value, trace)
        except NotAcknowledged as error:
            raise ApiError(
                503,
                "submit_unknown",
                f"{error}: Kafka may have the job, or get it yet; to submit it once, send it again with this job_id",
                job_id=job_id,
            ) from None
        self._metrics.observe(table.SUBMIT_DURATION, monotonic() - began)
        self._metrics.add(table.JOBS_SUBMITTED, 1, face)
        return Submitted(job_id, cursor)

    async def submit_request(
        self,
        request: web.Request,
        caller: Caller,
        body: bytes,
        job: Mapping[str, Any],
        *,
        key: str | None = None,
        face: str = "jobs",
    ) -> Submitted:
        """Submit the job of a request, or join the job that an earlier request like it made.

        Two requests are alike if they have the same `Idempotency-Key`, or if the second one is an SDK's retry
        (`x-stainless-retry-count`) of the same body and the job has not ended. `body` is the request's body.

        Raises as `submit` does, and ApiError 409 for an Idempotency-Key that was used with another body.
        """
        trace = request[SPAN].trace
        digest = sha256(request.path.encode() + b"\n" + body).digest()
        if (given := request.headers.get("Idempotency-Key")) is not None:
            return await self._once(
                caller, _idempotency_key(given), digest, job, key=key, face=face, trace=trace
            )
        known = (caller.account, digest)
        if _retry_count(request) and (entry := self._by_body.find(known, monotonic())) is not None:
            joined = await self._unended(entry)
            if joined is not None:
                self._metrics.add(table.JOBS_JOINED, 1, "retry")
                return joined
        return await self._remembered(
            self._by_body, known, digest, job, caller, key=key, face=face, trace=trace
        )

    async def cancel(self, job_id: str, reason: str | None = None, *, face: str = "jobs") -> None:
        """Write a cancel record; return when Kafka has it. Raises ApiError, FeedError."""
        self._by_body.forget_job(job_id)  # an SDK's retry would join a job that is about to end
        try:
            await self._write(self._control, job_id, write_cancel(job_id, reason))
        except NotAcknowledged as error:
            raise ApiError(503, "broker_unavailable", f"{error}: cancel again", job_id=job_id) from None
        self._metrics.add(table.CANCELS_WRITTEN, 1, face)

    def encoded(
        self, job: Mapping[str, Any], *, tenant: str = "", job_id: str | None = None
    ) -> tuple[str, bytes]:
        """Return id and record value of a job. Raises ApiError for what every worker would reject."""
        members = dict(job)
        faults = (
            ["reply_to: cannot be set here: the gateway reads the events topic"]
            if "reply_to" in members
            else []
        )
        members.pop("reply_to", None)
        id_ = _plain(members.get("job_id", job_id or self._event_log.new_id(tenant)))
        members["job_id"] = id_
        if tenant:
            metadata = _plain(members.get("metadata", {}))
            members["metadata"] = metadata | {_TENANT: tenant} if isinstance(metadata, dict) else metadata
        try:
            value = encode(members)
        except (TypeError, ValueError, RecursionError):
            raise ApiError(400, "invalid_job", "the job cannot be encoded as JSON") from None
        if len(value) > self._max_bytes:
            raise ApiError(
                413, "too_large", f"the job has {len(value)} bytes, the limit is {self._max_bytes}"
            )
        read = read_job(ConsumerRecord(_SOURCE, 0, None, value), max_bytes=self._max_bytes)
        if isinstance(read, Rejection):
            faults += read.faults
        if faults:
            raise ApiError(
                400,
                "invalid_job",
                "the job is not valid: " + "; ".join(faults),
                param=faults[0].partition(":")[0] if ":" in faults[0] else None,
                extra={"faults": faults},
            )
        if tenant and not read.job_id.startswith(f"{tenant}."):
            raise ApiError(403, "outside_tenant", f"job_id must begin with {tenant}. here", param="job_id")
        return read.job_id, value

    async def _write(self, topic: str, key: str, value: bytes, headers: Headers = ()) -> None:
        try:
            await self._writer.write(topic, key.encode(), value, headers)
        except RecordTooLarge:
            raise ApiError(
                413, "too_large", f"Kafka refused the record for its size of {len(value)} bytes"
            ) from None
        except KafkaError as error:
            raise ApiError(503, "broker_unavailable", str(error)) from None

    # Repeated requests

    async def _once(
        self,
        caller: Caller,
        given: str,
        digest: bytes,
        job: Mapping[str, Any],
        *,
        key: str | None,
        face: str,
        trace: Headers,
    ) -> Submitted:
        known = (caller.account, given)
        entry = self._by_key.find(known, monotonic())
        if entry is None:
            return await self._remembered(
                self._by_key, known, digest, job, caller, key=key, face=face, trace=trace
            )
        if entry.digest != digest:
            raise ApiError(
                409,
                "idempotency_mismatch",
                "the Idempotency-Key was used with another body",
                job_id=entry.job_id,
            )
        if _is_unknown(entry.task):
            return await self._remembered(
                self._by_key, known, digest, job, caller, key=key, face=face, trace=trace, job_id=entry.job_id
            )
        submitted = await asyncio.shield(entry.task)
        self._metrics.add(table.JOBS_JOINED, 1, "idempotency")
        return submitted._replace(is_replayed=True)

    async def _unended(self, entry: Entry) -> Submitted | None:
        """Return the job of an earlier request if it has not ended."""
        try:
            submitted = await asyncio.shield(entry.task)
            snapshot = await self._event_log.snapshot(submitted.job_id, cursor=submitted.cursor)
        except JobNotFound:
            return submitted._replace(is_replayed=True)
        except (ApiError, FeedError):
            return None
        return None if snapshot.has_ended else submitted._replace(is_replayed=True)

    async def _remembered(
        self,
        memory: Memory,
        known: object,
        digest: bytes,
        job: Mapping[str, Any],
        caller: Caller,
        *,
        key: str | None,
        face: str,
        trace: Headers,
        job_id: str | None = None,
    ) -> Submitted:
        """Submit a job in a task of its own: another request may wait for it when the first one is gone."""
        job_id, _ = self.encoded(job, tenant=caller.tenant, job_id=job_id)
        work = self.submit(job, key=key, tenant=caller.tenant, face=face, job_id=job_id, trace=trace)
        task = asyncio.get_running_loop().create_task(work)
        entry = memory.add(known, digest, job_id, task, monotonic())

        def ended(task: asyncio.Task[Submitted]) -> None:
            if not task.cancelled() and task.exception() is not None and not _is_unknown(task):
                memory.forget(known, entry)  # nothing was written: the next request begins anew

        task.add_done_callback(ended)
        return await asyncio.shield(task)


def check_job_id(job_id: str, caller: Caller) -> str:
    """Return the id if it is a job's and the caller's; another's does not exist for it. Raises ApiError."""
    if not _JOB_ID.match(job_id):
        raise ApiError(
            400, "invalid_request", "the job id must be 1 to 200 of A-Z a-z 0-9 . _ : -", param="job_id"
        )
    if not caller.allows(job_id):
        raise ApiError(404, "job_not_found", f"job {job_id} was not found", job_id=job_id)
    return job_id


def check_reason(reason: object) -> str | None:
    """Return the reason of a cancellation. Raises ApiError."""
    if reason is None or (isinstance(reason, str) and len(reason) <= MAX_REASON):
        return reason or None
    raise ApiError(
        400, "invalid_request", f"reason must be text of at most {MAX_REASON} characters", param="reason"
    )


def check_record_key(key: object) -> str | None:
    """Return the `key` member of a request that submits a job: the record's key. Raises ApiError."""
    if key is None or (isinstance(key, str) and 1 <= len(key) <= MAX_RECORD_KEY):
        return key
    raise ApiError(
        400, "invalid_request", f"key must be text of 1 to {MAX_RECORD_KEY} characters", param="key"
    )


def _plain(value: Any) -> Any:
    """Decode a raw member. A value that is not valid is returned as it is: the job's reader reports it."""
    if isinstance(value, msgspec.Raw):
        try:
            return decode(bytes(value))
        except InvalidJSON:
            return value
    return value


def _is_unknown(task: asyncio.Task[Submitted]) -> bool:
    """Whether a submission ended without an answer of Kafka."""
    if not task.done() or task.cancelled():
        return False
    error = task.exception()
    return isinstance(error, ApiError) and error.code == "submit_unknown"


def _idempotency_key(given: str) -> str:
    if not 1 <= len(given) <= MAX_IDEMPOTENCY_KEY:
        raise ApiError(
            400, "invalid_request", f"Idempotency-Key must have 1 to {MAX_IDEMPOTENCY_KEY} characters"
        )
    return given


def _retry_count(request: web.Request) -> int:
    given = request.headers.get("x-stainless-retry-count", "")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 10 else 0
