"""Which error a job gets for each exception of a call, by the phase of the call."""

from __future__ import annotations

import ssl

import httpx
import pytest

from streamworker.errors import UpstreamError
from streamworker.model import ErrorCode
from streamworker.upstream.errors import Phase, read_error, translate_errors
from streamworker.upstream.http1_response import HeadCut

URL = "https://api.example.com/v1"


def caused(error: Exception, cause: BaseException) -> Exception:
    """Return an exception with its cause."""
    error.__cause__ = cause
    return error


def tls_error(reason: str) -> ssl.SSLError:
    """Return an error of OpenSSL."""
    error = ssl.SSLError(1, f"[SSL: {reason}] text")
    error.reason = reason
    return error


def translated(error: BaseException, phase: Phase, status: int = 200) -> UpstreamError:
    """Return what a job gets for an exception."""
    with pytest.raises(UpstreamError) as raised, translate_errors(phase, URL, status):
        raise error
    assert raised.value.__cause__ is error
    return raised.value


@pytest.mark.parametrize(
    ("error", "code", "is_retriable", "text"),
    [
        (httpx.ConnectTimeout("no connection within 5 s"), ErrorCode.TIMEOUT_CONNECT, True, f"could not connect to {URL}"),
        (
            httpx.ConnectError("no connection"),
            ErrorCode.UPSTREAM_UNAVAILABLE,
            True,
            f"cannot connect to {URL}: no connection",
        ),
        (
            caused(httpx.ConnectError("x"), ConnectionRefusedError("refused")),
            ErrorCode.UPSTREAM_UNAVAILABLE,
            True,
            "refused",
        ),
        (
            caused(httpx.ConnectError("x"), tls_error("CERTIFICATE_VERIFY_FAILED")),
            ErrorCode.UPSTREAM_UNAVAILABLE,
            False,
            f"TLS connection to {URL} failed",
        ),
        (
            caused(httpx.ConnectError("x"), tls_error("WRONG_VERSION_NUMBER")),
            ErrorCode.UPSTREAM_UNAVAILABLE,
            False,
            "; does it speak http?",
        ),
        (httpx.ProxyError("407"), ErrorCode.UPSTREAM_UNAVAILABLE, True, "through the proxy: 407"),
        (
            httpx.RemoteProtocolError("bad status line"),
            ErrorCode.UPSTREAM_PROTOCOL,
            False,
            "returned an invalid HTTP response: bad status line",
        ),
        (HeadCut("cut"), ErrorCode.UPSTREAM_UNAVAILABLE, True, "closed the connection before it responded: cut"),
        (
            httpx.RemoteProtocolError("Server disconnected without sending a response."),
            ErrorCode.UPSTREAM_UNAVAILABLE,
            True,
            "closed the connection before it responded",
        ),
        (httpx.LocalProtocolError("bad header"), ErrorCode.UPSTREAM_PROTOCOL, False, "the request cannot be sent"),
        (httpx.UnsupportedProtocol("ftp"), ErrorCode.UPSTREAM_PROTOCOL, False, "the request cannot be sent: ftp"),
        (httpx.InvalidURL("no host"), ErrorCode.UPSTREAM_PROTOCOL, False, "the request cannot be sent: no host"),
        (
            UnicodeEncodeError("ascii", "é", 0, 1, "not ASCII"),
            ErrorCode.UPSTREAM_PROTOCOL,
            False,
            "the request cannot be sent",
        ),
        (httpx.ReadError(""), ErrorCode.UPSTREAM_UNAVAILABLE, True, "before it responded: ReadError"),
        (ConnectionResetError("reset"), ErrorCode.UPSTREAM_UNAVAILABLE, True, "before it responded: reset"),
    ],
)  # fmt: skip
def test_failure_before_the_answer_has_its_code(
    error: Exception, code: ErrorCode, text: str, *, is_retriable: bool
) -> None:
    """What the same call may do later decides whether it is retriable; the message names the upstream or the request."""
    found = translated(error, Phase.CALLING).error

    assert (found.code, found.retriable) == (code, is_retriable)
    assert text in found.message


@pytest.mark.parametrize("status", [200, 502])
@pytest.mark.parametrize(
    ("error", "code", "is_retriable", "text"),
    [
        (httpx.DecodingError("not gzip"), ErrorCode.UPSTREAM_PROTOCOL, False, "cannot be decompressed: not gzip"),
        (httpx.ReadError("reset"), ErrorCode.TRUNCATED, True, "broke inside the event stream: reset"),
        (httpx.RemoteProtocolError("peer closed"), ErrorCode.TRUNCATED, True, "peer closed"),
        (ConnectionResetError(), ErrorCode.TRUNCATED, True, "ConnectionResetError"),
        (httpx.StreamConsumed(), ErrorCode.TRUNCATED, True, "already been streamed"),
    ],
)  # fmt: skip
def test_failure_inside_the_body_has_the_status_of_its_response(
    error: Exception, code: ErrorCode, text: str, status: int, *, is_retriable: bool
) -> None:
    """The upstream may have begun to generate: it is not one that did not answer."""
    found = translated(error, Phase.READING, status).error

    assert (found.code, found.retriable, found.http_status) == (code, is_retriable, status)
    assert text in found.message
    assert found == read_error(error, status)


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyError("x")])
@pytest.mark.parametrize("phase", Phase)
def test_fault_of_the_program_is_not_an_error_of_the_upstream(error: Exception, phase: Phase) -> None:
    """It would be retried, and its cause would be lost."""
    with pytest.raises(type(error)), translate_errors(phase, URL):
        raise error
