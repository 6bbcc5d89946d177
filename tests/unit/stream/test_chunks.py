"""The chunk reader: every shape of a chunk in, deltas out, nothing added and nothing lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from streamworker.model import ChunkDelta, Done, StreamError, StreamItem
from streamworker.stream.chunks import MAX_CHOICES, ChunkReader
from streamworker.stream.sse import ServerSentEvent
from streamworker.stream.usage import Ledger
from tests.streams import chunk, read

if TYPE_CHECKING:
    from collections.abc import Sequence

UNSET = msgspec.UNSET
HEAD = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def deltas(*payloads: Any) -> list[ChunkDelta]:
    """Read payloads that give nothing but deltas."""
    news = read(*payloads)
    assert all(isinstance(item, ChunkDelta) for item in news), news
    return [item for item in news if isinstance(item, ChunkDelta)]


def choice(**members: Any) -> dict[str, Any]:
    return HEAD | {"choices": [members]}


def fault(news: Sequence[StreamItem]) -> StreamError:
    assert all(isinstance(one, ChunkDelta) for one in news[:-1])
    assert isinstance(news[-1], StreamError)
    return news[-1]


@pytest.mark.parametrize(
    "payload",
    [
        b"null",
        b" \t",
        b"",
        b"{}",
        b'{"type":"ping"}',
        b'{"error":null}',
        b'{"obfuscation":"x"}',
        b'{"object":"x","choices":[]}',
        b'{"choices":null}',
        b'{"choices":{}}',
        b'{"choices":0}',
        b'{"id":""}',
        b"[null]",
        b"[{}]",
    ],
)
def test_reader_payload_without_news_gives_nothing(payload: bytes) -> None:
    """Pings and empty chunks are no deltas and no faults."""
    assert read(payload) == []


@pytest.mark.parametrize("payload", [b"[DONE]", b" [DONE] ", b"[DONE]\t"])
@pytest.mark.parametrize("event_type", ["message", "error", "done"])
def test_reader_sentinel_under_any_event_name_is_done(payload: bytes, event_type: str) -> None:
    """Blanks around it do not matter, its event's name neither."""
    assert read(payload, event_type=event_type) == [Done()]


@pytest.mark.parametrize(
    "payload", [b"[DONE].", b"DONE", b"[done]", b"[DONE][DONE]", b"hello", b"{", b"\xff"]
)
def test_reader_text_that_is_no_json_is_a_protocol_fault_without_its_content(payload: bytes) -> None:
    """The message says what was wrong, the frame what was sent."""
    found = fault(read(payload))

    assert found.protocol
    assert found.frame == payload.decode("utf-8", "replace")
    assert found.message.startswith("the upstream sent an event whose data is not JSON: ")


@pytest.mark.parametrize("payload", [5, True, "text", [], [{}, {}], [[{}]]])
def test_reader_json_that_is_no_object_is_a_protocol_fault(payload: Any) -> None:
    """Only an object can be a chunk; Google's array around one is taken off."""
    assert fault(read(payload)).message == "the upstream sent an event whose data is not a JSON object"


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"choices": 5}, "a chunk whose choices are not an array"),
        ({"choices": {"index": 0}}, "a chunk whose choices are not an array"),
        ({"choices": [None]}, "a choice that is not an object"),
        ({"choices": [{"delta": "text"}]}, "a delta that is not an object"),
        ({"choices": [{"delta": ["text"]}]}, "a delta that is not an object"),
        ({"choices": [{"index": i} for i in range(MAX_CHOICES + 1)]}, f"more than {MAX_CHOICES} choices"),
    ],
)
def test_reader_malformed_chunk_is_a_protocol_fault(payload: dict[str, Any], message: str) -> None:
    """Where text could hide that we cannot place, the stream is said to be broken."""
    assert fault(read(payload)).message == f"the upstream sent {message}"
    assert fault(read(payload)).protocol


def test_reader_most_choices_that_are_allowed_are_read() -> None:
    """The near side of the limit."""
    assert len(deltas({"choices": [{"index": i} for i in range(MAX_CHOICES)]})) == MAX_CHOICES


@pytest.mark.parametrize(
    "delta",
    [
        {},
        {"content": ""},
        {"content": None},
        {"content": "a", "role": "assistant"},
        {"content": [{"type": "text", "text": "a"}]},
        {"tool_calls": [{"index": 3, "id": "x"}]},
        {"audio": {"expires_at": 1}},
        {"never": {"seen": [2**70]}},
    ],
)
def test_reader_delta_comes_out_verbatim(delta: dict[str, Any]) -> None:
    """Whatever is in a delta stays in it."""
    assert [news.delta for news in deltas(chunk(delta))] == [delta]


@pytest.mark.parametrize(
    ("members", "index"),
    [
        ({}, 0),
        ({"index": 2}, 2),
        ({"index": None}, 0),
        ({"index": "1"}, 0),
        ({"index": True}, 0),
        ({"index": 1.5}, 0),
    ],
)
def test_reader_choice_without_usable_index_is_choice_0(members: dict[str, Any], index: int) -> None:
    """A missing index means the first choice; the delta is there even if it was missing or null."""
    assert deltas({"choices": [members]}) == [ChunkDelta(index, {}, chunk={})]
    assert deltas({"choices": [members | {"delta": None}]}) == [ChunkDelta(index, {}, chunk={})]


def test_reader_choices_of_one_chunk_come_in_the_upstreams_order() -> None:
    """Not sorted, not merged."""
    payload = {"choices": [{"index": 1, "delta": {"content": "b"}}, {"index": 0, "delta": {"content": "a"}}]}

    assert [(news.choice, news.delta["content"]) for news in deltas(payload)] == [(1, "b"), (0, "a")]


@pytest.mark.parametrize(
    ("reasons", "told", "last"),
    [
        ([None, "stop"], [None, "stop"], "stop"),
        (["stop", None], ["stop", None], "stop"),
        (["stop", "stop"], ["stop", None], "stop"),
        (["stop", "content_filter"], ["stop", "content_filter"], "content_filter"),
        (["", "stop", ""], [None, "stop", None], "stop"),
        ([5, 5], ["5", None], "5"),
        (["never_seen"], ["never_seen"], "never_seen"),
        ([None, ""], [None, None], None),
    ],
)
def test_reader_finish_reason_last_wins_and_is_told_once(
    reasons: list[Any], told: list[str | None], last: str | None
) -> None:
    """Null and the empty string are no reason, a repeated one is no news, an unknown one is passed on."""
    reader = ChunkReader(Ledger())
    news = [
        item
        for reason in reasons
        for item in reader.read(ServerSentEvent("", msgspec.json.encode(choice(finish_reason=reason))))
    ]

    assert [item.finish_reason for item in news if isinstance(item, ChunkDelta)] == told
    assert reader.finish_reasons == {0: last}
    assert reader.is_finished is (last is not None)


def test_reader_is_finished_when_every_opened_choice_is() -> None:
    """One unfinished choice is enough to be cut off; no choice at all is no end."""
    reader = ChunkReader(Ledger())
    states = [reader.is_finished]
    for index, reason in ((0, None), (1, "stop"), (0, "length")):
        payload = {"choices": [{"index": index, "finish_reason": reason}]}
        reader.read(ServerSentEvent("", msgspec.json.encode(payload)))
        states.append(reader.is_finished)

    assert states == [False, False, False, True]


def test_reader_chunk_members_are_told_first_and_when_one_changes() -> None:
    """`chunk` is set on the first delta, and again when a member comes, changes or goes."""
    base = {"id": "1", "model": "m"}
    heads = [base, base, base | {"system_fingerprint": "f"}, base | {"model": "n"}, base | {"model": "n"}, {}]
    told = [news.chunk for news in deltas(*(head | {"choices": [{}]} for head in heads))]

    assert told == [base, UNSET, base | {"system_fingerprint": "f"}, base | {"model": "n"}, UNSET, {}]


def test_reader_chunk_members_go_on_the_first_of_several_choices() -> None:
    """Once per chunk, not once per choice."""
    told = [news.chunk for news in deltas(HEAD | {"choices": [{"index": 0}, {"index": 1}]})]

    assert told == [HEAD, UNSET]


@pytest.mark.parametrize(("logprobs", "told"), [(None, UNSET), ({"content": []}, {"content": []}), ([], [])])
def test_reader_logprobs_are_told_if_sent(logprobs: Any, told: Any) -> None:
    """Null says nothing."""
    assert deltas(choice(logprobs=logprobs))[0].logprobs == told


def test_reader_unknown_members_of_chunk_and_choice_are_kept_under_extra() -> None:
    """What we do not know goes through; padding does not."""
    payload = choice(delta={}, stop_reason=None) | {"timings": {"n": 1}, "obfuscation": "xx", "error": None}

    assert deltas(payload)[0].extra == {"timings": {"n": 1}, "stop_reason": None}
    assert deltas(choice(delta={}))[0].extra is UNSET


def test_reader_unknown_members_without_choices_are_an_event_without_choice() -> None:
    """It has an empty delta and is no first one: the next event tells the chunk's own members again."""
    payload = HEAD | {"choices": [], "prompt_filter_results": [1]}

    assert deltas(payload, payload, choice(delta={})) == [
        ChunkDelta(None, {}, chunk=HEAD, extra={"prompt_filter_results": [1]}),
        ChunkDelta(None, {}, chunk=HEAD, extra={"prompt_filter_results": [1]}),
        ChunkDelta(0, {}, chunk=HEAD),
    ]


def test_reader_unknown_members_of_one_name_in_chunk_and_choice_are_both_kept() -> None:
    """Neither hides the other: the chunk's come first, on an event of their own."""
    payload = choice(delta={}, x="choice") | {"x": "chunk", "y": 1}

    assert [(news.choice, news.extra) for news in deltas(payload)] == [
        (None, {"x": "chunk", "y": 1}),
        (0, {"x": "choice"}),
    ]


@pytest.mark.parametrize(
    "payload",
    [
        HEAD | {"choices": [], "usage": {"n": 1}},
        choice(finish_reason="stop") | {"usage": {"n": 1}},
        HEAD | {"choices": None, "usage": {"n": 1}},
        choice(usage={"n": 1}),
        choice() | {"usage": None, "x_groq": {"usage": {"n": 1}}},
        choice() | {"usage": {"n": 1}, "x_groq": {"usage": {"n": 2}}},
        {"choices": [{"usage": {"n": 2}}, {"usage": {"n": 1}}]},
        {"error": {"message": "m"}, "usage": {"n": 1}},
    ],
)
def test_reader_usage_is_found_wherever_it_is(payload: dict[str, Any]) -> None:
    """In the chunk, in the choice, under x_groq, beside an error."""
    ledger = Ledger()
    read(payload, ledger=ledger)

    assert ledger.settle(completed=True)[0] == {"n": 1}


@pytest.mark.parametrize("empty", [None, {}, [], 0, "x", [1]])
def test_reader_usage_that_says_nothing_erases_nothing(empty: Any) -> None:
    """The last non-empty report stays."""
    ledger = Ledger()
    read(choice() | {"usage": {"n": 1}}, choice() | {"usage": empty}, ledger=ledger)

    assert ledger.settle(completed=True)[0] == {"n": 1}


def test_reader_counts_chunks_and_nothing_else() -> None:
    """Pings, errors and the sentinel are no chunks; a chunk without choices is one."""
    ledger = Ledger()
    read(chunk(), {"type": "ping"}, {"choices": []}, b"null", {"error": "m"}, b"[DONE]", ledger=ledger)

    assert ledger.chunks == 2


@pytest.mark.parametrize("delta", [{}, {"content": ""}, {"role": "assistant", "content": None}, None])
def test_reader_error_beside_choices_that_say_nothing_is_no_first_delta(delta: Any) -> None:
    """Nothing was said, so the try may be made again; the next chunk tells of itself anew."""
    reader = ChunkReader(Ledger())
    failed = choice(index=0, delta=delta, finish_reason="error") | {"error": {"message": "m", "code": 502}}
    news = reader.read(ServerSentEvent("message", msgspec.json.encode(failed)))

    assert fault(news).status == 502
    assert len(news) == 1
    assert reader.finish_reasons == {}


def test_reader_error_beside_choices_after_a_delta_keeps_the_chunk() -> None:
    """Once something was published, whatever comes is told."""
    news = read(
        choice(index=0, delta={"content": "a"}),
        choice(index=0, delta={"content": ""}, finish_reason="error") | {"error": "m"},
    )

    assert [one.delta for one in news if isinstance(one, ChunkDelta)] == [{"content": "a"}, {"content": ""}]
    assert fault(news).message == "m"


def test_reader_error_beside_malformed_choices_is_told_in_its_own_words() -> None:
    """What is wrong with the chunk matters less than what it says is wrong."""
    assert fault(read({"choices": 5, "error": {"message": "m"}})).message == "m"


def test_reader_error_beside_choices_keeps_their_text_first() -> None:
    """Text that came with an error is not lost for it."""
    news = read(
        {"choices": [{"delta": {"content": "a"}, "finish_reason": "error"}], "error": {"message": "m"}}
    )

    assert [type(item) for item in news] == [ChunkDelta, StreamError]
    assert news[0] == ChunkDelta(0, {"content": "a"}, "error", chunk={})


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"plain words", "plain words"),
        (b'{"message":"m"}', "m"),
        (b'[{"error":{"message":"m"}}]', "m"),
        (b"{", "{"),
    ],
)
def test_reader_event_called_error_is_a_fault_of_generation(payload: bytes, message: str) -> None:
    """Under that name even a text is the upstream's word, and no breach of protocol."""
    found = fault(read(payload, event_type="error"))

    assert (found.message, found.protocol) == (message, False)


def halves(*texts: str, member: str = "content", last: str | None = None) -> list[bytes]:
    """Chunks whose texts are written with JSON escapes as given."""
    reasons = ["null"] * (len(texts) - 1) + ["null" if last is None else f'"{last}"']
    return [
        f'{{"choices":[{{"delta":{{"{member}":"{text}"}},"finish_reason":{reason}}}]}}'.encode()
        for text, reason in zip(texts, reasons, strict=True)
    ]


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["a\\ud83d", "\\udc1fb"], ["a", "🐟b"]),
        (["\\ud83d", "\\udc1f"], ["", "🐟"]),
        (["\\ud83d", "", "\\udc1f"], ["", "", "🐟"]),
        (["\\ud83d\\udc1f"], ["🐟"]),
        (["\\ud83d", "b"], ["", "\ufffdb"]),
        (["\\ud83d", "\\ud83d\\udc1f"], ["", "\ufffd🐟"]),
        (["a\\udc1f", "b"], ["a\ufffd", "b"]),
        (["\\ud83db", "c"], ["\ufffdb", "c"]),
        (["a\\ud83d", "\\udc1f\\ud83d", "\\udc1f"], ["a", "🐟", "🐟"]),
    ],
)
def test_reader_character_cut_in_two_over_deltas_is_joined(texts: list[str], told: list[str]) -> None:
    """The first half waits for the next delta; one that stays alone becomes U+FFFD."""
    assert [news.delta["content"] for news in deltas(*halves(*texts))] == told


def test_reader_half_character_in_the_last_delta_does_not_wait() -> None:
    """Nothing follows a finish reason."""
    assert [news.delta["content"] for news in deltas(*halves("a", "b\\ud83d", last="stop"))] == [
        "a",
        "b\ufffd",
    ]


def test_reader_halves_of_different_choices_and_members_do_not_mix() -> None:
    """Each choice and member has its own."""
    first = b'{"choices":[{"index":0,"delta":{"content":"\\ud83d","reasoning":"\\ud83e"}},{"index":1,"delta":{"content":"\\ud83c"}}]}'
    second = b'{"choices":[{"index":1,"delta":{"content":"\\udf0d"}},{"index":0,"delta":{"reasoning":"\\udd14","content":"\\udc1f"}}]}'

    assert [news.delta for news in deltas(first, second)] == [
        {"content": "", "reasoning": ""},
        {"content": ""},
        {"content": "🌍"},
        {"reasoning": "🤔", "content": "🐟"},
    ]


def test_reader_halves_that_wait_are_bounded() -> None:
    """An upstream that sends halves under ever new names does not fill our memory."""
    reader = ChunkReader(Ledger())
    for number in range(3 * MAX_CHOICES):
        (payload,) = halves("\\ud83d", member=f"m{number}")
        reader.read(ServerSentEvent("message", payload))

    assert len(reader._high_surrogates) == MAX_CHOICES


@pytest.mark.parametrize(
    "payload",
    [
        b'{"choices":[{"delta":{"tool_calls":[{"id":"\\ud83d"}]}}]}',
        b'{"choices":[{"delta":{"x":1}}],"y":"\\ud83d"}',
        b'{"choices":{"a":"\\ud83d"}}',
        b'{"choices":["\\ud83d"]}',
        b'{"choices":[{"delta":"\\ud83d"}]}',
        b'["\\ud83d"]',
        b'"\\ud83d"',
        b'{"error":{"message":"\\ud83d"}}',
    ],
)
def test_reader_half_characters_anywhere_else_are_replaced(payload: bytes) -> None:
    """Whatever comes out can be written as UTF-8."""
    for news in read(payload):
        assert msgspec.json.decode(msgspec.json.encode(news)) == msgspec.to_builtins(news)


def test_reader_bytes_that_are_no_utf8_are_replaced() -> None:
    """A stream that is sloppy about its encoding still streams."""
    assert deltas(b'{"choices":[{"delta":{"content":"a\xffb"}}]}')[0].delta == {"content": "a\ufffdb"}


def test_reader_deep_nesting_with_half_characters_is_a_fault_not_a_crash() -> None:
    """What is nested deeper than it could be written out is refused when it is read."""
    payload = b'{"choices":[{"delta":{"content":"\\ud83d","x":' + b"[" * 600 + b"]" * 600 + b"}}]}"

    assert "nested too deeply" in fault(read(payload)).message


def test_reader_half_a_character_at_the_end_is_told_as_replaced() -> None:
    """Also where the last delta does not name the member again: nothing vanishes."""
    reader = ChunkReader(Ledger())
    first = b'{"id":"c","choices":[{"index":0,"delta":{"content":"a\\ud83d"}}]}'
    last = b'{"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
    news = [one for data in (first, last) for one in reader.read(ServerSentEvent("message", data))]

    assert [one.delta for one in news if isinstance(one, ChunkDelta)] == [
        {"content": "a"},
        {"content": "\ufffd"},
    ]


def test_chat_finish_reason_is_kept_up_to_a_bound() -> None:
    """Every choice keeps its own until the end: a stream could make us keep a megabyte for each."""
    for size, kept in ((256, 256), (257, 256), (900_000, 256)):
        [delta] = read(chunk({}, "x" * size))
        assert isinstance(delta, ChunkDelta)
        assert delta.finish_reason == "x" * kept


def test_chat_halves_of_characters_wait_under_names_up_to_a_bound() -> None:
    """A member with an endless name is passed on as it is, its lone surrogate replaced."""
    for size, waits in ((64, True), (65, False)):
        [delta] = read(b'{"choices":[{"delta":{"%s":"\\ud83d"}}]}' % (b"n" * size))
        assert isinstance(delta, ChunkDelta)
        assert delta.delta == {"n" * size: "" if waits else "\N{REPLACEMENT CHARACTER}"}
