"""The event-stream parser: the same result for every chunking, bounded memory, linear time, WHATWG's rules."""

from __future__ import annotations

import gc
import re
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamworker.stream.sse import EventStreamParser, ServerSentEvent
from tests.properties.strategies import CUTS, JSON, STREAMS, pieces_of
from tests.properties.work import work_of
from tests.streams import Parsed, bytewise, data, eventwise, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ERROR_FIELD = frozenset({b"error"})


@example(b"data: a\n\ndata: b\rdata: c\n\n", [])
@given(STREAMS, CUTS)
def test_parser_any_cut_of_any_bytes_gives_the_same(stream: bytes, cuts: list[int]) -> None:
    """Events and state depend on the bytes alone."""
    for options in ({}, {"extra_fields": ERROR_FIELD, "bare_json": True}):
        whole = parse(stream, **options)

        assert parse(pieces_of(stream, cuts), **options) == whole
        assert parse(bytewise(stream), **options) == whole
        assert parse(eventwise(stream), **options) == whole


@given(STREAMS, CUTS, st.integers(1, 60))
def test_parser_overflow_is_at_the_same_event_for_every_chunking(
    stream: bytes, cuts: list[int], limit: int
) -> None:
    """Events that were complete before it are returned."""
    whole = parse(stream, max_event_bytes=limit)

    assert parse(pieces_of(stream, cuts), max_event_bytes=limit) == whole
    assert parse(bytewise(stream), max_event_bytes=limit) == whole
    assert parse(eventwise(stream), max_event_bytes=limit) == whole


@given(STREAMS, STREAMS)
def test_parser_returned_events_are_final(first: bytes, rest: bytes) -> None:
    """The events of a prefix are a prefix of the events of the whole stream."""
    parser = EventStreamParser()
    early = parser.feed(first)

    assert parse(first + rest).events[: len(early)] == early


def held_by(parser: EventStreamParser) -> int:
    """Sum the lengths of all objects that a parser keeps alive."""
    seen: set[int] = set()
    todo: list[Any] = [parser]
    total = 0
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, FunctionType, ModuleType)):
            continue
        seen.add(id(item))
        if isinstance(item, (bytes, str, list)):
            total += len(item)
        todo += gc.get_referents(item)
    return total


EMPTY = held_by(EventStreamParser(bare_json=True))


@given(
    st.lists(
        st.sampled_from(
            [
                b"data: x\n",
                b"data\n",
                b"data: ",
                b"x",
                b"x" * 50,
                b"x" * 5000,
                b"event: " + b"e" * 30 + b"\n",
                b"id: " + b"i" * 30 + b"\n",
                b"\n",
                b": " + b"c" * 30,
                b"error: x\n",
                b'data: {"a":1}\n',
                b"\r",
                b"{\n",
                b"{x}\n",
                b'{"a":\n',
            ]
        ),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 30),
)
def test_parser_memory_stays_bounded_whatever_is_fed(pieces: list[bytes], times: int) -> None:
    """A line's pieces, an event's data, two types, two ids: each is at most the limit."""
    limit = 64
    parser = EventStreamParser(max_event_bytes=limit, extra_fields=ERROR_FIELD, bare_json=True)
    for _ in range(times):
        for piece in pieces:
            parser.feed(piece)
            assert held_by(parser) <= EMPTY + 10 * limit


# Each makes a stream of about n bytes in which a parser could read something repeatedly.
GROWING: dict[str, Callable[[int], Sequence[bytes]]] = {
    "a long line byte by byte": lambda n: bytewise(b"data: " + b"x" * n),
    "a long line in two-byte pieces that end in CR": lambda n: [b"x\r"] * (n // 2),
    "many lines of one event": lambda n: [b"data: abc\n" * (n // 10)],
    "many lines of one object": lambda n: [b"data: {\n" + b'data: "a": 1,\n' * (n // 14)],
    "many balanced lines that are not an object": lambda n: [b"data: {x}\n" * (n // 10)],
    "many lines behind a long first one": lambda n: [
        b"data: {" + b"x" * (n // 2) + b"\n",
        b"data:\n" * (n // 12),
    ],
    "many lines behind a long first one with a blank": lambda n: [
        b"data:  {" + b"x" * (n // 2) + b"\n",
        b"data:\n" * (n // 12),
    ],
    "many lines behind a long first text with a blank": lambda n: [
        b"data:  " + b"x" * (n // 2) + b"\n",
        b"data:\n" * (n // 12),
    ],
    "many objects without blank lines": lambda n: [b'data: {"a":[{}]}\n' * (n // 17)],
    "many objects in one-byte pieces": lambda n: bytewise(b'data: {"a":[{}]}\n\n' * (n // 18)),
    "a deep object over lines": lambda n: [b'data: {"a":\n' * (n // 24) + b"data: }\n" * (n // 24)],
    "many brackets in strings": lambda n: [
        b"data: {" + b'"{[\\"' * (n // 10) + b"\n" + b"data: }\n" * (n // 16)
    ],
    "many bare objects": lambda n: [b'{"a":[{}]}\n' * (n // 11)],
    "many bare objects that are not JSON": lambda n: [b"{x}\n" * (n // 4)],
    "a bare object over many lines": lambda n: [b"{\n" + b'"a": 1,\n' * (n // 8)],
    "many bare lines behind an object": lambda n: [
        b'data: {"a":"' + b"x" * (n // 2) + b'"}\n' + b"{x}\n" * (n // 8)
    ],
    "many comments": lambda n: [b": c\n" * (n // 4)],
    "many blank lines": lambda n: [b"\n" * n],
    "many types": lambda n: [b"event: x\n" * (n // 9)],
}


@pytest.mark.parametrize("shape", GROWING)
def test_parser_twice_the_bytes_are_twice_the_work(shape: str) -> None:
    """Linear time, counted and not measured."""
    unblanked = b"data: {}\ndata: {}\n\n"  # the parser checks objects most often in such a stream

    def work(size: int) -> int:
        pieces = [unblanked, *GROWING[shape](size)]
        parser = EventStreamParser(bare_json=True)

        def feed() -> None:
            for piece in pieces:
                parser.feed(piece)

        return work_of(feed)

    assert work(8000) <= 2.2 * work(4000)


# The standard


def reference(stream: bytes) -> Parsed:
    """Parse as WHATWG HTML §9.2.6 is written: decode, split, interpret; slow, and independent of the parser."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    *lines, _unfinished = re.split("\r\n|\n|\r", text)
    events: list[ServerSentEvent] = []
    last_id = ""
    time: str | None = None
    block: list[tuple[str, str]] = []
    for line in lines:
        if line:
            block.append(field(line))
            continue
        given_id = last(block, "id", "[^\0]*")
        last_id = last_id if given_id is None else given_id
        retry = last(block, "retry", "[0-9]{1,19}")
        time = retry or time
        message = [value for name, value in block if name == "data"]
        if message:
            told = None if retry is None else int(retry)
            type_ = last(block, "event", ".*") or "message"
            events.append(ServerSentEvent(type_, "\n".join(message).encode(), last_id, told))
        block.clear()
    time = last(block, "retry", "[0-9]{1,19}") or time  # counts at once, even in an unfinished event
    return Parsed(events, last_id, None if time is None else int(time), overflowed=False)


def last(block: list[tuple[str, str]], name: str, pattern: str) -> str | None:
    values = [value for field_name, value in block if field_name == name]
    fitting = [value for value in values if re.fullmatch(pattern, value, re.DOTALL)]
    return fitting[-1] if fitting else None


def field(line: str) -> tuple[str, str]:
    if line.startswith(":"):
        return "", ""
    name, _, value = line.partition(":")
    return name, value.removeprefix(" ")


def as_text(parsed: Parsed) -> Parsed:
    """Decode the data, as the reference decodes before it parses."""
    return parsed._replace(
        events=[
            ServerSentEvent(event.type, event.text.encode(), event.last_event_id, event.retry)
            for event in parsed.events
        ]
    )


@given(STREAMS, CUTS)
def test_parser_agrees_with_the_standard_outside_of_the_extensions(stream: bytes, cuts: list[int]) -> None:
    """Without objects and sentinels it is the standard's parser."""
    plain = stream.replace(b"{", b"(").replace(b"[DONE]", b"[DUNE]")

    assert as_text(parse(pieces_of(plain, cuts))) == reference(plain)


_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["", "event: x\n", "id: 1\n", ": c\n", "retry: 5\n"]),
        st.dictionaries(st.text(max_size=5), JSON, max_size=3),
        st.sampled_from([None, 0, 1]),
    ),
    max_size=5,
)


@given(_EVENTS, CUTS)
def test_parser_agrees_with_the_standard_on_blanked_objects_of_any_layout(
    events: list[Any], cuts: list[int]
) -> None:
    """Objects on one line or on many: the extensions break no stream that follows the standard."""
    import json

    stream = "".join(
        head + "".join(f"data: {line}\n" for line in json.dumps(value, indent=indent).split("\n")) + "\n"
        for head, value, indent in events
    ).encode()

    assert as_text(parse(pieces_of(stream, cuts))) == reference(stream)


_OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)


@given(st.lists(_OBJECTS, min_size=1, max_size=6), st.sampled_from([b"\n", b"\r\n", b"\r"]), CUTS)
def test_parser_unblanked_objects_are_one_event_per_line_under_any_cut(
    objects: list[Any], newline: bytes, cuts: list[int]
) -> None:
    """A stream without blank lines is returned object by object, up to its sentinel."""
    stream = data(*objects, b"[DONE]", end=newline)
    lines = [line.removeprefix(b"data: ") for line in stream.split(newline)[:-1]]

    assert [event.data for event in parse(pieces_of(stream, cuts)).events] == lines
