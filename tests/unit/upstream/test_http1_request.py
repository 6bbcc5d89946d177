"""The bytes of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from streamworker.upstream.http1_request import request_bytes, request_head

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def written(request: httpx.Request, **options: object) -> list[bytes]:
    return [data async for data in request_bytes(request, **options)]  # type: ignore[arg-type]


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


def post(**options: object) -> httpx.Request:
    return httpx.Request("POST", "http://h/a%20b?c=d", **options)  # type: ignore[arg-type]


async def test_request_with_body_in_memory_is_one_write() -> None:
    """Head and body leave in one packet."""
    data = await written(post(content=b"hello"))

    assert data == [b"POST /a%20b?c=d HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"]


async def test_request_without_body_is_a_head() -> None:
    """GET has neither length nor coding."""
    assert await written(httpx.Request("GET", "http://h:81")) == [b"GET / HTTP/1.1\r\nHost: h:81\r\n\r\n"]


async def test_request_with_generated_body_is_chunked() -> None:
    """Empty pieces are left out, because an empty chunk would end the body."""
    data = await written(post(content=pieces(b"hello", b"", b"x" * 17)))

    assert data[0].endswith(b"Transfer-Encoding: chunked\r\n\r\n")
    assert data[1:] == [b"5\r\nhello\r\n", b"11\r\n" + b"x" * 17 + b"\r\n", b"0\r\n\r\n"]


async def test_request_with_generated_body_of_known_length_is_not_chunked() -> None:
    """The caller's Content-Length counts."""
    data = await written(post(content=pieces(b"he", b"llo"), headers={"Content-Length": "5"}))

    assert data[1:] == [b"he", b"llo"]


@pytest.mark.parametrize("length", ["4", "6", "-1", "x"])
async def test_request_with_wrong_length_is_refused(length: str) -> None:
    """The bytes that the head announces and the body has are the same number."""
    for content in (b"hello", pieces(b"he", b"llo")):
        with pytest.raises(httpx.LocalProtocolError, match="length"):
            await written(post(content=content, headers={"Content-Length": length}))


async def test_request_to_plain_http_over_a_proxy_has_the_absolute_form() -> None:
    """The proxy's own headers come on top."""
    request = httpx.Request("GET", "http://h/x")

    (data,) = await written(
        request, target_prefix=b"http://h", headers=((b"Proxy-Authorization", b"Basic x"),)
    )

    assert data == b"GET http://h/x HTTP/1.1\r\nHost: h\r\nProxy-Authorization: Basic x\r\n\r\n"


@pytest.mark.parametrize("value", [b"secret\n", b"a\r\nsecret: b", b"a\x00secret", b" secret", b"secret\t"])
def test_request_header_with_invalid_value_is_refused_without_the_value(value: bytes) -> None:
    """A key with the line end of its file must neither be sent nor shown."""
    with pytest.raises(httpx.LocalProtocolError, match="Authorization") as caught:
        request_head("GET", b"/", [(b"Authorization", value)])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "target", "name"),
    [
        ("GE T", b"/", b"A"),
        ("GÉT", b"/", b"A"),
        ("", b"/", b"A"),
        ("GET", b"/ HTTP/1.1\r\n", b"A"),
        ("GET", b"", b"A"),
    ]
    + [("GET", b"/", name) for name in (b"", b"A B", b"A:", b"A\r\nB", b"\xc3\xa9")],
)
def test_request_line_or_header_name_that_is_not_valid_is_refused(
    method: str, target: bytes, name: bytes
) -> None:
    """Nothing can be smuggled into the head."""
    with pytest.raises(httpx.LocalProtocolError):
        request_head(method, target, [(name, b"x")])
