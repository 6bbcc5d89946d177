"""One real request for one token, for `streamworker check --call MODEL`."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from streamworker.errors import UpstreamError
from streamworker.model import ChunkDelta, ErrorCode, JobError, StreamError
from streamworker.stream.chunks import ChunkReader
from streamworker.stream.sse import EventStreamParser
from streamworker.stream.usage import Ledger
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from streamworker.config import UpstreamSettings
    from streamworker.upstream.client import HttpUpstream

__all__ = ["Answer", "ask_for_one_token"]

_PROMPT = "Reply with one word."
_LIMITS = ("max_tokens", "max_completion_tokens")
"""Members that limit the answer. Newer models of OpenAI refuse the first one."""


class Answer(NamedTuple):
    """The answer to the request: milliseconds to the first delta, and whether the upstream reported usage."""

    first_delta_ms: int
    has_usage: bool


async def ask_for_one_token(upstream: HttpUpstream, settings: UpstreamSettings, model: str) -> Answer:
    """Send the request and read its whole answer. Raises UpstreamError."""
    for limit in _LIMITS:
        try:
            return await _ask(upstream, settings, model, limit)
        except UpstreamError as failure:
            is_limit_refused = failure.error.http_status == 400 and _LIMITS[-1] in failure.error.message
            if limit == _LIMITS[-1] or not is_limit_refused:
                raise
    raise AssertionError("the last limit returns or raises")


async def _ask(upstream: HttpUpstream, settings: UpstreamSettings, model: str, limit: str) -> Answer:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": _PROMPT}],
        limit: 1,
        "stream": True,
    }
    if settings.include_usage:
        body["stream_options"] = {"include_usage": True}
    began, first_delta = time.monotonic(), None
    ledger, parser = Ledger(), EventStreamParser()
    reader = ChunkReader(ledger)
    try:
        async with asyncio.timeout(settings.first_delta_timeout_s), upstream.call(encode(body), {}) as answer:
            async for data in answer:
                for event in parser.feed(data):
                    for item in reader.read(event):
                        if isinstance(item, StreamError):
                            raise UpstreamError(JobError(ErrorCode.UPSTREAM_ERROR, item.message))
                        if isinstance(item, ChunkDelta) and first_delta is None:
                            first_delta = time.monotonic()
    except TimeoutError:
        message = f"no complete answer within {settings.first_delta_timeout_s:g} s"
        raise UpstreamError(JobError(ErrorCode.TIMEOUT_FIRST_DELTA, message)) from None
    if first_delta is None:
        raise UpstreamError(JobError(ErrorCode.UPSTREAM_PROTOCOL, "the event stream ended without a delta"))
    has_usage = ledger.reported(completed=True) is not None
    return Answer(round((first_delta - began) * 1000), has_usage)
