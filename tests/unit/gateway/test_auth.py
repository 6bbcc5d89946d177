"""Who calls: credentials in every place, scopes, tenants, and what is not a credential."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from multidict import CIMultiDict

from tests.unit.gateway.served import ACME, ALL, OTHER, READ_ONLY, served

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.gateway.served import Served

JOB = {"request": {"model": "m", "messages": [{"role": "user", "content": "hi"}]}}


@pytest.mark.parametrize(
    ("headers", "query", "status"),
    [
        ({"Authorization": f"Bearer {ACME}"}, "", 200),
        ({"Authorization": f"bearer   {ACME} "}, "", 200),
        ({"X-API-Key": ACME}, "", 200),
        ({"Authorization": f"Basic {ACME}"}, "", 401),
        ({"Authorization": "Bearer"}, "", 401),
        ({"Authorization": "Bearer "}, "", 401),
        ({"Authorization": ACME}, "", 401),
        ({"Authorization": "Bearer swk_wrong"}, "", 401),
        ({"Authorization": "Bearer é"}, "", 401),
        ({"Authorization": "Bearer swk_wrong", "X-API-Key": ACME}, "", 401),
        ({"X-API-Key": "swk_wrong"}, "", 401),
        ({}, "", 401),
        ({}, f"?access_token={ACME}", 401),
        ({}, "?access_token=a.b.c", 401),
        ({}, "?access_token=eyJ.eyJ.sig", 401),
    ],
)
async def test_credential_is_taken_from_its_places_only(
    gateway: Served, headers: dict[str, str], query: str, status: int
) -> None:
    """A key never stands in a URL; a wrong credential is not tried elsewhere; each refusal is counted."""
    gateway.log.publish("acme.1", ["a"])
    found, value, sent = await gateway.call("GET", f"/v1/jobs/acme.1{query}", key=None, headers=headers)

    assert found == status
    if status == 401:
        assert value["error"]["type"] == "authentication_error"
        assert value["error"]["code"] == "unauthenticated"
        assert sent["WWW-Authenticate"].startswith("Bearer")
        assert gateway.metric("gateway_auth_failures_total", code="unauthenticated") == 1


@pytest.mark.parametrize("other", [f"Bearer {ACME}", "Bearer swk_wrong", "Basic x", ""])
async def test_authorization_that_is_given_twice_is_401(gateway: Served, other: str) -> None:
    """A proxy may have checked the other one."""
    headers = CIMultiDict([("Authorization", f"Bearer {ACME}"), ("Authorization", other)])
    async with gateway.http.get(gateway.url + "/v1/models", headers=headers) as response:
        value = await response.json()

    assert (response.status, value["error"]["code"]) == (401, "unauthenticated")


async def test_read_token_works_in_header_and_query_and_for_its_jobs_only(gateway: Served) -> None:
    """Another job answers as one that does not exist."""
    token, _ = gateway.gateway.authenticator.tokens.sign(["acme.1", "acme.c-*"], "read", 60)
    for job_id in ("acme.1", "acme.c-7", "acme.2"):
        gateway.log.publish(job_id, ["a"])
    statuses = {}
    for job_id in ("acme.1", "acme.c-7", "acme.2", "acme.c"):
        in_query, _, _ = await gateway.call("GET", f"/v1/jobs/{job_id}?access_token={token}", key=None)
        in_header, _, _ = await gateway.call("GET", f"/v1/jobs/{job_id}", key=token)
        assert in_query == in_header
        statuses[job_id] = in_query

    assert statuses == {"acme.1": 200, "acme.c-7": 200, "acme.2": 404, "acme.c": 404}


async def test_expired_token_is_401_with_the_reason(gateway: Served) -> None:
    """RFC 6750 section 3.1."""
    authenticator = gateway.gateway.authenticator
    token, _ = authenticator.tokens.sign(["acme.1"], "read", -5)
    status, value, headers = await gateway.call("GET", "/v1/jobs/acme.1", key=token)

    assert (status, value["error"]["message"]) == (401, "the token has expired")
    assert headers["WWW-Authenticate"] == (
        'Bearer error="invalid_token", error_description="the token has expired"'
    )


async def test_reason_in_the_challenge_has_no_quotes(gateway: Served) -> None:
    """RFC 6750 section 3: they would end the parameter; the body has the message as it is."""
    token, _ = gateway.gateway.authenticator.tokens.sign(["acme.1"], "submit", 60)
    status, value, headers = await gateway.call("GET", "/v1/jobs/acme.1", key=token)

    assert (status, value["error"]["message"]) == (401, 'the claim scope must be "read" or "read cancel"')
    assert headers["WWW-Authenticate"] == (
        "Bearer error=\"invalid_token\", error_description=\"the claim scope must be 'read' or 'read cancel'\""
    )


# Tenants

PATHS = [
    ("GET", "/v1/jobs/{}", None, 200),
    ("GET", "/v1/jobs/{}/events", None, 200),
    ("POST", "/v1/jobs/{}/cancel", None, 202),
]


@pytest.mark.parametrize(("method", "path", "body", "own"), PATHS)
@pytest.mark.parametrize("key", [ACME, OTHER, ALL])
@pytest.mark.parametrize("job_id", ["acme.1", "acme2.1", "acme", "acme:1", "other.1", "Acme.1", "b.1.2"])
async def test_job_of_another_tenant_does_not_exist(
    gateway: Served, method: str, path: str, body: object, own: int, key: str, job_id: str
) -> None:
    """The prefix with its dot decides, and nothing else."""
    gateway.log.publish(job_id, ["a"])
    status, value, _ = await gateway.call(method, path.format(job_id), key=key, json=body)
    tenant = {ACME: "acme.", OTHER: "other.", ALL: ""}[key]

    is_own = job_id.startswith(tenant)
    assert status == (own if is_own else 404)
    if not is_own:
        assert value["error"]["code"] == "job_not_found"
        assert value["error"]["message"] == f"job {job_id} was not found"
        assert gateway.log.opened == []
        assert gateway.writer.records == []


@pytest.mark.parametrize(
    ("key", "job_id", "status"),
    [
        (ACME, "acme.1", 202),
        (ACME, "other.1", 403),
        (ACME, "acme", 403),
        (ALL, "other.1", 202),
        (ALL, "x", 202),
    ],
)
async def test_job_id_that_is_given_must_be_in_the_tenant(
    gateway: Served, key: str, job_id: str, status: int
) -> None:
    """Nothing is written otherwise."""
    found, value, _ = await gateway.call("POST", "/v1/jobs", key=key, json={**JOB, "job_id": job_id})

    assert found == status
    assert len(gateway.writer.records) == (status == 202)
    if status == 403:
        assert (value["error"]["code"], value["error"]["type"]) == ("outside_tenant", "permission_error")


# Scopes


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/jobs", JOB),
        ("POST", "/v1/jobs/acme.1/cancel", {}),
        ("POST", "/v1/tokens", {"jobs": ["acme.1"]}),
    ],
)
async def test_scope_that_the_key_lacks_is_403(gateway: Served, method: str, path: str, body: object) -> None:
    """The challenge names the scope."""
    status, value, headers = await gateway.call(method, path, key=READ_ONLY, json=body)

    assert (status, value["error"]["code"]) == (403, "insufficient_scope")
    assert 'error="insufficient_scope"' in headers["WWW-Authenticate"]
    assert headers["x-should-retry"] == "false"
    assert gateway.metric("gateway_auth_failures_total", code="insufficient_scope") == 1
    assert gateway.writer.records == []


async def test_token_with_the_scope_to_cancel_cancels(gateway: Served) -> None:
    """A token to read alone does not."""
    tokens = gateway.gateway.authenticator.tokens
    reader, canceller = (tokens.sign(["acme.1"], scope, 60)[0] for scope in ("read", "read cancel"))
    refused, _, _ = await gateway.call("POST", "/v1/jobs/acme.1/cancel", key=reader)
    accepted, _, _ = await gateway.call("POST", "/v1/jobs/acme.1/cancel", key=canceller)

    assert (refused, accepted) == (403, 202)


# Limits


async def test_key_with_too_many_requests_is_429_for_a_while(tmp_path: Path) -> None:
    """`Retry-After` says for how long; another key is not concerned."""
    async with served(tmp_path, limits={"requests_per_minute": 2}) as gateway:
        gateway.log.publish("acme.1", ["a"])
        statuses = [(await gateway.call("GET", "/v1/jobs/acme.1"))[0] for _ in range(3)]
        _, value, headers = await gateway.call("GET", "/v1/jobs/acme.1")
        other, _, _ = await gateway.call("GET", "/v1/jobs/acme.1", key=ALL)

    assert statuses == [200, 200, 429]
    assert (value["error"]["code"], value["error"]["type"]) == ("too_many_requests", "rate_limit_error")
    assert 0 < int(headers["Retry-After"]) <= 30
    assert other == 200


# Without authentication


@pytest.mark.parametrize("key", [None, "sk-any", ACME])
async def test_gateway_without_authentication_takes_any_credential_or_none(
    tmp_path: Path, key: str | None
) -> None:
    """SDKs always send a key."""
    async with served(tmp_path, auth="off") as gateway:
        status, value, _ = await gateway.call("POST", "/v1/jobs", key=key, json=JOB)

    assert status == 202
    assert "." not in value["job_id"]


async def test_gateway_without_authentication_still_verifies_tokens(tmp_path: Path) -> None:
    """A token that is wrong is not turned into the right to everything."""
    async with served(tmp_path, auth="off") as gateway:
        status, _, _ = await gateway.call("GET", "/v1/jobs/acme.1", key="eyJa.eyJb.c")

    assert status == 401
