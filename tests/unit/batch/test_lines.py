"""Lines of a batch file: splitting bytes, and reading one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from streamworker.batch.lines import MAX_CUSTOM_ID_BYTES, Fault, LineSplitter, Request, read_line

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def split(*chunks: bytes, max_line_bytes: int = 1 << 20) -> list[tuple[Any, ...]]:
    splitter = LineSplitter(max_line_bytes=max_line_bytes)
    lines = [line for chunk in chunks for line in splitter.feed(chunk)]
    return [tuple(line) for line in (*lines, *splitter.finish())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", []),
        (b"\n\r\n \t\n", []),
        (b"a", [(1, 0, 1, b"a")]),
        (b"a\nb\n", [(1, 0, 1, b"a"), (2, 2, 1, b"b")]),
        (b"a\n\nb", [(1, 0, 1, b"a"), (3, 3, 1, b"b")]),
        (b"a\r\nb\r\n", [(1, 0, 2, b"a\r"), (2, 3, 2, b"b\r")]),
        (b"\xef\xbb\xbfa\nb", [(1, 3, 1, b"a"), (2, 5, 1, b"b")]),
        (b"\xef\xbb\xbf\na", [(2, 4, 1, b"a")]),
        ("x\u2028y\u0085z\u2029\x0b\x0c\n".encode(), [(1, 0, 13, "x\u2028y\u0085z\u2029\x0b\x0c".encode())]),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_splitter_ends_lines_with_lf_only(text: bytes, expected: list[Any], size: int) -> None:
    """Offsets and lengths name the text of each line; blank lines and a byte order mark are skipped."""
    chunks = [text[start : start + size] for start in range(0, len(text), size)]

    assert split(*chunks) == expected
    for _, offset, length, line in expected:
        assert text[offset : offset + length] == line


def test_splitter_with_a_line_over_the_limit_keeps_none_of_it() -> None:
    """The line is reported with its length, and the next one is whole."""
    assert split(b"x" * 5, b"x" * 6 + b"\nok\n", max_line_bytes=8) == [(1, 0, 11, None), (2, 12, 2, b"ok")]


def test_line_of_the_openai_format_is_read() -> None:
    """The body is kept byte for byte, with its spaces and its order."""
    body = b'{ "messages":[{"role":"user","content":"\xc3\xa9"}], "model" : "m","n":1.0 }'
    read = read_line(b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":' + body + b"}\r")

    assert isinstance(read, Request)
    assert (read.custom_id, read.model, read.body) == ("a", "m", body)


@pytest.mark.parametrize("absent", [{"method"}, {"url"}, {"method", "url"}])
def test_line_without_method_or_url_is_read(absent: set[str]) -> None:
    """Mistral, Together and Novita leave them out; null is as good as absent."""
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}
    short = {name: value for name, value in line.items() if name not in absent}
    nulls = {**line, **dict.fromkeys(absent)}

    assert read_line(json.dumps(short).encode()) == read_line(json.dumps(nulls).encode())


def _line(**members: Any) -> bytes:
    return json.dumps({"custom_id": "a", "body": BODY} | members).encode()


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (None, "too_large", "longer than"),
        (b"{", "invalid_json_line", "not JSON"),
        (b"[" + _line() + b"]", "invalid_json_line", "array"),
        (b"[{", "invalid_json_line", "array"),
        (b"1", "invalid_json_line", "not an object"),
        (b"\xff\xfe{\x00", "invalid_json_line", "UTF-16"),
        (b"\x1f\x8b\x08", "invalid_json_line", "compressed"),
        (b'{"custom_id":"\xff"}', "invalid_json_line", "UTF-8"),
        (b'{"custom_id":"a","body":NaN}', "invalid_json_line", "not JSON"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "invalid_json_line", "deeply"),
        (_line(custom_id=None), "missing_custom_id", "string"),
        (_line(custom_id=""), "missing_custom_id", "empty"),
        (_line(custom_id=7), "missing_custom_id", "string"),
        (_line(custom_id="x" * (MAX_CUSTOM_ID_BYTES + 1)), "missing_custom_id", "1024 bytes"),
        (_line(custom_id="é" * 513), "missing_custom_id", "1024 bytes"),
        (_line(method="GET"), "invalid_method", "POST"),
        (_line(method="post"), "invalid_method", "POST"),
        (_line(url="/v1/embeddings"), "invalid_url", "/v1/chat/completions"),
        (_line(url=5), "invalid_url", "/v1/chat/completions"),
        (_line(body=None), "invalid_body", "object"),
        (_line(body=[]), "invalid_body", "object"),
        (b'{"custom_id":"a"}', "invalid_body", "object"),
        (b'{"custom_id":"a","params":{"model":"claude"}}', "invalid_body", "Anthropic"),
        (_line(body={"messages": [1]}), "invalid_body", "model"),
        (_line(body={"model": "", "messages": [1]}), "invalid_body", "model"),
        (_line(body={"model": 5, "messages": [1]}), "invalid_body", "model"),
        (_line(body={"model": "m"}), "invalid_body", "messages"),
        (_line(body={"model": "m", "messages": []}), "invalid_body", "messages"),
        (_line(body={"model": "m", "messages": "Hi"}), "invalid_body", "messages"),
        (_line(body=BODY | {"stream": True}), "stream_not_supported", "stream"),
    ],
)
def test_line_with_a_fault_has_its_code_and_a_reason(text: bytes | None, code: str, words: str) -> None:
    """Each fault has one code, and its message says what to change."""
    read = read_line(text)

    assert isinstance(read, Fault)
    assert read.code.code == code
    assert words in read.message


def test_line_with_a_fault_keeps_its_custom_id() -> None:
    """The error line of a faulty line can be assigned by its custom id."""
    assert read_line(_line(method="GET")).custom_id == "a"
    assert read_line(b"{").custom_id is None


def test_line_with_stream_false_or_null_is_valid() -> None:
    """Only a stream that is asked for is refused."""
    assert isinstance(read_line(_line(body=BODY | {"stream": False})), Request)
    assert isinstance(read_line(_line(body=BODY | {"stream": None})), Request)


def test_line_with_a_lone_surrogate_is_read_with_a_replacement_character() -> None:
    r"""JSON allows the escape \ud83d alone; no UTF-8 text can hold it."""
    read = read_line(b'{"custom_id":"a","body":{"model":"m","messages":[{"content":"\\ud83d"}]}}')

    assert isinstance(read, Request)
    assert json.loads(read.body)["messages"] == [{"content": "\ufffd"}]


def test_line_with_integers_beyond_64_bits_keeps_them() -> None:
    """The body's text is passed on as it is."""
    read = read_line(
        b'{"custom_id":"a","body":{"model":"m","messages":[1],"seed":123456789012345678901234567890}}'
    )

    assert isinstance(read, Request)
    assert b"123456789012345678901234567890" in read.body
