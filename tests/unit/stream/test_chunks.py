"""The chunk reader: every known shape of a chunk, read without adding or losing anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from streamworker.model import ChunkDelta, Done, StreamError, StreamItem
from streamworker.stream.chunks import MAX_CHOICES, MAX_NULLS, ChunkReader
from streamworker.stream.coalesce import Coalescer
from streamworker.stream.sse import ServerSentEvent
from streamworker.stream.usage import Ledger
from streamworker.wire.json import MAX_DEPTH
from tests.streams import NOW, chunk, data, listening, read

if TYPE_CHECKING:
    from collections.abc import Sequence

UNSET = msgspec.UNSET
HEAD = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def deltas(*payloads: Any) -> list[ChunkDelta]:
    """Read payloads that give deltas only; return the deltas."""
    items = read(*payloads)
    assert all(isinstance(item, ChunkDelta) for item in items), items
    return [item for item in items if isinstance(item, ChunkDelta)]


def choice(**members: Any) -> dict[str, Any]:
    return HEAD | {"choices": [members]}


def error_in(items: Sequence[StreamItem]) -> StreamError:
    assert all(isinstance(item, ChunkDelta) for item in items[:-1])
    assert isinstance(items[-1], StreamError)
    return items[-1]


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
def test_reader_payload_without_content_gives_nothing(payload: bytes) -> None:
    """Keep-alives and empty chunks are neither deltas nor errors."""
    assert read(payload) == []


@pytest.mark.parametrize("payload", [b"[DONE]", b" [DONE] ", b"[DONE]\t"])
@pytest.mark.parametrize("event_type", ["message", "error", "done"])
def test_reader_sentinel_under_any_event_name_is_done(payload: bytes, event_type: str) -> None:
    """Blanks around the sentinel and the event's name do not matter."""
    assert read(payload, event_type=event_type) == [Done()]


@pytest.mark.parametrize(
    "payload", [b"[DONE].", b"DONE", b"[done]", b"[DONE][DONE]", b"hello", b"{", b"\xff"]
)
def test_reader_text_that_is_not_json_is_a_protocol_error_without_its_content(payload: bytes) -> None:
    """The message says what is wrong, the frame repeats what was sent."""
    found = error_in(read(payload))

    assert found.protocol
    assert found.frame == payload.decode("utf-8", "replace")
    assert found.message.startswith("the upstream sent an event whose data is not JSON: ")


@pytest.mark.parametrize("payload", [5, True, "text", [], [{}, {}], [[{}]]])
def test_reader_json_that_is_not_an_object_is_a_protocol_error(payload: Any) -> None:
    """Only an object can be a chunk. The array that Google puts around an error is removed."""
    assert error_in(read(payload)).message == "the upstream sent an event whose data is not a JSON object"


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
def test_reader_malformed_chunk_is_a_protocol_error(payload: dict[str, Any], message: str) -> None:
    """If a choice cannot be read, its text would be lost, so the stream counts as broken."""
    assert error_in(read(payload)).message == f"the upstream sent {message}"
    assert error_in(read(payload)).protocol


def test_reader_largest_allowed_number_of_choices_is_read() -> None:
    """MAX_CHOICES choices are allowed."""
    assert len(deltas({"choices": [{"index": i} for i in range(MAX_CHOICES)]})) == MAX_CHOICES


def test_reader_one_choice_too_many_on_the_fast_path_is_a_protocol_error() -> None:
    """The limit holds over all chunks of a stream, whichever path reads them."""
    *items, error = read(*(choice(index=index, delta={}) for index in range(MAX_CHOICES + 1)))

    assert [item.choice for item in items if isinstance(item, ChunkDelta)] == [*range(MAX_CHOICES)]
    assert isinstance(error, StreamError)
    assert error.message == f"the upstream sent more than {MAX_CHOICES} choices"


@pytest.mark.parametrize(("levels", "is_read"), [(MAX_DEPTH - 4, True), (MAX_DEPTH - 3, False)])
def test_reader_depth_is_limited_on_the_fast_path(levels: int, is_read: bool) -> None:
    """A delta that could not be encoded again is an error when it is read. Chunk, choices, choice, delta: 4 levels."""
    payload = b'{"choices":[{"delta":{"a":' + b"[" * levels + b"]" * levels + b"}}]}"

    [item] = read(payload)

    assert isinstance(item, ChunkDelta) is is_read
    assert is_read or "nested too deeply" in error_in([item]).message


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
    """Every member of a delta is kept unchanged."""
    assert [item.delta for item in deltas(chunk(delta))] == [delta]


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
    """A missing or invalid index is 0, and a missing or null delta is empty."""
    assert deltas({"choices": [members]}) == [ChunkDelta(index, {}, chunk={})]
    assert deltas({"choices": [members | {"delta": None}]}) == [ChunkDelta(index, {}, chunk={})]


def test_reader_choices_of_one_chunk_come_in_the_upstreams_order() -> None:
    """Choices are neither sorted nor merged."""
    payload = {"choices": [{"index": 1, "delta": {"content": "b"}}, {"index": 0, "delta": {"content": "a"}}]}

    assert [(item.choice, item.delta["content"]) for item in deltas(payload)] == [(1, "b"), (0, "a")]


@pytest.mark.parametrize(
    ("reasons", "reported", "last"),
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
def test_reader_last_finish_reason_counts_and_is_reported_once(
    reasons: list[Any], reported: list[str | None], last: str | None
) -> None:
    """Null and the empty string are not reasons, a repeated reason is not reported again, an unknown one is
    passed on."""
    reader = ChunkReader(Ledger())
    items = [
        item
        for reason in reasons
        for item in reader.read(ServerSentEvent("", msgspec.json.encode(choice(finish_reason=reason))))
    ]

    assert [item.finish_reason for item in items if isinstance(item, ChunkDelta)] == reported
    assert reader.finish_reasons == {0: last}
    assert reader.is_finished is (last is not None)


def test_reader_is_finished_when_every_opened_choice_is() -> None:
    """A stream with an unfinished choice, or without any choice, is not finished."""
    reader = ChunkReader(Ledger())
    states = [reader.is_finished]
    for index, reason in ((0, None), (1, "stop"), (0, "length")):
        payload = {"choices": [{"index": index, "finish_reason": reason}]}
        reader.read(ServerSentEvent("", msgspec.json.encode(payload)))
        states.append(reader.is_finished)

    assert states == [False, False, False, True]


def test_reader_chunk_members_are_reported_first_and_on_change() -> None:
    """`chunk` is set on the first delta, and whenever a member appears, changes or disappears."""
    base = {"id": "1", "model": "m"}
    heads = [base, base, base | {"system_fingerprint": "f"}, base | {"model": "n"}, base | {"model": "n"}, {}]
    reported = [item.chunk for item in deltas(*(head | {"choices": [{}]} for head in heads))]

    assert reported == [base, UNSET, base | {"system_fingerprint": "f"}, base | {"model": "n"}, UNSET, {}]


def test_reader_chunk_members_go_on_the_first_of_several_choices() -> None:
    """Once per chunk, not once per choice."""
    reported = [item.chunk for item in deltas(HEAD | {"choices": [{"index": 0}, {"index": 1}]})]

    assert reported == [HEAD, UNSET]


@pytest.mark.parametrize(
    ("logprobs", "reported"), [(None, UNSET), ({"content": []}, {"content": []}), ([], [])]
)
def test_reader_logprobs_are_reported_if_sent(logprobs: Any, reported: Any) -> None:
    """A null is left out."""
    assert deltas(choice(logprobs=logprobs))[0].logprobs == reported


def test_reader_unknown_members_of_chunk_and_choice_are_kept_under_extra() -> None:
    """Unknown members are passed on; padding and nulls are dropped."""
    payload = choice(delta={}, stop_reason=None) | {"timings": {"n": 1}, "obfuscation": "xx", "error": None}

    assert deltas(payload)[0].extra == {"timings": {"n": 1}}
    assert deltas(choice(delta={}))[0].extra is UNSET


def test_reader_unknown_members_without_choices_are_an_event_without_choice() -> None:
    """The event has an empty delta and does not count as a delta, so the next one repeats the chunk's own
    members."""
    payload = HEAD | {"choices": [], "prompt_filter_results": [1]}

    assert deltas(payload, payload, choice(delta={})) == [
        ChunkDelta(None, {}, chunk=HEAD, extra={"prompt_filter_results": [1]}),
        ChunkDelta(None, {}, chunk=HEAD, extra={"prompt_filter_results": [1]}),
        ChunkDelta(0, {}, chunk=HEAD),
    ]


def test_reader_unknown_members_of_one_name_in_chunk_and_choice_are_both_kept() -> None:
    """Neither hides the other: the chunk's members get an event of their own, before the delta."""
    payload = choice(delta={}, x="choice") | {"x": "chunk", "y": 1}

    assert [(item.choice, item.extra) for item in deltas(payload)] == [
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
    """In the chunk, in the choice, under `x_groq`, or beside an error."""
    ledger = Ledger()
    read(payload, ledger=ledger)

    assert ledger.settle(completed=True)[0] == {"n": 1}


@pytest.mark.parametrize("empty", [None, {}, [], 0, "x", [1]])
def test_reader_empty_usage_does_not_erase_a_report(empty: Any) -> None:
    """The last non-empty report counts."""
    ledger = Ledger()
    read(choice() | {"usage": {"n": 1}}, choice() | {"usage": empty}, ledger=ledger)

    assert ledger.settle(completed=True)[0] == {"n": 1}


def test_reader_counts_chunks_and_nothing_else() -> None:
    """Keep-alives, errors and the sentinel are not chunks; a chunk without choices is one."""
    ledger = Ledger()
    read(chunk(), {"type": "ping"}, {"choices": []}, b"null", {"error": "m"}, b"[DONE]", ledger=ledger)

    assert ledger.chunks == 2


@pytest.mark.parametrize("delta", [{}, {"content": ""}, {"role": "assistant", "content": None}, None])
def test_reader_error_beside_empty_choices_is_not_a_first_delta(delta: Any) -> None:
    """No text was generated, so another try may follow; the next chunk reports its own members again."""
    reader = ChunkReader(Ledger())
    failed = choice(index=0, delta=delta, finish_reason="error") | {"error": {"message": "m", "code": 502}}
    items = reader.read(ServerSentEvent("message", msgspec.json.encode(failed)))

    assert error_in(items).status == 502
    assert len(items) == 1
    assert reader.finish_reasons == {}


def test_reader_error_beside_choices_after_a_delta_keeps_the_chunk() -> None:
    """After a delta was published, the chunk beside the error is published too."""
    items = read(
        choice(index=0, delta={"content": "a"}),
        choice(index=0, delta={"content": ""}, finish_reason="error") | {"error": "m"},
    )

    assert [item.delta for item in items if isinstance(item, ChunkDelta)] == [
        {"content": "a"},
        {"content": ""},
    ]
    assert error_in(items).message == "m"


def test_reader_error_beside_malformed_choices_keeps_its_own_message() -> None:
    """The upstream's error is more useful than the protocol error."""
    assert error_in(read({"choices": 5, "error": {"message": "m"}})).message == "m"


def test_reader_error_beside_choices_keeps_their_text_first() -> None:
    """Text that arrives together with an error is kept."""
    items = read(
        {"choices": [{"delta": {"content": "a"}, "finish_reason": "error"}], "error": {"message": "m"}}
    )

    assert [type(item) for item in items] == [ChunkDelta, StreamError]
    assert items[0] == ChunkDelta(0, {"content": "a"}, "error", chunk={})


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"plain words", "plain words"),
        (b'{"message":"m"}', "m"),
        (b'[{"error":{"message":"m"}}]', "m"),
        (b"{", "{"),
    ],
)
def test_reader_event_called_error_is_an_upstream_error(payload: bytes, message: str) -> None:
    """Under that name even plain text is the upstream's error and not a protocol error."""
    found = error_in(read(payload, event_type="error"))

    assert (found.message, found.protocol) == (message, False)


def halves(*texts: str, member: str = "content", last: str | None = None) -> list[bytes]:
    """Chunks whose texts are written with JSON escapes as given."""
    reasons = ["null"] * (len(texts) - 1) + ["null" if last is None else f'"{last}"']
    return [
        f'{{"choices":[{{"delta":{{"{member}":"{text}"}},"finish_reason":{reason}}}]}}'.encode()
        for text, reason in zip(texts, reasons, strict=True)
    ]


@pytest.mark.parametrize(
    ("texts", "reported"),
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
def test_reader_character_split_over_deltas_is_joined(texts: list[str], reported: list[str]) -> None:
    """The first half is kept for the next delta; a half that stays alone becomes U+FFFD."""
    assert [item.delta["content"] for item in deltas(*halves(*texts))] == reported


def test_reader_half_character_in_the_last_delta_is_not_kept() -> None:
    """No delta follows a finish reason."""
    assert [item.delta["content"] for item in deltas(*halves("a", "b\\ud83d", last="stop"))] == [
        "a",
        "b\ufffd",
    ]


def test_reader_halves_of_different_choices_and_members_do_not_mix() -> None:
    """Halves are kept per choice and member."""
    first = b'{"choices":[{"index":0,"delta":{"content":"\\ud83d","reasoning":"\\ud83e"}},{"index":1,"delta":{"content":"\\ud83c"}}]}'
    second = b'{"choices":[{"index":1,"delta":{"content":"\\udf0d"}},{"index":0,"delta":{"reasoning":"\\udd14","content":"\\udc1f"}}]}'

    assert [item.delta for item in deltas(first, second)] == [
        {"content": "", "reasoning": ""},
        {"content": ""},
        {"content": "🌍"},
        {"reasoning": "🤔", "content": "🐟"},
    ]


def test_reader_kept_halves_are_bounded() -> None:
    """An upstream that sends halves under ever new names cannot use up memory."""
    reader = ChunkReader(Ledger())
    for number in range(3 * MAX_CHOICES):
        (payload,) = halves("\\ud83d", member=f"m{number}")
        reader.read(ServerSentEvent("message", payload))

    assert len(reader._held) == MAX_CHOICES


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
    """Every published text can be encoded as UTF-8."""
    for item in read(payload):
        assert msgspec.json.decode(msgspec.json.encode(item)) == msgspec.to_builtins(item)


def test_reader_invalid_utf8_is_replaced() -> None:
    """An invalid encoding does not end the stream."""
    assert deltas(b'{"choices":[{"delta":{"content":"a\xffb"}}]}')[0].delta == {"content": "a\ufffdb"}


def test_reader_deep_nesting_with_half_characters_is_an_error() -> None:
    """A value that is nested more deeply than it can be encoded is rejected when it is read."""
    payload = b'{"choices":[{"delta":{"content":"\\ud83d","x":' + b"[" * 600 + b"]" * 600 + b"}}]}"

    assert "nested too deeply" in error_in(read(payload)).message


def test_reader_half_a_character_at_the_end_is_replaced() -> None:
    """Even if the last delta does not name the member again, the half is not lost."""
    reader = ChunkReader(Ledger())
    first = b'{"id":"c","choices":[{"index":0,"delta":{"content":"a\\ud83d"}}]}'
    last = b'{"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
    items = [item for data in (first, last) for item in reader.read(ServerSentEvent("message", data))]

    assert [item.delta for item in items if isinstance(item, ChunkDelta)] == [
        {"content": "a"},
        {"content": "\ufffd"},
    ]


def test_reader_finish_reason_is_cut_to_a_bound() -> None:
    """Reasons are kept per choice until the end, so their size is bounded."""
    for size, kept in ((256, 256), (257, 256), (900_000, 256)):
        [delta] = read(chunk({}, "x" * size))
        assert isinstance(delta, ChunkDelta)
        assert delta.finish_reason == "x" * kept


def test_reader_halves_are_kept_under_bounded_names() -> None:
    """Under a longer name the half is replaced and not kept."""
    for size, waits in ((64, True), (65, False)):
        [delta] = read(b'{"choices":[{"delta":{"%s":"\\ud83d"}}]}' % (b"n" * size))
        assert isinstance(delta, ChunkDelta)
        assert delta.delta == {"n" * size: "" if waits else "\N{REPLACEMENT CHARACTER}"}


# Keep-alives, unknown objects, broken payloads


@pytest.mark.parametrize(
    "payload", [b": keepalive", b" : ping", b"ping", b"KEEPALIVE", b'{"type":"heartbeat"}', b'{"ts":1}']
)
def test_reader_keep_alive_as_data_gives_nothing(payload: bytes) -> None:
    """No JSON begins with a colon, and a keep-alive's name is not content."""
    assert read(payload) == []


@pytest.mark.parametrize("payload", [b"tick", b'{"choices":[{"delta":{"content":"x"}}]}', b"{"])
def test_reader_data_of_an_event_called_ping_is_ignored(payload: bytes) -> None:
    """Whatever it is, except for the sentinel."""
    assert read(payload, event_type="ping") == []
    assert read(b"[DONE]", event_type="ping") == [Done()]


def test_reader_unknown_object_is_passed_on_and_explains_a_stream_without_choices() -> None:
    """It is an event without a choice; if nothing else comes, it is the reason."""
    reader = ChunkReader(Ledger())
    [item] = reader.read(ServerSentEvent("message", b'{"notice":"maintenance","none":null}'))

    assert item == ChunkDelta(None, {}, extra={"notice": "maintenance"})
    assert reader.failure is not None
    assert reader.failure.message == '{"notice":"maintenance","none":null}'

    reader.read(ServerSentEvent("message", b'{"choices":[{"delta":{"content":"x"}}]}'))
    assert reader.failure is None


@pytest.mark.parametrize(
    ("payload", "content"),
    [
        (b'{"choices":[{"delta":{"content":"a\x1bb"}}]}', "a\x1bb"),
        (b'{"choices":[{"delta":{"content":"a\nb"}}]}', "a\nb"),
        (b'data: {"choices":[{"delta":{"content":"a"}}]}', "a"),
        (b'data:data: {"choices":[{"delta":{"content":"a"}}]}', "a"),
        (b'{"choices":[{"delta":{"content":"a"},"logprobs":{"p":-Infinity}}]}', "a"),
    ],
)
def test_reader_payload_with_one_meaning_is_read(payload: bytes, content: str) -> None:
    """Control characters, numbers that are not finite, and a second `data:` prefix."""
    [item] = deltas(payload)

    assert item.delta == {"content": content}
    assert item.logprobs in (UNSET, {"p": None})


@pytest.mark.parametrize("late", [b"oops", b'{"error":{"message":"m"}}', b"[DONE", b"5", b'{"choices":5}'])
def test_reader_errors_after_the_end_of_every_choice_are_ignored(late: bytes) -> None:
    """The answer is whole; usage that follows is still read."""
    ledger = Ledger()
    last = {"choices": [], "usage": {"total_tokens": 3}}
    items = read(chunk({"content": "a"}), chunk({}, "stop"), late, last, b"[DONE]", ledger=ledger)

    assert [type(item) for item in items] == [ChunkDelta, ChunkDelta, Done]
    assert ledger.total_tokens == 3


# Finish reasons that are not the end


def reasons_of(*chunks: Any) -> dict[int, str | None]:
    reader = ChunkReader(Ledger())
    for payload in chunks:
        reader.read(ServerSentEvent("message", msgspec.json.encode(payload)))
    return reader.finish_reasons


@pytest.mark.parametrize(
    ("delta", "reason"),
    [
        ({"content": "b"}, None),
        ({"reasoning": "b"}, None),
        ({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}, None),
        ({"content": ""}, "stop"),
        ({"content": None, "role": "assistant"}, "stop"),
        ({}, "stop"),
    ],
)
def test_reader_text_after_a_finish_reason_opens_the_choice_again(delta: Any, reason: str | None) -> None:
    """The last reason counts; a delta without text changes nothing."""
    assert reasons_of(chunk({"content": "a"}, "stop"), chunk(delta)) == {0: reason}
    assert reasons_of(chunk({"content": "a"}, "stop"), chunk(delta, "length")) == {0: "length"}


def test_reader_finish_reason_null_as_text_is_null() -> None:
    """Some gateways write it as a string."""
    assert reasons_of(chunk({"content": "a"}, "null")) == {0: None}


@pytest.mark.parametrize(
    "reason", ["error", "network_error", "failed", "upstream_error", "ERROR", "server-error"]
)
def test_reader_finish_reason_that_says_failure_is_the_streams_failure(reason: str) -> None:
    """After text; a first chunk without text is the error itself, so that another try may follow."""
    reader = ChunkReader(Ledger())
    for payload in (chunk({"content": "a"}), chunk({}, reason)):
        reader.read(ServerSentEvent("message", msgspec.json.encode(payload)))

    assert reader.finish_reasons == {0: reason}
    assert reader.failure is not None
    assert repr(reason) in reader.failure.message
    assert repr(reason) in error_in(read(chunk({"content": ""}, reason))).message


@pytest.mark.parametrize(
    "reason", ["stop", "content_filter", "insufficient_system_resource", "errors", "no_errors_found"]
)
def test_reader_other_finish_reasons_are_not_failures(reason: str) -> None:
    """Unknown reasons are passed on."""
    reader = ChunkReader(Ledger())
    reader.read(ServerSentEvent("message", msgspec.json.encode(chunk({"content": "a"}, reason))))

    assert reader.failure is None


# Unknown members that are null


class Counting(ChunkReader):
    """Counts the chunks that the fast path did not read."""

    slow = 0

    def _read_carefully(self, event: ServerSentEvent) -> Sequence[StreamItem]:
        self.slow += 1
        return super()._read_carefully(event)


def test_reader_unknown_members_that_are_null_keep_the_fast_path_and_no_extra() -> None:
    """The first chunk with such a member teaches the reader its name; a value in it is extra as ever."""
    reader = Counting(Ledger())
    payload: dict[str, Any] = {
        "prompt_token_ids": None,
        "choices": [{"delta": {"content": "a"}, "token_ids": None, "a-b": None}],
    }
    items = [
        item
        for _ in range(5)
        for item in reader.read(ServerSentEvent("message", msgspec.json.encode(payload)))
    ]

    assert reader.slow == 1
    assert [item.extra for item in items if isinstance(item, ChunkDelta)] == [UNSET] * 5

    payload["prompt_token_ids"] = [1]
    [item] = reader.read(ServerSentEvent("message", msgspec.json.encode(payload)))
    assert isinstance(item, ChunkDelta)
    assert (item.extra, reader.slow) == ({"prompt_token_ids": [1]}, 2)


def test_reader_learns_a_bounded_number_of_null_members() -> None:
    """An upstream that sends ever new names keeps the careful path."""
    reader = Counting(Ledger())
    for number in range(50):
        reader.read(ServerSentEvent("message", b'{"choices":[{"delta":{}}],"n%d":null}' % number))

    assert reader.slow == 50
    assert len(reader._nulls[0]) <= MAX_NULLS


def test_reader_null_members_do_not_prevent_merging() -> None:
    """A server that sends `"token_ids": null` with every chunk still gets its texts merged."""
    attempt = listening(coalescer=Coalescer())
    word = {"choices": [{"index": 0, "delta": {"content": "x"}, "token_ids": None, "stop_reason": None}]}
    events = [event for _ in range(50) for event in attempt.receive(data(word), NOW)]

    assert len(events) == 1
    assert attempt.held_deltas == 49


def test_reader_large_choice_index_is_kept_as_sent() -> None:
    """Some servers number tokens there."""
    assert [item.choice for item in deltas(choice(index=4711, delta={"content": "a"}))] == [4711]


# A whole completion instead of a stream

COMPLETION = {
    "id": "c",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}],
    "usage": {"total_tokens": 3},
}


def test_reader_document_of_a_completion_is_one_delta_per_choice() -> None:
    """With its members, its usage and its end."""
    ledger = Ledger()
    items = ChunkReader(ledger).read_document(msgspec.json.encode(COMPLETION))

    chunk_members = {"id": "c", "object": "chat.completion"}
    assert items == [
        ChunkDelta(0, {"role": "assistant", "content": "a"}, "stop", chunk=chunk_members),
        Done(),
    ]
    assert ledger.total_tokens == 3
    assert ChunkReader(Ledger()).read_document(msgspec.json.encode([COMPLETION])) == items


@pytest.mark.parametrize(
    "document", [b"{", b"5", b"[]", b"{}", b'{"choices":[]}', b'{"choices":[5]}', b'{"error":"m"}']
)
def test_reader_document_that_is_not_a_completion_is_none(document: bytes) -> None:
    """The attempt reads it as an error."""
    assert ChunkReader(Ledger()).read_document(document) is None


def test_reader_document_with_an_error_beside_its_choices_ends_with_the_error() -> None:
    """As a chunk does."""
    items = ChunkReader(Ledger()).read_document(msgspec.json.encode(COMPLETION | {"error": {"message": "m"}}))

    assert items is not None
    assert [type(item) for item in items] == [ChunkDelta, StreamError]


def test_reader_whole_message_in_an_event_is_its_delta() -> None:
    """Some gateways answer a streaming request with one event that holds the completion."""
    [item] = deltas(choice(message={"role": "assistant", "content": "a"}, finish_reason="stop"))

    assert (item.delta, item.finish_reason) == ({"role": "assistant", "content": "a"}, "stop")
    assert item.extra is UNSET


@pytest.mark.parametrize("message", [{"role": "assistant", "content": "ab"}, 5, "ab"])
def test_reader_whole_message_behind_deltas_is_not_their_text_again(message: Any) -> None:
    """It repeats them, or is not a message; it is kept as an unknown member."""
    first, last = deltas(choice(delta={"content": "ab"}), choice(message=message, finish_reason="stop"))

    assert (first.delta, last.delta, last.finish_reason) == ({"content": "ab"}, {}, "stop")
    assert last.extra == {"message": message}


def test_reader_whole_message_of_another_choice_is_its_delta() -> None:
    """Each choice is judged for itself."""
    other = choice(index=1, message={"content": "b"}, finish_reason="stop")

    assert [item.delta for item in deltas(choice(delta={"content": "a"}), other)] == [
        {"content": "a"},
        {"content": "b"},
    ]
