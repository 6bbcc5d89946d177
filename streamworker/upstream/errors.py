"""Translates the exceptions of httpx and its transport, in one table and one context manager.

The phase of the call decides, not only the class: over aiohttp, httpx reports a connection that the server
closed as `ConnectTimeout`. That looks safe to retry although the upstream may have begun to generate.
"""

from __future__ import annotations

from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING

import aiohttp
import httpx

from streamworker.errors import UpstreamError
from streamworker.model import ErrorCode, JobError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Phase", "translate_errors"]


class Phase(Enum):
    """How far a call has proceeded."""

    CALLING = "before the answer"
    READING = "inside the body"


@contextmanager
def translate_errors(phase: Phase, base_url: str) -> Iterator[None]:
    """Translate exceptions of httpx, aiohttp and the socket to UpstreamError."""
    try:
        yield
    except (
        httpx.HTTPError,
        httpx.StreamError,
        httpx.InvalidURL,
        aiohttp.ClientError,
        OSError,
        UnicodeError,
    ) as error:
        describe = _calling if phase is Phase.CALLING else _reading
        raise UpstreamError(describe(error, base_url)) from error


def _calling(error: Exception, base_url: str) -> JobError:
    cause = _cause(error)
    if isinstance(cause, aiohttp.ConnectionTimeoutError):
        return JobError(ErrorCode.TIMEOUT_CONNECT, f"could not connect to {base_url} in time", retriable=True)
    if isinstance(cause, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        message = f"TLS connection to {base_url} failed: {cause}"
        return JobError(ErrorCode.UPSTREAM_UNAVAILABLE, message)
    if isinstance(cause, aiohttp.ClientConnectorError):
        return JobError(
            ErrorCode.UPSTREAM_UNAVAILABLE, f"cannot connect to {base_url}: {cause}", retriable=True
        )
    if isinstance(cause, aiohttp.ClientResponseError):
        return JobError(
            ErrorCode.UPSTREAM_PROTOCOL, f"{base_url} returned an invalid HTTP response: {cause.message}"
        )
    message = f"{base_url} closed the connection before it responded: {_text(cause)}"
    return JobError(ErrorCode.UPSTREAM_UNAVAILABLE, message, retriable=True)


def _reading(error: Exception, _: str) -> JobError:
    cause = _cause(error)
    if isinstance(error, httpx.DecodingError):
        return JobError(ErrorCode.UPSTREAM_PROTOCOL, f"the body cannot be decompressed: {_text(cause)}", 200)
    message = f"the connection broke inside the event stream: {_text(cause)}"
    return JobError(ErrorCode.TRUNCATED, message, 200, retriable=True)


def _cause(error: Exception) -> BaseException:
    """Return the exception that aiohttp raised, not its own cause."""
    return error if isinstance(error, aiohttp.ClientError) else error.__cause__ or error


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
