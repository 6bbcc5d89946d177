"""`/v1/jobs`, `/v1/tokens`: submit, look at, cancel; and tokens to hand to browsers."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from streamworker.gateway.errors import ApiError
from streamworker.gateway.feed_errors import timestamp
from streamworker.gateway.gateway import JOB_ID
from streamworker.gateway.jobs import check_job_id, check_reason, check_record_key
from streamworker.gateway.requests import (
    check_query,
    member,
    read_body,
    read_object,
    read_raw_object,
    seconds,
    since_ms,
)
from streamworker.gateway.tokens import job_fault
from streamworker.wire.json import InvalidJSON, decode, encode, replace_surrogates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamworker.gateway.auth import Caller
    from streamworker.gateway.feeds import JobSnapshot
    from streamworker.gateway.gateway import Gateway
    from streamworker.gateway.jobs import Submitted

__all__ = ["routes", "submitted_value"]

TOKEN_TTL_S = 600
MAX_WAIT_S = 60

_ENDED_CACHE = "private, max-age=3600"


def routes(gateway: Gateway) -> list[web.RouteDef]:
    """Return the routes of this module."""
    handlers = _Handlers(gateway)
    return [
        web.post("/v1/jobs", handlers.submit),
        web.get("/v1/jobs/{job_id}", handlers.get, allow_head=False),
        web.post("/v1/jobs/{job_id}/cancel", handlers.cancel),
        web.post("/v1/tokens", handlers.sign),
    ]


def submitted_value(gateway: Gateway, submitted: Submitted) -> dict[str, Any]:
    """Return the object that describes a job which was just submitted."""
    job_id, cursor, _ = submitted
    shard = gateway.event_log.partition(job_id)
    return {
        "object": "job",
        "job_id": job_id,
        "status": "queued",
        "cursor": cursor,
        "events_url": f"/v1/jobs/{job_id}/events?cursor={cursor}&shard={shard}",
        "shard": shard,
    }


class _Handlers:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._max_age_s = gateway.settings.gateway.token_max_age_s

    async def submit(self, request: web.Request) -> web.Response:
        gateway = self._gateway
        caller = gateway.authenticator.require(request, "submit")
        query = check_query(request, ("token", "ttl_s"))
        ttl_s = self._wanted_token(query, caller)
        body = await read_body(request)
        job: dict[str, Any] = dict(read_raw_object(body))
        key = check_record_key(_value(job.pop("key", None)))
        gateway.require_broker()
        submitted = await gateway.jobs.submit_request(request, caller, body, job, key=key)
        request[JOB_ID] = submitted.job_id
        value = submitted_value(gateway, submitted)
        if ttl_s is not None:
            token, expires_at = gateway.authenticator.tokens.sign([submitted.job_id], "read", ttl_s)
            value |= {"read_token": token, "read_token_expires_at": timestamp(expires_at * 1000)}
        headers = {"Location": f"/v1/jobs/{submitted.job_id}"}
        if submitted.is_replayed:
            headers["Idempotent-Replay"] = "true"
        return _json(value, 202, headers)

    def _wanted_token(self, query: Mapping[str, str], caller: Caller) -> int | None:
        """Return the lifetime of the read token that the query asks for; None if it asks for none."""
        if "token" not in query:
            if "ttl_s" in query:
                raise ApiError(400, "invalid_request", "ttl_s needs token=read", param="ttl_s")
            return None
        if query["token"] != "read":  # noqa: S105 - a word of the query
            raise ApiError(400, "invalid_request", "token must be read", param="token")
        self._gateway.authenticator.check_scope(caller, "token")
        self._require_signer()
        ttl_s = seconds(
            query, "ttl_s", low=1, high=self._max_age_s, default=min(TOKEN_TTL_S, self._max_age_s)
        )
        return int(ttl_s)

    async def get(self, request: web.Request) -> web.Response:
        gateway = self._gateway
        caller = gateway.authenticator.require(request, "read")
        job_id = _job_id(request, caller)
        query = check_query(request, ("wait_s", "cursor", "since"))
        wait_s = seconds(query, "wait_s", low=0, high=MAX_WAIT_S, default=0)
        since = since_ms(query.get("since"))
        gateway.require_broker()
        snapshot = await gateway.event_log.snapshot(
            job_id, cursor=query.get("cursor") or None, since_ms=since, wait_s=wait_s
        )
        if not snapshot.has_ended:
            return _json(_value_of(snapshot), 200, {"Cache-Control": "no-store"})
        headers = {"ETag": _etag(snapshot), "Cache-Control": _ENDED_CACHE}
        if _matches(request, headers["ETag"]):
            return web.Response(status=304, headers=headers)
        return _json(_value_of(snapshot), 200, headers)

    async def cancel(self, request: web.Request) -> web.Response:
        gateway = self._gateway
        caller = gateway.authenticator.require(request, "cancel")
        job_id = _job_id(request, caller)
        check_query(request, ())
        body = await read_object(request, ("reason",), may_be_empty=True)
        reason = check_reason(body.get("reason"))
        gateway.require_broker()
        await gateway.jobs.cancel(job_id, reason)
        return _json({"job_id": job_id, "cancelling": True}, 202)

    async def sign(self, request: web.Request) -> web.Response:
        caller = self._gateway.authenticator.require(request, "token")
        check_query(request, ())
        body = await read_object(request, ("jobs", "scope", "ttl_s"))
        self._require_signer()
        jobs = body.get("jobs")
        if fault := job_fault(jobs):
            raise ApiError(400, "invalid_request", f"jobs {fault}", param="jobs")
        scope = member(body, "scope", str, "read")
        if scope not in {"read", "read cancel"}:
            raise ApiError(400, "invalid_request", 'scope must be "read" or "read cancel"', param="scope")
        ttl_s = member(body, "ttl_s", int, min(TOKEN_TTL_S, self._max_age_s))
        if not 1 <= ttl_s <= self._max_age_s:
            raise ApiError(
                400, "invalid_request", f"ttl_s must be from 1 to {self._max_age_s}", param="ttl_s"
            )
        self._check_jobs(caller, jobs)
        if scope == "read cancel":
            self._gateway.authenticator.check_scope(caller, "cancel")
        token, expires_at = self._gateway.authenticator.tokens.sign(jobs, scope, ttl_s)
        return _json({"token": token, "expires_at": timestamp(expires_at * 1000)}, 201)

    def _check_jobs(self, caller: Caller, jobs: Sequence[str]) -> None:
        prefix = f"{caller.tenant}."
        if caller.tenant and not all(job.startswith(prefix) for job in jobs):
            raise ApiError(403, "outside_tenant", f"each of jobs must begin with {prefix} here", param="jobs")

    def _require_signer(self) -> None:
        if not self._gateway.authenticator.tokens.can_sign:
            raise ApiError(
                501,
                "not_configured",
                "this gateway signs no tokens: write a line kid:base64url-secret to the file of gateway.token_secrets_file",
            )


def _job_id(request: web.Request, caller: Caller) -> str:
    job_id = check_job_id(request.match_info["job_id"], caller)
    request[JOB_ID] = job_id
    return job_id


def _value(raw: msgspec.Raw | None) -> Any:
    if raw is None or isinstance(raw, str):  # a string where the body had lone surrogates
        return replace_surrogates(raw)
    try:
        return replace_surrogates(decode(bytes(raw)))
    except (InvalidJSON, TypeError):
        return b""  # not a valid value of anything


def _value_of(snapshot: JobSnapshot) -> dict[str, Any]:
    ending: Any = snapshot.ending
    if snapshot.ending_value is not None:
        ending = msgspec.Raw(snapshot.ending_value)
    return {
        "object": "job",
        "job_id": snapshot.job_id,
        "status": snapshot.status,
        "attempt": snapshot.attempt,
        "attempts_seen": snapshot.attempts_seen,
        "model": snapshot.model,
        "cursor": snapshot.cursor,
        "choices": list(snapshot.choices),
        "ending": ending,
    }


def _etag(snapshot: JobSnapshot) -> str:
    """Return the entity tag of an ended job: its attempt, because another run may follow under the same id."""
    return f'"{zlib.crc32((snapshot.attempt or "").encode()):08x}"'


def _matches(request: web.Request, etag: str) -> bool:
    given = ",".join(request.headers.getall("If-None-Match", ()))
    return given.strip() == "*" or any(tag.strip().removeprefix("W/") == etag for tag in given.split(","))


def _json(value: Any, status: int, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(status=status, body=encode(value), content_type="application/json", headers=headers)
