"""A worker that takes usual reads by their text publishes what one that reads every chunk in full publishes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from streamworker.model import DeltaEvent, TopicPartition
from streamworker.stream.usage import Tokenizer
from streamworker.wire.event import EventWriter
from tests.streams import chunk, data, listening

if TYPE_CHECKING:
    from streamworker.stream.template import UsualReads

LIMIT = 4
TO = TopicPartition("events", 0)
TEXTS = st.text(max_size=5) | st.sampled_from(
    ['"', "\\", "\\n", "%d", "\u2028", "\U0001f41f", "\ud83d", "\ude00", ""]
)
DELTAS = st.one_of(
    *(
        TEXTS.map(lambda text, make=make: make(text))  # type: ignore[misc]
        for make in (
            lambda text: {"content": text},
            lambda text: {"content": text},
            lambda text: {"role": "assistant", "content": text},
            lambda text: {"reasoning_content": text},
            lambda text: {"content": None, "tool_calls": [{"index": 0, "function": {"arguments": text}}]},
        )
    )
)
CHUNKS = st.builds(
    lambda delta, reason, members: chunk(delta, reason) | members,
    DELTAS,
    st.sampled_from([None] * 8 + ["stop", ""]),
    st.sampled_from(
        [{"id": "c"}] * 8 + [{"id": "d"}, {"usage": {"completion_tokens": 3}}, {"x": 1}, {"token_ids": None}]
    ),
)
OTHERS = st.sampled_from(
    [b": ping\n\n", b"id: 1\n", b"data: {}\n\n", b"event: ping\n", b"\n", b"data: nonsense\n\n"]
)


@st.composite
def reads(draw: st.DrawFn) -> list[bytes]:
    """Return a stream in reads; most are one chunk, escaped in either way."""
    result = []
    for one in draw(st.lists(CHUNKS | OTHERS, max_size=25)):
        if isinstance(one, bytes):
            result.append(one)
            continue
        ascii_only = draw(st.booleans()) or any(
            "\ud800" <= c <= "\udfff" for c in json.dumps(one, ensure_ascii=False)
        )
        text = json.dumps(
            one, ensure_ascii=ascii_only, separators=draw(st.sampled_from([(",", ":"), None]))
        ).encode()
        result.append(b"data: " + text + b"\n\n")
    joined: list[bytes] = []
    for read in result:
        if joined and draw(st.integers(0, 3)) == 0:
            joined[-1] += read
        else:
            joined.append(read)
    return [*joined, data(b"[DONE]")]


def taken(usual: UsualReads, read: bytes) -> list[bytes]:
    """Return the texts of a read, if it is usual."""
    text = usual.take(read)
    return usual.take_several(read, LIMIT) if text is None else [text]


def publish(stream: list[bytes], *, in_full: bool) -> tuple[list[Any], Any]:
    """Return the events of a stream, and the terminal event."""
    attempt = listening(tokenizer=Tokenizer("bytes", lambda text: len(text.encode())))
    writer = EventWriter()
    values: list[bytes | None] = []
    usual: UsualReads | None = None
    for number, read in enumerate(stream):
        if not attempt.is_listening:
            break
        usual = None if in_full else usual or attempt.usual_reads()
        seq = attempt.seq
        texts = [] if usual is None else taken(usual, read)
        if usual is not None and texts:
            template = usual.template
            pattern = writer.text_pattern(attempt.job.job_id, attempt.id, template.choice, template.delta)
            values += [pattern % (at, number, text) for at, text in enumerate(texts, seq)]
            continue
        usual = None
        event: DeltaEvent
        for event in attempt.receive(read, number):
            values.append(writer.write(event, TO, b"k").value)
    if attempt.is_listening:
        values += [writer.write(event, TO, b"k").value for event in attempt.close(99)]
    if not attempt.is_ended:
        attempt.end()
    return [json.loads(value or b"") for value in values], attempt.terminal(100)


@given(reads())
def test_template_gives_the_events_of_the_full_reader(stream: list[bytes]) -> None:
    """Events, counts, usage and end are the same, whatever comes between usual reads."""
    assert publish(stream, in_full=False) == publish(stream, in_full=True)
