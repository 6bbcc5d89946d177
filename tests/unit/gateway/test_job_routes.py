"""`/v1/jobs` and `/v1/tokens` over HTTP, with an event log and a writer in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.unit.gateway.served import Served

JOB = {"request": {"model": "m", "messages": [{"role": "user", "content": "hi"}]}}


async def test_job_submitted_is_written_with_its_tenant_and_answered_202(gateway: Served) -> None:
    """The id begins with the tenant; the gateway sets `metadata.tenant`."""
    job = {**JOB, "metadata": {"tenant": "another", "page": "home"}, "key": "conversation 7"}
    status, value, headers = await gateway.call("POST", "/v1/jobs", json=job)

    assert status == 202
    job_id = value["job_id"]
    assert job_id.startswith("acme.")
    assert headers["Location"] == f"/v1/jobs/{job_id}"
    assert value["events_url"] == f"/v1/jobs/{job_id}/events?cursor={value['cursor']}&shard={value['shard']}"
    assert (value["object"], value["status"]) == ("job", "queued")
    [(topic, key, record)] = gateway.writer.records
    assert (topic, key) == ("streamworker.jobs", "conversation 7")
    assert record == {**JOB, "job_id": job_id, "metadata": {"tenant": "acme", "page": "home"}}


@pytest.mark.parametrize("path", ["/v1/jobs/acme.1", "/v1/jobs/other.1", "/nowhere"])
async def test_request_without_a_credential_is_401_or_404(gateway: Served, path: str) -> None:
    """There is no anonymous access."""
    status, value, headers = await gateway.call("GET", path, key=None)

    assert status == (404 if path == "/nowhere" else 401)
    assert value["error"]["code"] == ("not_found" if path == "/nowhere" else "unauthenticated")
    assert headers.get("WWW-Authenticate") == (None if path == "/nowhere" else "Bearer")
