"""One job's events as one `chat.completion` object, for a request without `stream`."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from streamworker.gateway.chat_errors import failure_of
from streamworker.gateway.chat_stream import job_member
from streamworker.gateway.errors import ApiError
from streamworker.stream.completion import CompletionAssembler
from streamworker.wire.json import encode

__all__ = ["ChatCompletion"]

MAX_COMPLETION_BYTES: Final = 16 << 20
"""Largest completion that is assembled; a stream has no such limit."""

_decode = msgspec.json.Decoder().decode


class ChatCompletion:
    """Gathers the events of one job. A new attempt replaces the one before it.

    `started`, `delta` and `ended` take the values of records, as those of `ChatStream` do.
    """

    __slots__ = (
        "_assembler",
        "_job_id",
        "_limit_bytes",
        "_model",
        "_started_s",
        "body",
        "failure",
        "is_over",
    )

    def __init__(self, job_id: str, *, limit_bytes: int = MAX_COMPLETION_BYTES) -> None:
        self.body = b""
        """The completion, encoded, once the job has completed."""
        self.failure: ApiError | None = None
        """Why there is no completion."""
        self.is_over = False
        """Whether the terminal event was read."""
        self._job_id = job_id
        self._limit_bytes = limit_bytes
        self._model, self._started_s = "", 0
        self._assembler = CompletionAssembler(limit_bytes=limit_bytes)

    def started(self, value: bytes) -> None:
        """Take the `started` of an attempt."""
        event = _decode(value)
        self._model, self._started_s = str(event.get("model", "")), event.get("ts", 0) // 1000
        # The assembler names a completion after its attempt where the upstream gave no id.
        self._assembler.read(event | {"attempt": self._job_id})

    def delta(self, value: bytes) -> None:
        """Take a delta."""
        self._assembler.read(_decode(value))

    def ended(self, value: bytes) -> None:
        """Take the terminal event."""
        ending = _decode(value)
        self.is_over = True
        self.failure = failure_of(ending, self._job_id)
        if self.failure is not None:
            return
        self._assembler.read(ending)
        omitted = self._assembler.omitted
        if "completion" in omitted:
            self.failure = self._too_large()
            return
        completion = self._assembler.completion(msgspec.Raw) or self._empty()
        member: dict[str, Any] = job_member(self._job_id, ending)
        if omitted:
            member["omitted"] = omitted
        self.body = encode(completion | {"usage": ending.get("usage"), "streamworker": member})

    def _empty(self) -> dict[str, Any]:
        """Return the completion of a job that completed without opening a choice."""
        head = {"id": f"chatcmpl-{self._job_id}", "object": "chat.completion"}
        return head | {"created": self._started_s, "model": self._model, "choices": []}

    def _too_large(self) -> ApiError:
        message = f"the completion is larger than {self._limit_bytes} bytes: ask for it with stream: true"
        return ApiError(502, "too_large", message, job_id=self._job_id)
