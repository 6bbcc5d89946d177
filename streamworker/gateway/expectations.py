"""`Expect: 100-continue` (RFC 9110 section 10.1.1): the body is asked for when a handler reads it.

aiohttp asks for it before the request is routed, so that a client would upload a body that is then refused. Therefore
aiohttp does not see the header. Other expectations are ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiohttp import HttpVersion11, hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.http_parser import RawRequestMessage

    RequestFactory = Callable[..., web.BaseRequest]

__all__ = ["ask_for_body", "hide_expectations", "waits_to_be_asked"]

_WAITS = web.RequestKey("waits_to_be_asked", bool)


def hide_expectations(make: RequestFactory) -> RequestFactory:
    """Return a factory that makes the same requests, but without the `Expect` header."""

    def made(message: RawRequestMessage, *parts: Any) -> web.BaseRequest:
        expectation = message.headers.get(hdrs.EXPECT)
        if expectation is None:
            return make(message, *parts)
        headers = CIMultiDict(message.headers)
        del headers[hdrs.EXPECT]
        request = make(message._replace(headers=CIMultiDictProxy(headers)), *parts)
        request[_WAITS] = (
            expectation.lower() == "100-continue"
            and message.version >= HttpVersion11
            and request.can_read_body
        )
        return request

    return made


async def ask_for_body(request: web.Request) -> None:
    """Ask for the body of a request whose client waits for that."""
    if waits_to_be_asked(request):
        request[_WAITS] = False
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the response itself has not begun


def waits_to_be_asked(request: web.Request) -> bool:
    """Whether the client may send the body only when it is asked for it, and was not asked yet."""
    return bool(request.get(_WAITS))
