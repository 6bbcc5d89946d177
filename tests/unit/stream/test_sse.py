"""The event-stream parser: every rule of WHATWG HTML §9.2.5-9.2.6, and the two extensions."""

from __future__ import annotations

from typing import Any

import pytest

from streamworker.stream.sse import EventStreamParser, ServerSentEvent
from tests.streams import Parsed, bytewise, parse

BOM = "\ufeff".encode()
OBJECT = b'data: {"a":1}\n'


def message(
    data: str | bytes, type_: str = "message", id_: str = "", retry: int | None = None
) -> ServerSentEvent:
    return ServerSentEvent(type_, data if isinstance(data, bytes) else data.encode(), id_, retry)


def parsed(stream: bytes, *, max_event_bytes: int = 1 << 20, extra: tuple[bytes, ...] = ()) -> Parsed:
    """Parse whole, in two halves at every position, and byte by byte; the results must agree."""
    options = {"max_event_bytes": max_event_bytes, "extra_fields": frozenset(extra)}
    whole = parse(stream, **options)
    for at in range(len(stream)):
        assert parse([stream[:at], b"", stream[at:]], **options) == whole, f"cut at {at}"
    assert parse(bytewise(stream), **options) == whole
    return whole


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        pytest.param(b"data: a\n\n", ["a"], id="one leading space is removed"),
        pytest.param(b"data:a\n\n", ["a"], id="no space is needed"),
        pytest.param(b"data:  a \n\n", [" a "], id="only one space is removed"),
        pytest.param(b"data:\ta\n\n", ["\ta"], id="a tab is data"),
        pytest.param(b"data: a:b: c\n\n", ["a:b: c"], id="later colons are data"),
        pytest.param(b"data: a\ndata: b\n\n", ["a\nb"], id="data lines are joined by LF"),
        pytest.param(b"data: a\ndata\ndata:\n\n", ["a\n\n"], id="a line without colon is a name"),
        pytest.param(b"data:\n\n", [""], id="a data line alone dispatches the empty string"),
        pytest.param(b"data\n\n", [""], id="without colon too"),
        pytest.param(b"\n\n\ndata: a\n\n\n\n", ["a"], id="blank lines alone dispatch nothing"),
        pytest.param(b": comment\n:\ndata: a\n: b\n\n", ["a"], id="comments are nothing"),
        pytest.param(b"Data: x\nDATA: x\n data: x\ndata : x\ndata: a\n\n", ["a"], id="names are exact"),
        pytest.param(b"foo: x\nerror: x\ndata: a\n\n", ["a"], id="unknown fields are ignored"),
        pytest.param(
            b"data: a\r\rdata: b\r\n\r\ndata: c\n\n", ["a", "b", "c"], id="CR, CRLF and LF end lines"
        ),
        pytest.param(b"data: a\r\ndata: b\r\n\r\n", ["a\nb"], id="a CRLF is one line end"),
        pytest.param(b"data: a\r\n\rdata: b\n\r\n", ["a", "b"], id="line ends may be mixed"),
        pytest.param(b"data: a\n\rdata: b\n\n", ["a", "b"], id="LF CR is two line ends"),
        pytest.param(
            b"data: a\x0b\x0c\x1c\x85b\n\n", ["a\x0b\x0c\x1c\ufffdb"], id="other controls end no line"
        ),
        pytest.param("data: a\u2028\u2029\u0085b\n\n".encode(), ["a\u2028\u2029\u0085b"], id="nor Unicode's"),
        pytest.param(
            b"data: a\n\ndata: b\n", ["a"], id="an event without blank line is discarded at the end"
        ),
        pytest.param(b"data: a\n\ndata: b", ["a"], id="so is an unfinished line"),
        pytest.param(b"data: \xff\xf0\x9f\n\n", ["\ufffd\ufffd"], id="bytes that are not UTF-8 are replaced"),
        pytest.param(b"data: \0\n\n", ["\0"], id="NUL is data"),
        pytest.param(b"data: a\n\ndata: data: b\n\n", ["a", "data: b"], id="a field's name is data too"),
        pytest.param(b"data: a\n\ndata: b\n:", ["a"], id="a line that is not blank ends no event"),
        pytest.param(b'data: {"a":1}\ndata: x', [], id="an unfinished line ends no object"),
        pytest.param(b"", [], id="nothing gives nothing"),
        pytest.param(b"<html>\n\n<body>\n\n", [], id="no event stream gives nothing"),
    ],
)
def test_parser_data_lines_give_events_as_the_standard_says(stream: bytes, events: list[str]) -> None:
    """Each rule of §9.2.6 holds for every chunking."""
    assert [event.text for event in parsed(stream).events] == events


@pytest.mark.parametrize(
    ("stream", "types"),
    [
        (b"event: x\ndata: a\n\ndata: b\n\n", ["x", "message"]),
        (b"event: x\n\ndata: a\n\n", ["message"]),
        (b"data: a\nevent: x\n\n", ["x"]),
        (b"event: x\ndata: a\nevent: y\n\n", ["y"]),
        (b"event: x\ndata: a\nevent:\n\n", ["message"]),
        (b"event: x\nevent\ndata: a\n\n", ["message"]),
        (b"event: x\nevent: y\ndata: a\n\n", ["y"]),
        ("event: ü\ndata: a\n\n".encode(), ["ü"]),
        (b"event: \xff\ndata: a\n\n", ["\ufffd"]),
    ],
)
def test_parser_last_event_field_names_this_event_only(stream: bytes, types: list[str]) -> None:
    """Each `event` line sets the type; each blank line resets it."""
    assert [event.type for event in parsed(stream).events] == types


@pytest.mark.parametrize(
    ("stream", "ids", "last"),
    [
        (b"id: 1\ndata: a\n\ndata: b\n\n", ["1", "1"], "1"),
        (b"id: 1\ndata: a\n\nid\ndata: b\n\n", ["1", ""], ""),
        (b"data: a\nid: 1\n\n", ["1"], "1"),
        (b"id: 1\n\ndata: a\n\n", ["1"], "1"),
        (b"id: 1\n", [], ""),
        (b"id: 1\ndata: a\n\nid: 2\ndata: b", ["1"], "1"),
        (b"id: 1\nid: 2\0\ndata: a\n\n", ["1"], "1"),
        (b'id: 1\ndata: {"a":1}\ndata: {"b":1}\n', ["1", "1"], "1"),
        (b"id: \xe2\x9c\x94\xff\ndata: a\n\n", ["✔\ufffd"], "✔\ufffd"),
    ],
)
def test_parser_id_field_persists_and_counts_at_the_blank_line(
    stream: bytes, ids: list[str], last: str
) -> None:
    """An id with NUL is ignored, and the id of an unfinished event does not count."""
    result = parsed(stream)

    assert [event.last_event_id for event in result.events] == ids
    assert result.last_event_id == last


@pytest.mark.parametrize(
    ("value", "time"),
    [
        ("3000", 3000),
        ("0", 0),
        ("007", 7),
        ("9" * 19, int("9" * 19)),
        ("9" * 20, None),
        ("", None),
        ("+5", None),
        ("-5", None),
        ("1_000", None),
        (" 10", None),
        ("10 ", None),
        ("1.5", None),
        ("٣", None),
        ("²", None),
        ("１", None),
    ],
)
def test_parser_retry_field_accepts_ascii_digits_only(value: str, time: int | None) -> None:
    """Values that only int() or isdigit() accept, and values that are too large, are ignored."""
    result = parsed(f"retry: {value}\ndata: a\n\n".encode())

    assert result.reconnection_time == time
    assert result.events == [message("a", retry=time)]


def test_parser_retry_without_data_sets_time_and_dispatches_nothing() -> None:
    """A block of control fields is not an event."""
    result = parsed(b"retry: 7\nid: 1\nevent: ping\n\n")

    assert result == Parsed([], "1", 7, overflowed=False)


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (BOM + b"data: a\n\n", ["a"]),
        (BOM + BOM + b"data: a\n\ndata: b\n\n", ["b"]),
        (b"data: a\n\n" + BOM + b"data: b\n\ndata: c\n\n", ["a", "c"]),
        (b"\n" + BOM + b"data: a\n\ndata: b\n\n", ["b"]),
        (BOM[:2] + b"data: a\n\ndata: b\n\n", ["b"]),
        (BOM + b"\ndata: a\n\n", ["a"]),
        (BOM, []),
    ],
)
def test_parser_one_byte_order_mark_at_the_start_is_removed(stream: bytes, events: list[str]) -> None:
    """Only the first three bytes of a stream can be a byte order mark, split or not."""
    assert [event.text for event in parsed(stream).events] == events


def test_parser_bare_cr_ends_its_line_at_once() -> None:
    """An event that ends in CR does not wait for the next byte; a LF that follows is skipped."""
    parser = EventStreamParser()
    assert parser.feed(b"data: a\r\r") == [message("a")]
    assert parser.feed(b"\n") == []
    assert parser.feed(b"data: b\n\r") == [message("b")]
    assert parser.feed(b"\ndata: c\r\n\r") == [message("c")]


def test_parser_returns_each_event_with_the_byte_that_completes_it() -> None:
    """Neither earlier nor later."""
    parser = EventStreamParser()
    given = [
        (at, event.text)
        for at, byte in enumerate(bytewise(b"data: a\n\ndata: b\n\n"))
        for event in parser.feed(byte)
    ]

    assert given == [(8, "a"), (17, "b")]


# Events without blank lines between them


def test_parser_unblanked_objects_are_one_event_each() -> None:
    """An object ends when another data line follows; from the second on each object ends with its own line."""
    parser = EventStreamParser()
    assert parser.feed(OBJECT) == []
    assert [event.text for event in parser.feed(b'data: {"b":2}\n')] == ['{"a":1}', '{"b":2}']
    assert [event.text for event in parser.feed(b'data:{"c":[{}]}\n')] == ['{"c":[{}]}']
    assert [event.text for event in parser.feed(b"data: [DONE]\n")] == ["[DONE]"]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        pytest.param(b'data: {\ndata: "a":1}\n\n', ['{\n"a":1}'], id="an object over lines is one event"),
        pytest.param(
            b'data: {"a":"}\ndata: {"}\n\n', ['{"a":"}\n{"}'], id="brackets in strings do not count"
        ),
        pytest.param(b'data: {"\\"}":1,\ndata: "b":2}\n\n', ['{"\\"}":1,\n"b":2}'], id="nor behind escapes"),
        pytest.param(
            b'data: {"a":[}\ndata: ]}\n\n', ['{"a":[}\n]}'], id="what never was JSON stays together"
        ),
        pytest.param(b"data: {x}\ndata: {y}\ndata: {}\n\n", ["{x}\n{y}\n{}"], id="balanced is not JSON"),
        pytest.param(b"data: {}}\ndata: {\n\n", ["{}}\n{"], id="nor is balanced over lines"),
        pytest.param(
            b'data: {\ndata: "a":1}\ndata: {}\n\n', ['{\n"a":1}', "{}"], id="an object over lines ends too"
        ),
        pytest.param(
            b'data: {"a":"}",\ndata: "b\\"{":[]\ndata: }\ndata: {}\n\n',
            ['{"a":"}",\n"b\\"{":[]\n}', "{}"],
            id="with brackets and quotes in its strings",
        ),
        pytest.param(b"data: 1\ndata: 2\n\n", ["1\n2"], id="numbers are text"),
        pytest.param(b"data: []\ndata: []\n\n", ["[]\n[]"], id="arrays are text"),
        pytest.param(b"data: [DONE]\ndata: a\n\n", ["[DONE]\na"], id="the sentinel may not be posed by text"),
        pytest.param(b"data: {}\ndata: a\n\n", ["{}", "a"], id="an object ends before text"),
        pytest.param(b"data:  {} \ndata: {}\n\n", [" {} ", "{}"], id="blanks around it do not matter"),
        pytest.param(b"data: {}\n: x\nfoo\ndata: {}\n\n", ["{}", "{}"], id="comments between do not matter"),
        pytest.param(
            b"data: {}\n\ndata: {}\ndata: {}\n", ["{}", "{}", "{}"], id="blanked first, unblanked later"
        ),
        pytest.param(
            b"data: {}\ndata: {}\n\ndata: a\ndata: b\n\n", ["{}", "{}", "a\nb"], id="text stays text"
        ),
        pytest.param(
            b"data: {}\ndata: {}\n\ndata: {x}\ndata: y\n\n",
            ["{}", "{}", "{x}\ny"],
            id="each is parsed itself",
        ),
        pytest.param(
            b"data: {}\ndata: {}\n\ndata: {\ndata: }\n\n", ["{}", "{}", "{\n}"], id="lines stay lines"
        ),
        pytest.param(
            b"data: {}\ndata: {}\ndata:\n\n", ["{}", "{}", ""], id="an empty line is an event of its own"
        ),
        pytest.param(
            b"data: {}\ndata: \xff{}\n\n", ["{}", "\ufffd{}"], id="bytes that are not UTF-8 are text"
        ),
    ],
)
def test_parser_unblanked_stream_never_breaks_a_payload(stream: bytes, events: list[str]) -> None:
    """The next data line ends only data that is a whole JSON object."""
    assert [event.text for event in parsed(stream).events] == events


@pytest.mark.parametrize(
    ("stream", "types"),
    [
        (b"event: x\ndata: {}\nevent: y\ndata: {}\n\n", ["x", "y"]),
        (b"event: x\ndata: {}\ndata: {}\n\n", ["x", "message"]),
        (b"data: {}\ndata: {}\nevent: x\ndata: {}\ndata: {}\n", ["message", "message", "x", "message"]),
        (b"data: {}\nevent: x\n\n", ["x"]),
    ],
)
def test_parser_unblanked_event_type_belongs_to_the_data_that_follows(
    stream: bytes, types: list[str]
) -> None:
    """A type between two objects belongs to the second; before a blank line it belongs to the object."""
    assert [event.type for event in parsed(stream).events] == types


# [DONE] at the end of input


@pytest.mark.parametrize(
    "tail",
    [
        b"data: [DONE]\n",
        b"data: [DONE]",
        b"data:[DONE]",
        b"data:  [DONE] \t",
        b"event: x\ndata: [DONE]\r",
        b"data: [DONE]\n: x",
    ],
)
def test_parser_done_at_the_end_needs_no_blank_line(tail: bytes) -> None:
    """The sentinel counts even without its line end."""
    events = parsed(b"data: {}\n\n" + tail).events

    assert [event.data.strip() for event in events] == [b"{}", b"[DONE]"]


@pytest.mark.parametrize(
    "tail",
    [
        b"data: [DONE",
        b"data: [DONE].",
        b"data: [DONE]\ndata: x",
        b"data: [DONE]\n[DONE]",
        b"data: x\ndata: [DONE]",
        b"data: [done]",
        b"xdata: [DONE]",
        b"data[DONE",
        b": [DONE]",
        b"[DONE]",
    ],
)
def test_parser_text_that_resembles_done_is_discarded_at_the_end(tail: bytes) -> None:
    """Half a sentinel, and a sentinel that is part of a text, do not end a stream."""
    assert "[DONE]" not in [event.text.strip() for event in parsed(tail).events]


def test_parser_object_before_done_without_line_end_is_returned() -> None:
    """The sentinel's line ends the object before it, also at the end of input."""
    assert [event.text for event in parsed(b"data: {}\ndata: [DONE]").events] == ["{}", "[DONE]"]


# Limits, further fields


@pytest.mark.parametrize("line", [b"data: %b\n", b": %b\n", b"%b\n", b"event: %b\n", b"data: %b"])
def test_parser_line_at_the_limit_is_accepted_and_one_byte_more_is_not(line: bytes) -> None:
    """Every kind of line is bounded, complete or not, comment or not."""
    room = 64 - len(line.rstrip(b"\n")) + 2

    for before in (b"", b": comment\n\n"):
        assert not parsed(before + line % (b"x" * room), max_event_bytes=64).overflowed
        assert parsed(before + line % (b"x" * (room + 1)), max_event_bytes=64).overflowed


def test_parser_many_small_lines_of_one_event_overflow_together() -> None:
    """The limit holds for an event: its data lines add up, and a blank line resets the sum."""
    lines = b"data: 123456789\n" * 4

    assert not parsed((lines + b"\n") * 5, max_event_bytes=64).overflowed
    assert parsed(lines + b"data: 123456789\n\n", max_event_bytes=50).overflowed
    assert not parsed(b"data\n" * 61, max_event_bytes=64).overflowed
    assert parsed(b"data\n" * 62, max_event_bytes=64).overflowed


def test_parser_byte_order_mark_does_not_count_towards_the_limit() -> None:
    """A first line at the limit is accepted after its mark, for every chunking."""
    line = b"data: " + b"x" * 58

    assert [event.text for event in parsed(BOM + line + b"\n\n", max_event_bytes=64).events] == ["x" * 58]
    assert parsed(BOM + line + b"x\n\n", max_event_bytes=64).overflowed


def test_parser_overflow_returns_earlier_events_and_nothing_after() -> None:
    """After an overflow the parser returns and keeps nothing."""
    parser = EventStreamParser(max_event_bytes=16)
    assert parser.feed(b"data: a\n\ndata: " + b"x" * 99 + b"\n\ndata: b\n\n") == [message("a")]
    assert parser.overflowed
    assert parser.feed(b"\n\ndata: c\n\n") == []
    assert parser.close() == []
    assert parser.overflowed


def test_parser_overflow_between_events_returns_nothing_after() -> None:
    """A whole event in one read, the usual case, is not returned either."""
    parser = EventStreamParser(max_event_bytes=16)
    assert parser.feed(b"data: a\n\n") == [message("a")]
    assert parser.feed(b"data: " + b"x" * 99 + b"\n\n") == []
    assert parser.feed(b"data: c\n\n") == []


@pytest.mark.parametrize("rest", [b"x" * 99, b"x" * 99 + b"\n", b"\ndata: " + b"x" * 99 + b"\n"])
def test_parser_overflow_releases_what_was_read(rest: bytes) -> None:
    """Its buffers are empty."""
    parser = EventStreamParser(max_event_bytes=16)
    parser.feed(b"data: a\ndata: ")
    parser.feed(rest)

    assert (parser._tail, parser._pending.lines) == ([], [])


def test_parser_extra_field_is_an_event_of_its_own() -> None:
    """A requested field is returned at once under its own name; other unknown fields are ignored."""
    result = parsed(b"id: 1\n\nerror: {}\nother: x\ndata: a\n\n", extra=(b"error",))

    assert result.events == [message("{}", "error", "1"), message("a", id_="1")]


# JSON without a field name


def bare(stream: bytes, **options: Any) -> list[tuple[str, str]]:
    """Parse with `bare_json`, whole and byte by byte; return types and data."""
    whole = parse(stream, bare_json=True, **options)
    assert parse(bytewise(stream), bare_json=True, **options) == whole
    return [(event.type, event.text) for event in whole.events]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b'{"error":1}', [("", '{"error":1}')]),
        (b'{"error":1}\n\n', [("", '{"error":1}')]),
        (b'[{"error":1}]\n', [("", '[{"error":1}]')]),
        (b'data: {"a":1}\n\n{"error":1}\n', [("message", '{"a":1}'), ("", '{"error":1}')]),
        (b'data: {"a":1}\n{"error":1}', [("message", '{"a":1}'), ("", '{"error":1}')]),
        (
            b': c\n{\n  "error": {\n    "code": 1\n  }\n}\ndata: x\n\n',
            [("", '{\n  "error": {\n    "code": 1\n  }\n}'), ("message", "x")],
        ),
        (b'{"error":\ndata: x\n\n1}\n', [("message", "x")]),
        (b'{x}\n{"error":1}', [("", '{"error":1}')]),
        (b"data: {\n{}\ndata: }\n\n", [("message", "{\n}")]),
        (b'{"error":1', []),
        (b'"text"\n5\nnull\n', []),
        (b'event: x\n{"error":1}\ndata: y\n\n', [("", '{"error":1}'), ("x", "y")]),
    ],
)
def test_parser_bare_json_is_an_event_of_its_own(stream: bytes, events: list[tuple[str, str]]) -> None:
    """Objects and arrays count, on one line or on several; other text without a field name does not."""
    assert bare(stream) == events
    assert all(kind for kind, _ in [(event.type, 0) for event in parse(stream).events])


def test_parser_bare_json_is_bounded() -> None:
    """A text that never becomes JSON is given up at the limit, and the stream goes on."""
    stream = b'{"a":\n' + b"x\n" * 60 + b"data: y\n\n"

    assert bare(stream, max_event_bytes=64) == [("message", "y")]


@pytest.mark.parametrize(("blank_lines", "is_read"), [(29, True), (30, False)])
def test_parser_bare_json_at_the_limit_is_read_and_one_line_more_is_not(
    blank_lines: int, is_read: bool
) -> None:
    """Its lines add up, each with its line end; 5 + 29 of them have 64 bytes."""
    stream = b'{"a":\n' + b" \n" * blank_lines + b"1}\n"

    assert bool(bare(stream, max_event_bytes=64)) is is_read


def test_parser_bare_json_one_after_another_are_events_of_their_own() -> None:
    """Without blank lines between them too."""
    assert [text for _, text in bare(b'{"a":1}\n{"b":1}\n[\n]\n')] == ['{"a":1}', '{"b":1}', "[\n]"]


def test_parser_bare_json_over_several_lines_ends_at_the_next_event() -> None:
    """A blank line inside of it is not the end of an event; the event that follows discards it in any chunking."""
    pieces = [b"data: a\n\n", b"{\n\n", b"data: x\n\n", b"}\n\n"]
    options = {"bare_json": True}

    assert [event.text for event in parse(pieces, **options).events] == ["a", "x"]
    assert parse(b"".join(pieces), **options) == parse(pieces, **options)


def test_parser_comment_inside_data_ends_at_once_in_a_stream_without_blank_lines() -> None:
    """Some upstreams send their keep-alives so."""
    events = parse(b'data: {"a":1}\ndata: {"b":1}\ndata: : keepalive\ndata: {"c":1}\n').events

    assert [event.text for event in events] == ['{"a":1}', '{"b":1}', ": keepalive", '{"c":1}']
