"""Where the exceptions of httpx and its transport end: one table, one context manager.

They are told apart by phase, not by class: over aiohttp, httpx names a server that hung up a `ConnectTimeout`, and that
looks safe to call again although the upstream may have begun to generate.
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
    """How far a call has come."""

    CALLING = "before the answer"
    READING = "inside the body"


@contextmanager
def translate_errors(phase: Phase, base_url: str) -> Iterator[None]:
    """Raise what httpx and aiohttp raise as UpstreamError."""
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
        return JobError(ErrorCode.TIMEOUT_CONNECT, f"no connection to {base_url} in time", retriable=True)
    if isinstance(cause, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        message = f"no TLS connection to {base_url}: {cause}"
        return JobError(ErrorCode.UPSTREAM_UNAVAILABLE, message)
    if isinstance(cause, aiohttp.ClientConnectorError):
        return JobError(
            ErrorCode.UPSTREAM_UNAVAILABLE, f"cannot connect to {base_url}: {cause}", retriable=True
        )
    if isinstance(cause, aiohttp.ClientResponseError):
        return JobError(ErrorCode.UPSTREAM_PROTOCOL, f"{base_url} does not answer in HTTP: {cause.message}")
    message = f"{base_url} closed the connection before it answered: {_text(cause)}"
    return JobError(ErrorCode.UPSTREAM_UNAVAILABLE, message, retriable=True)


def _reading(error: Exception, _: str) -> JobError:
    cause = _cause(error)
    if isinstance(error, httpx.DecodingError):
        return JobError(ErrorCode.UPSTREAM_PROTOCOL, f"the body does not decompress: {_text(cause)}", 200)
    message = f"the connection broke inside the event stream: {_text(cause)}"
    return JobError(ErrorCode.TRUNCATED, message, 200, retriable=True)


def _cause(error: Exception) -> BaseException:
    """Return what aiohttp raised; its own cause is deeper than we name things."""
    return error if isinstance(error, aiohttp.ClientError) else error.__cause__ or error


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
