"""A collector of traces that speaks OTLP over HTTP, in a thread of its own."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

if TYPE_CHECKING:
    from opentelemetry.proto.resource.v1.resource_pb2 import Resource
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

__all__ = ["Collector", "value_of"]


class Collector:
    """Collect spans; use it as a context manager. `port` 0 chooses a free one; clear `answering` to delay all answers."""

    def __init__(self, port: int = 0) -> None:
        self.spans: list[Span] = []
        self.resources: list[Resource] = []
        self.headers: list[dict[str, str]] = []
        self.answering = threading.Event()
        self.answering.set()
        self.asked = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.asked.set()
                collector.answering.wait()
                status = 200 if self.path == "/v1/traces" else 404
                collector.take(body, {name.lower(): value for name, value in self.headers.items()})
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, body: bytes, headers: dict[str, str]) -> None:
        assert headers["content-type"] == "application/x-protobuf"
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        for one in request.resource_spans:
            self.resources.append(one.resource)
            self.spans += [span for scope in one.scope_spans for span in scope.spans]
        self.headers.append(headers)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.answering.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def value_of(message: Span | Resource, name: str) -> str | int | None:
    """Return the string or number attribute of a message, or None."""
    for attribute in message.attributes:
        if attribute.key == name:
            value = attribute.value
            found: str | int = value.int_value if value.HasField("int_value") else value.string_value
            return found
    return None
