"""Which reads become a template, and what it contains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from streamworker.model import ErrorCode, JobError
from streamworker.stream.coalesce import Coalescer
from streamworker.stream.template import MAX_BYTES, ChunkTemplate, learn_template
from streamworker.stream.usage import Tokenizer
from tests.streams import chunk, data, listening

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.stream.attempt import Attempt

NOW = 1_000


def usual(delta: dict[str, Any], **members: Any) -> bytes:
    return data(chunk(delta) | {"id": "c", "created": 1} | members)


@pytest.mark.parametrize(
    ("delta", "around", "is_reasoning"),
    [
        ({"content": "a"}, (b'{"content":"', b'"}'), False),
        ({"role": "assistant", "content": "a"}, (b'{"role":"assistant","content":"', b'"}'), False),
        ({"content": "a", "refusal": None}, (b'{"content":"', b'","refusal":null}'), False),
        ({"reasoning_content": "a"}, (b'{"reasoning_content":"', b'"}'), True),
    ],
)
def test_template_of_a_usual_read_has_its_delta(
    delta: dict[str, Any], around: tuple[bytes, bytes], *, is_reasoning: bool
) -> None:
    """One chunk with one choice and one text."""
    read = usual(delta)
    template = learn_template(read)

    assert isinstance(template, ChunkTemplate)
    assert (template.choice, template.delta, template.is_reasoning) == (0, around, is_reasoning)
    assert read[template.text] == b'"a"'
    assert template.head + b"a" + template.tail == read


@pytest.mark.parametrize(
    "read",
    [
        b"",
        b"data: [DONE]\n\n",
        b": ping\n\n",
        b"data: {}\n\n",
        usual({"content": ""}),
        usual({"content": "a"})[:-1],
        usual({"content": "a"}) + usual({"content": "a"}),
        usual({"content": "a", "reasoning_content": "b"}),
        usual({"content": "a", "audio": {}}),
        usual({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}),
        usual({"content": "a"}, usage={"completion_tokens": 1}),
        usual({"content": "a"}, provider="x"),
        data(chunk({"content": "a"}, "stop")),
        data({"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": []}}]}),
        data({"choices": [{"index": n, "delta": {"content": "a"}} for n in (0, 1)]}),
        data({"error": {"message": '"content":"a"'}}),
        b"event: ping\n" + usual({"content": "a"}),
        usual({"content": "a" * MAX_BYTES}),
    ],
)
def test_template_of_another_read_is_none(read: bytes) -> None:
    """Anything but one chunk with one text and no other news is read in full."""
    assert learn_template(read) is None


def take(attempt: Attempt, read: bytes) -> bytes | None:
    """Take a read by its text alone, if the attempt can."""
    usual = attempt.usual_reads()
    return None if usual is None else usual.take(read)


def test_attempt_takes_reads_like_the_last_one_by_their_text() -> None:
    """They count as published, and the next event has the next `seq`."""
    attempt = listening(tokenizer=Tokenizer("bytes", lambda text: len(text.encode())))
    list(attempt.receive(usual({"content": "a"}), NOW))
    reads = attempt.usual_reads()
    assert reads is not None

    texts = ["b\u00e9", "\n", "c"]
    assert [reads.take(usual({"content": text})) for text in texts] == [b'"b\xc3\xa9"', b'"\\n"', b'"c"']
    assert attempt.seq == 5
    ledger = attempt.ledger
    assert (ledger.deltas, ledger.chunks, ledger.content_chars) == (4, 4, 5)
    assert ledger.bytes == sum(len(usual({"content": text})) for text in ["a", *texts])

    list(attempt.receive(usual({}) + data(b"[DONE]"), NOW))
    assert reads.take(usual({"content": "d"})) is None
    assert attempt.terminal(NOW).usage == {"completion_tokens": 6}
    assert attempt.terminal(NOW).observed.deltas == 5


def test_attempt_counts_usual_reads_of_reasoning_as_reasoning() -> None:
    """As the full reader does."""
    attempt = listening()
    list(attempt.receive(usual({"reasoning": "a"}), NOW))

    assert take(attempt, usual({"reasoning": "bc"})) == b'"bc"'
    assert (attempt.ledger.content_chars, attempt.ledger.reasoning_chars) == (0, 3)


def test_ledger_is_complete_whenever_it_is_read() -> None:
    """What usual reads gave is added once, when the ledger is read."""
    attempt = listening()
    list(attempt.receive(usual({"content": "a"}), NOW))
    reads = attempt.usual_reads()
    assert reads is not None

    for count in range(2, 5):
        reads.take(usual({"content": "x"}))
        assert [attempt.ledger.deltas, attempt.ledger.deltas] == [count, count]
        assert attempt.seq == count + 1


@pytest.mark.parametrize("inserted", [b'"', b"\\q", b"\n", b"\r", b"\x00", b"\xff", b"\\ud83d", b'","x":"'])
def test_attempt_leaves_a_text_that_is_not_a_valid_string_to_the_parser(inserted: bytes) -> None:
    """The template says nothing about the text itself."""
    attempt = listening()
    read = usual({"content": "ab"})
    list(attempt.receive(read, NOW))

    assert take(attempt, read.replace(b"ab", b"a" + inserted + b"b")) is None
    assert attempt.seq == 2


def test_attempt_leaves_a_read_that_is_too_short_for_its_template_to_the_parser() -> None:
    """Such a read may begin and end as the template does, and have no text between."""
    attempt = listening()
    read = usual({"content": "a"})
    list(attempt.receive(read, NOW))
    reads = attempt.usual_reads()
    assert reads is not None

    head, tail = reads.template.head, reads.template.tail
    assert reads.take(head[:-1] + tail) is None
    assert reads.take(head + tail) == b'""'


def test_attempt_after_another_read_learns_the_template_anew() -> None:
    """The reads in between may change what the same bytes mean: here the choice has ended, and goes on."""
    attempt = listening()
    list(attempt.receive(usual({"content": "a"}), NOW))
    reads = attempt.usual_reads()
    assert reads is not None
    assert reads.take(usual({"content": "b"})) is not None
    list(attempt.receive(usual({}, id="c") + b"data: ", NOW))

    assert reads.take(usual({"content": "c"})) is None
    assert attempt.usual_reads() is None


def test_attempt_gives_up_on_templates_that_are_of_no_use() -> None:
    """Some upstreams send other members in every chunk; learning costs as much as reading several chunks."""
    attempt = listening()
    learnt = 0
    for number in range(20):
        read = usual({"content": "a"}, obfuscation="x" * number)
        reads = attempt.usual_reads()
        learnt += reads is not None
        assert reads is None or reads.take(read) is None
        list(attempt.receive(read, NOW))

    assert learnt == 4


def test_attempt_learns_on_where_templates_are_of_use() -> None:
    """A stream that calls tools now and then keeps the fast way."""
    attempt = listening()
    for number in range(10):
        list(attempt.receive(usual({"content": "a"}, service_tier=str(number)), NOW))
        list(attempt.receive(usual({"content": "a"}, service_tier=str(number)), NOW))
        assert take(attempt, usual({"content": "b"}, service_tier=str(number))) == b'"b"'


def test_attempt_that_merges_takes_no_read_by_its_text() -> None:
    """A delta that may be held is not published at once."""
    attempt = listening(coalescer=Coalescer())
    list(attempt.receive(usual({"content": "a"}), NOW))

    assert attempt.usual_reads() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda attempt: attempt.wind_up("no more"),
        lambda attempt: attempt.cancel("no more"),
        lambda attempt: attempt.expire(),
        lambda attempt: attempt.fail(JobError(ErrorCode.TIMEOUT_IDLE, "nothing came")),
    ],
)
def test_attempt_whose_state_has_changed_takes_no_read_by_its_text(change: Callable[[Attempt], None]) -> None:
    """The holder of an attempt's usual reads publishes nothing after its end, and what was published is counted."""
    attempt = listening()
    list(attempt.receive(usual({"content": "a"}), NOW))
    reads = attempt.usual_reads()
    assert reads is not None
    assert reads.take(usual({"content": "b"})) is not None
    change(attempt)

    assert reads.take(usual({"content": "c"})) is None
    assert (attempt.seq, attempt.ledger.deltas) == (3, 2)


@pytest.mark.parametrize(("count", "taken"), [(1, 0), (2, 2), (5, 5), (6, 0)])
def test_attempt_takes_a_read_of_several_chunks_up_to_a_limit(count: int, taken: int) -> None:
    """A loop that is late receives several chunks at once; the limit is for the other streams."""
    attempt = listening()
    list(attempt.receive(usual({"content": "a"}), NOW))
    reads = attempt.usual_reads()
    assert reads is not None
    read = b"".join(usual({"content": f"\u00e9 {number}"}) for number in range(count))

    assert reads.take_several(read, 5) == [f'"\u00e9 {number}"'.encode() for number in range(taken)]
    assert (attempt.seq, attempt.ledger.deltas) == (2 + taken, 1 + taken)
    assert attempt.ledger.bytes == len(usual({"content": "a"})) + (len(read) if taken else 0)


@pytest.mark.parametrize(
    "other",
    [
        usual({"content": "b"}, id="d"),
        usual({"tool_calls": []}),
        data(chunk({"content": "b"}, "stop")),
        b": ping\n\n",
        usual({"content": "b"}).replace(b'"b"', b'"\\q"'),
        usual({"content": "b"}).replace(b'"b"', b'"b\\"'),
        usual({"content": "b"})[:-3],
    ],
)
def test_attempt_leaves_a_read_with_another_chunk_among_the_usual_ones_to_the_parser(other: bytes) -> None:
    """All of it, so that the order is kept."""
    attempt = listening()
    read = usual({"content": "a"})
    list(attempt.receive(read, NOW))
    reads = attempt.usual_reads()
    assert reads is not None

    assert reads.take_several(read + other + read, 9) == []
    assert reads.take_several(read + read + other, 9) == []
    assert (attempt.seq, attempt.ledger.deltas) == (2, 1)
    assert reads.take_several(read + read, 9) == [b'"a"', b'"a"']
