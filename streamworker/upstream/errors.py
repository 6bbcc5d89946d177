"""Translates the exceptions of httpx and its transport, in one table and one context manager.

The phase of the call decides as much as the class: after the request was sent, the upstream may have begun to generate.
"""

from __future__ import annotations

import ssl
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING

import httpx

from streamworker.errors import UpstreamError
from streamworker.model import ErrorCode, JobError
from streamworker.upstream.http1_response import HeadCut

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Phase", "read_error", "translate_errors"]

_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")
"""OpenSSL's reasons where the other side does not speak TLS."""


class Phase(Enum):
    """How far a call has proceeded."""

    CALLING = "before the answer"
    READING = "inside the body"


@contextmanager
def translate_errors(phase: Phase, base_url: str, status: int = 200) -> Iterator[None]:
    """Translate exceptions of httpx and the socket to UpstreamError. `status` is that of the response that is read."""
    try:
        yield
    except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, UnicodeError) as error:
        described = _call_error(error, base_url) if phase is Phase.CALLING else read_error(error, status)
        raise UpstreamError(described) from error


def read_error(error: Exception, status: int = 200) -> JobError:
    """Return the job's error for an exception that ended the body of an event stream."""
    if isinstance(error, httpx.DecodingError):
        return JobError(
            ErrorCode.UPSTREAM_PROTOCOL, f"the body cannot be decompressed: {_text(error)}", status
        )
    message = f"the connection broke inside the event stream: {_text(error)}"
    return JobError(ErrorCode.TRUNCATED, message, status, retriable=True)


def _call_error(error: Exception, base_url: str) -> JobError:
    code, is_retriable = ErrorCode.UPSTREAM_UNAVAILABLE, True
    match error:
        case httpx.ConnectTimeout():
            code, message = (
                ErrorCode.TIMEOUT_CONNECT,
                f"could not connect to {base_url} in time: {_text(error)}",
            )
        case httpx.ConnectError() if isinstance(cause := error.__cause__, ssl.SSLError):
            question = "; does it speak http?" if cause.reason in _NOT_TLS else ""
            is_retriable, message = False, f"TLS connection to {base_url} failed: {_text(cause)}{question}"
        case httpx.ConnectError():
            message = f"cannot connect to {base_url}: {_text(error.__cause__ or error)}"
        case httpx.ProxyError():
            message = f"cannot connect to {base_url} through the proxy: {_text(error)}"
        case httpx.RemoteProtocolError() if not _is_cut(error):
            code, is_retriable = ErrorCode.UPSTREAM_PROTOCOL, False
            message = f"{base_url} returned an invalid HTTP response: {_text(error)}"
        case httpx.LocalProtocolError() | httpx.UnsupportedProtocol() | httpx.InvalidURL() | UnicodeError():
            code, is_retriable = ErrorCode.UPSTREAM_PROTOCOL, False
            message = f"the request cannot be sent: {_text(error)}"
        case _:
            message = f"{base_url} closed the connection before it responded: {_text(error)}"
    return JobError(code, message, retriable=is_retriable)


def _is_cut(error: httpx.RemoteProtocolError) -> bool:
    """Whether the connection ended before the response's head did. httpx's own transport says it in words only."""
    return isinstance(error, HeadCut) or str(error).startswith("Server disconnected")


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
