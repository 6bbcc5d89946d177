"""The OpenAPI document and the code: the same routes, the statuses that the tests see, and what schemathesis finds."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import threading
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from streamworker.gateway.app import application
from streamworker.gateway.errors import CODES, error_type
from tests.reference import SCHEMAS, openapi
from tests.unit.gateway.batches import MemoryBatches
from tests.unit.gateway.memory import MemoryLog, MemoryWriter
from tests.unit.gateway.served import ALL, served

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.unit.gateway.served import Served

DOCUMENT: dict[str, Any] = json.loads((SCHEMAS / "gateway.openapi.json").read_text())
METHODS = {"get", "post", "delete", "put", "patch"}
NOT_DOCUMENTED = re.compile(r"/page/")
"""The page's own files."""


def test_json_document_is_the_yaml_one() -> None:
    """`make docs` was run since the YAML changed."""
    assert openapi() == (SCHEMAS / "gateway.openapi.json").read_text()


async def test_document_is_served_without_a_credential(gateway: Served) -> None:
    """As the page is."""
    status, value, headers = await gateway.call("GET", "/openapi.json", key=None)

    assert (status, value) == (200, DOCUMENT)
    assert headers["Content-Type"] == "application/json"


async def test_every_route_is_documented_and_every_documented_one_exists(gateway: Served) -> None:
    """With its methods."""
    app = application(gateway.gateway)
    served_ = {
        (route.resource.canonical, route.method.lower())
        for route in app.router.routes()
        if route.resource is not None and not NOT_DOCUMENTED.search(route.resource.canonical)
    }
    documented = {
        (path, method) for path, item in DOCUMENT["paths"].items() for method in item if method in METHODS
    }

    assert {one for one in served_ if one[1] != "head"} == documented


def test_errors_of_the_document_have_the_types_of_the_code() -> None:
    """The enumeration of `type` is complete."""
    schema = DOCUMENT["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["type"]

    assert set(schema["enum"]) == {error_type(status) for code in CODES.values() for status in code.statuses}


def test_references_of_the_document_resolve() -> None:
    """And every component is used."""
    text = json.dumps(DOCUMENT)
    found = set(re.findall(r'"\$ref": "#/components/(\w+)/(\w+)"', text))
    defined = {
        (kind, name)
        for kind in ("parameters", "responses", "schemas")
        for name in DOCUMENT["components"][kind]
    }

    assert found == defined
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


# Schemathesis


class _Writer(MemoryWriter):
    """Runs each job at once: its events are in the log when it is acknowledged."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__()
        self._log = log

    async def write(self, topic: str, key: bytes, value: bytes, headers: Any = ()) -> None:
        await super().write(topic, key, value, headers)
        record = json.loads(value)
        if "request" in record:
            self._log.publish(record["job_id"], ["hi"])


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway in a thread of its own."""
    ready, stop = threading.Event(), asyncio.Event()
    found: dict[str, Any] = {}

    async def serve(directory: Path) -> None:
        found["loop"] = asyncio.get_running_loop()
        limits = {"requests_per_minute": 1_000_000}
        batches = MemoryBatches(directory)
        async with served(
            directory, limits=limits, batches=batches, max_stream_age_s=0.05, search_max_s=0.1
        ) as gateway:
            gateway.gateway.jobs._writer = _Writer(gateway.log)
            gateway.log.publish("acme.1", ["a"])
            found["url"] = gateway.url
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve(tmp_path_factory.mktemp("gateway"))))
    thread.start()
    try:
        assert ready.wait(10)
        yield found["url"]
    finally:
        found["loop"].call_soon_threadsafe(stop.set)
        thread.join(10)


schema = schemathesis.openapi.from_dict(copy.deepcopy(DOCUMENT)).exclude(path="/v1/ws")


@schema.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_schemathesis_finds_no_500_and_no_undocumented_status(case: Any, url: str) -> None:
    """Valid and invalid requests, made from the document."""
    if case.query and "wait_s" in case.query:
        case.query["wait_s"] = 0
    response = case.call(base_url=url, headers={"Authorization": f"Bearer {ALL}"})
    operation = DOCUMENT["paths"][case.path].get(case.method.lower(), {"responses": {"405"}})

    assert response.status_code < 500
    assert str(response.status_code) in operation["responses"]
    if response.status_code >= 400 and case.method != "HEAD":
        error = response.json()["error"]
        assert error.keys() >= {"message", "type", "param", "code", "retriable"}
        assert response.status_code in CODES[error["code"]].statuses
        assert case.method.lower() != "post" or response.headers["x-should-retry"] in (["true"], ["false"])
