"""A stream of a completion adds up to the completion, in any shape, chunking and order."""

from __future__ import annotations

import warnings
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from streamworker.practice.calls import Call
from streamworker.practice.completion import completion as practice_completion
from streamworker.practice.moves import Answer, Moves
from streamworker.practice.request import ChatRequest
from streamworker.practice.script import parse
from streamworker.practice.shapes import CALLS, CONTENTS, REASONINGS, SHAPES, USAGES
from streamworker.practice.text import pieces as practice_pieces
from streamworker.stream.completion import CompletionAssembler
from streamworker.wire.json import encode, replace_surrogates
from tests.completions import completed, events_of, fed_live, of_stream, read_back
from tests.properties.strategies import CHAT_STREAMS, CHUNK_LIKE, CUTS, JSON, pieces_of
from tests.streams import NOW, chunk, data, play

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MESSAGES = [{"role": "user", "content": "Count from 1 to 10."}]
KNOWN_REASONS = {"stop", "length", "tool_calls", "content_filter", "function_call"}


# The practice upstream's answers, streamed and whole.


def answer_to(model: str) -> Answer:
    """Return the practice upstream's answer to a call."""
    script = parse(model)
    chat = ChatRequest(model=model, messages=MESSAGES, stream=True, choices=1, include_usage=True)
    return Answer(answer_id="chatcmpl-1", script=script, chat=chat, choices=script.choices or 1)


def body_of(answer: Answer) -> bytes:
    """Return the bytes of its event stream."""
    moves = Moves(answer)
    return moves.events.start + b"".join(
        move.data for move in chain(moves.opening(), moves.pieces(), moves.closing())
    )


def whole_of(answer: Answer) -> dict[str, Any]:
    """Return its answer to the same call without `stream`, changed where a stream of its shape has other values."""
    script, shape = answer.script, answer.script.speaks
    call = Call(path="/v1/chat/completions", headers={}, started_at=0, content_limit=0)
    whole = practice_completion(answer, call)
    whole["id"] = {"empty": "chatcmpl-a-1", "each": f"{whole['id']}-1"}.get(shape.id, whole["id"])
    whole["created"] = shape.chunk.get("created") or NOW // 1000
    usage = whole.setdefault("usage", None)
    if usage is not None:
        usage.setdefault("total_tokens", usage["prompt_tokens"] + usage["completion_tokens"])
    for choice in whole["choices"]:
        choice["logprobs"] = _logprobs_of(answer, choice["index"]) if script.logprobs else None
        _shaped(choice["message"], answer)
    return whole


def _shaped(message: dict[str, Any], answer: Answer) -> None:
    shape = answer.script.speaks
    content = message.pop("content")
    message |= {"content": None, "refusal": None}
    if shape.content == "audio" and content:
        message["audio"] = {"id": "audio_practice", "expires_at": 0, "data": "", "transcript": content}
    elif shape.content == "refusal":
        message["refusal"] = content
    else:
        message["content"] = content
    if shape.reasoning == "details" and "reasoning_content" in message:
        text = message["reasoning_content"]
        message["reasoning_details"] = [
            {"type": "reasoning.text", "text": text, "format": "unknown", "index": 0}
        ]
    calls = message.get("tool_calls", [])
    for call in calls:
        function = call["function"]
        if shape.calls == "no_name":
            function["name"] = ""
        if shape.calls == "custom":
            del call["function"]
            call |= {"type": "custom", "custom": {"name": function["name"], "input": function["arguments"]}}
    if shape.calls == "function_call" and calls:
        message["function_call"] = message.pop("tool_calls")[0]["function"]


def _logprobs_of(answer: Answer, choice: int) -> dict[str, Any] | None:
    texts = [
        piece.content
        for piece in practice_pieces(answer.script, MESSAGES, answer.choices)
        if piece.choice == choice and piece.content
    ]
    content = [
        {"token": text, "logprob": -0.25, "bytes": list(text.encode()), "top_logprobs": []} for text in texts
    ]
    return {"content": content, "refusal": None} if content else None


def essence(completion: dict[str, Any]) -> dict[str, Any]:
    """Leave out members that only a stream has, and whether an empty text is null: streams differ in that."""
    members = ("id", "object", "created", "model", "usage")
    essence: dict[str, Any] = {name: completion[name] for name in members}
    choices: list[dict[str, Any]] = []
    for choice in completion["choices"]:
        told = {name: choice[name] for name in ("index", "logprobs", "finish_reason")}
        texts = {name: choice["message"][name] or None for name in ("content", "refusal")}
        choices.append(told | {"message": choice["message"] | texts})
    return essence | {"choices": choices}


@st.composite
def models(draw: st.DrawFn, /, **given: st.SearchStrategy[Any]) -> str:
    """Draw the name of a practice model."""
    options: dict[str, st.SearchStrategy[Any]] = {
        "shape": st.sampled_from(sorted(SHAPES)),
        "deltas": st.integers(0, 6),
        "choices": st.integers(1, 3),
        "reasoning": st.integers(0, 2),
        "tool_calls": st.integers(0, 3),
        "content_as": st.none() | st.sampled_from(CONTENTS),
        "reasoning_as": st.none() | st.sampled_from(REASONINGS),
        "calls_as": st.none() | st.sampled_from(CALLS),
        "usage": st.none() | st.sampled_from(USAGES),
        "logprobs": st.sampled_from([None, "1"]),
        "packed": st.sampled_from([None, "1"]),
        **given,
    }
    drawn = {name: draw(strategy) for name, strategy in options.items()}
    if drawn["calls_as"] == "function_call":  # there is one at most
        drawn["tool_calls"] = min(drawn["tool_calls"], 1)
    return "practice?" + "&".join(f"{name}={value}" for name, value in drawn.items() if value is not None)


@given(models(), CUTS)
def test_practice_stream_adds_up_to_the_answer_without_stream(model: str, cuts: list[int]) -> None:
    """For every shape and every way to cut the bytes, fed by the worker or by a reader."""
    answer = answer_to(model)

    assert essence(of_stream(pieces_of(body_of(answer), cuts))) == essence(whole_of(answer))


@given(models(choices=st.integers(2, 3), packed=st.none()), st.data())
def test_practice_choices_do_not_depend_on_how_they_alternate(model: str, drawn: st.DataObject) -> None:
    """Each choice has its own deltas in their order; those of others may stand anywhere between them."""
    played = play(body_of(answer_to(model)))
    queues = {event.choice: [e for e in played.deltas if e.choice == event.choice] for event in played.deltas}
    order = drawn.draw(st.permutations([event.choice for event in played.deltas]))
    shuffled = played._replace(deltas=[queues[choice].pop(0) for choice in order])

    assert completed(fed_live(shuffled))["choices"] == completed(fed_live(played))["choices"]


@given(models(), CUTS)
def test_practice_stream_passes_strict_validation_by_openai(model: str, cuts: list[int]) -> None:
    """In every shape. A choice without a finish reason is not valid in OpenAI's types."""
    completion = of_stream(pieces_of(body_of(answer_to(model)), cuts))

    for choice in completion["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        assert choice["finish_reason"] in KNOWN_REASONS

    ChatCompletion.model_validate(completion, strict=True)
    ChatCompletion.model_validate_json(encode(completion), strict=True)


_SAFE = SHAPES["azure"].choice["content_filter_results"]
EXTRAS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "openai": ({"moderation": SHAPES["openai"].closing[0]["moderation"]}, {}),
    "azure": (
        {"prompt_filter_results": SHAPES["azure"].opening[0]["prompt_filter_results"]},
        {
            "content_filter_results": _SAFE,
            "content_filter_offsets": SHAPES["azure"].closing[0]["choices"][0]["content_filter_offsets"],
        },
    ),
    "sglang": ({}, {"matched_stop": 2}),
    "llamacpp": ({"timings": SHAPES["llamacpp"].last_chunk["timings"]}, {}),
    "openrouter": ({"provider": "Practice"}, {"native_finish_reason": "end_turn"}),
    "fireworks": ({"perf_metrics": {"prompt-tokens": 5}}, {}),
    "cerebras": ({"time_info": SHAPES["cerebras"].last_chunk["time_info"]}, {}),
    "perplexity": ({"citations": ["https://example.com/"], "search_results": []}, {}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_practice_members_of_an_upstreams_own_are_kept_where_they_came(shape: str) -> None:
    """On the completion or the choice; one that was null throughout is absent."""
    completion = of_stream(body_of(answer_to(f"practice?shape={shape}&deltas=3")))
    [choice] = completion["choices"]
    own = completion.keys() - {"id", "object", "created", "model", "choices", "usage"}
    own -= {"system_fingerprint", "service_tier"}
    of_choice = choice.keys() - {"index", "message", "logprobs", "finish_reason"}
    found = ({name: completion[name] for name in own}, {name: choice[name] for name in of_choice})
    expected = EXTRAS.get(shape, ({}, {}))
    if shape == "groq":
        expected = ({"x_groq": {"id": "req_practice", "usage": completion["usage"]}}, {})
    if shape == "together":  # each choice repeats the text of its delta: the last one is kept
        expected = ({}, {"seed": 4, "text": choice["text"]})
        assert choice["message"]["content"].endswith(choice["text"])

    assert found == expected


# Completions of any content, as the API's owner streams them.

_TEXTS = st.none() | st.text(max_size=30)
_CALL = st.tuples(st.text(min_size=1, max_size=5), st.text(max_size=20))


@st.composite
def choices(draw: st.DrawFn, index: int) -> dict[str, Any]:
    """Draw a choice."""
    message: dict[str, Any] = {"role": "assistant", "content": draw(_TEXTS), "refusal": draw(_TEXTS)}
    if reasoning := draw(_TEXTS):
        message["reasoning_content"] = reasoning
    if calls := draw(st.lists(_CALL, max_size=3)):
        message["tool_calls"] = [
            {
                "id": f"call_{index}_{at}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for at, (name, arguments) in enumerate(calls)
        ]
    if annotations := draw(st.lists(st.integers(), max_size=3, unique=True)):
        message["annotations"] = [{"type": "url_citation", "at": at} for at in annotations]
    logprobs = draw(st.lists(st.sampled_from(["a", "b"]), max_size=4))
    finish_reason = draw(st.sampled_from(["stop", "length"]))
    tokens = {"content": [{"token": token} for token in logprobs], "refusal": None} if logprobs else None
    return {"index": index, "message": message, "logprobs": tokens, "finish_reason": finish_reason}


COMPLETIONS = (
    st.integers(1, 3)
    .flatmap(lambda n: st.tuples(*map(choices, range(n))))
    .map(
        lambda told: {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": list(told),
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        }
    )
)


def merged_at_random(drawn: st.DataObject, queues: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """Draw an order of all items in which each queue keeps its own."""
    waiting = [list(reversed(queue)) for queue in queues]
    order = drawn.draw(st.permutations([at for at, queue in enumerate(queues) for _ in queue]))
    return (waiting[at].pop() for at in order)


def deltas_of(drawn: st.DataObject, choice: dict[str, Any]) -> list[dict[str, Any]]:
    """Cut a choice into deltas; the parts of one member keep their order."""

    def cut(text: str | None) -> list[str]:
        if text is None:
            return []
        cuts = drawn.draw(st.lists(st.integers(1, 30), max_size=3))
        places = [0, *sorted({place for place in cuts if place < len(text)}), len(text)]
        return [text[start:end] for start, end in pairwise(places)]

    message = choice["message"]
    texts = ("content", "refusal", "reasoning_content")
    queues: list[list[dict[str, Any]]] = [
        [{"delta": {name: part}} for part in cut(message.get(name))] for name in texts
    ]
    calls = []
    for index, call in enumerate(message.get("tool_calls", ())):
        first = call | {"index": index, "function": call["function"] | {"arguments": ""}}
        parts = [
            {"index": index, "function": {"arguments": part}} for part in cut(call["function"]["arguments"])
        ]
        calls.append([{"delta": {"tool_calls": [fragment]}} for fragment in (first, *parts)])
    if calls:  # calls are opened in their order
        firsts = [queue.pop(0) for queue in calls]
        queues.append([*firsts, *merged_at_random(drawn, calls)])
    queues.append([{"delta": {"annotations": [one]}} for one in message.get("annotations", ())])
    queues.append(
        [
            {"delta": {}, "logprobs": {"content": [token], "refusal": None}}
            for token in (choice["logprobs"] or {}).get("content", ())
        ]
    )
    told = [{"delta": {"role": "assistant"}}, *merged_at_random(drawn, queues)]
    return [*told, {"delta": {}, "finish_reason": choice["finish_reason"]}]


@given(COMPLETIONS, st.data())
def test_stream_of_any_completion_adds_up_to_it(completion: dict[str, Any], drawn: st.DataObject) -> None:
    """However its texts are cut, and however choices, calls and members alternate."""
    told = [
        [{"index": choice["index"]} | delta for delta in deltas_of(drawn, choice)]
        for choice in completion["choices"]
    ]
    chunks = [chunk(choices=[delta]) for delta in merged_at_random(drawn, told)]
    body = data(*chunks, chunk(choices=[], usage=completion["usage"]), b"[DONE]")

    assert of_stream(pieces_of(body, drawn.draw(CUTS))) == completion


# Any JSON.

DELTA_MEMBERS = [
    *("role", "content", "refusal", "reasoning", "reasoning_content", "reasoning_details"),
    *("tool_calls", "function_call", "audio", "annotations", "x"),
]
EVENTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["started", "delta", "delta", "delta", "usage"])},
    optional={
        "choice": st.integers(0, 1) | JSON,
        "delta": st.dictionaries(
            st.sampled_from(DELTA_MEMBERS),
            CHUNK_LIKE,
        )
        | CHUNK_LIKE,
        "finish_reason": st.sampled_from([None, "stop"]) | JSON,
        "logprobs": CHUNK_LIKE,
        "chunk": CHUNK_LIKE,
        "extra": CHUNK_LIKE,
        "attempt": st.just("a") | JSON,
        "model": st.just("m") | JSON,
        "ts": st.integers() | JSON,
        "finish_reasons": st.just({"0": "stop"}) | JSON,
        "usage": st.just({"prompt_tokens": 1, "completion_tokens": 2}) | JSON,
        "usage_source": st.sampled_from(["upstream", "estimated"]) | JSON,
    },
)


@given(st.lists(EVENTS, max_size=12))
def test_assembler_takes_any_json_and_gives_a_completion_of_stable_types(
    events: list[dict[str, Any]],
) -> None:
    """For any members of an event. The counted size is at most the result's."""
    assembler = CompletionAssembler(limit_bytes=1 << 30)
    for event in events:
        assembler.read(event)
        completion = assembler.completion()
        if completion is None:
            continue
        written = encode(completion)
        assert assembler._size <= len(written)
        assert msgspec.json.decode(written) == replace_surrogates(completion)
        assert encode(assembler.completion(msgspec.Raw)) == written
        for choice in completion["choices"]:
            message = choice["message"]
            assert isinstance(message["content"], str | None)
            assert isinstance(message["refusal"], str | None)
            assert isinstance(message.get("reasoning_content"), str | None)
            for call in message.get("tool_calls", ()):
                assert isinstance(call["id"], str)
                assert isinstance(call["type"], str)


@given(CHAT_STREAMS, CUTS)
def test_assembler_gives_a_reader_what_it_gives_the_worker(stream: bytes, cuts: list[int]) -> None:
    """For every stream, also for broken ones."""
    played = play(pieces_of(stream, cuts))

    assert read_back(events_of(played)).completion() == fed_live(played).completion()


@given(models(), st.integers(0, 4_000))
def test_assembler_omits_what_does_not_fit_and_nothing_that_does(model: str, limit: int) -> None:
    """First the log probabilities, then everything; the rest is as without a limit."""
    played = play(body_of(answer_to(model)))
    whole, bounded = completed(fed_live(played)), fed_live(played, limit)
    bare = whole | {"choices": [choice | {"logprobs": None} for choice in whole["choices"]]}
    expected = {(): whole, ("logprobs",): bare, ("completion",): None, ("logprobs", "completion"): None}

    assert bounded.completion() == expected[tuple(bounded.omitted)]
    if len(encode(whole)) <= limit:
        assert bounded.omitted == []
    if len(encode(bare)) <= limit:
        assert bounded.completion() is not None


# The SDK's own accumulator, where it is right.


def sdk_choices(body: bytes) -> list[dict[str, Any]]:
    """Let the SDK put the chunks of a body together; return its choices in the form of `_plain`."""
    state = ChatCompletionStreamState()
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line.startswith(b"data: {")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pydantic's, about lists where its type has strings
        for line in lines:
            state.handle_chunk(ChatCompletionChunk.construct(**msgspec.json.decode(line)))
        snapshot = state.current_completion_snapshot.model_dump(exclude_unset=True)
    return [_plain(choice) for choice in snapshot["choices"]]


def _plain(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    bodies = ("function", "custom")
    calls = [
        {name: call.get(name) for name in ("id", "type")}
        | {
            name: {key: value for key, value in call[name].items() if key != "parsed_arguments"}
            for name in bodies
            if call.get(name) is not None
        }
        for call in message.get("tool_calls") or ()
    ]
    return {
        "role": message.get("role"),
        "content": message.get("content") or None,
        "refusal": message.get("refusal") or None,
        "reasoning": reasoning or None,
        "function_call": message.get("function_call"),
        "tool_calls": calls,
        "logprobs": choice.get("logprobs"),
        "finish_reason": choice.get("finish_reason"),
    }


SCENARIOS: dict[str, str] = {
    **{f"shape {name}": f"shape={name}&deltas=3&reasoning=2" for name in SHAPES},
    **{
        f"calls {name}": f"deltas=1&tool_calls=2&calls_as={name}" for name in CALLS if name != "function_call"
    },
    "calls function_call": "deltas=1&tool_calls=1&calls_as=function_call",
    **{f"content {name}": f"deltas=3&content_as={name}" for name in CONTENTS},
    **{f"reasoning {name}": f"deltas=2&reasoning=2&reasoning_as={name}" for name in REASONINGS},
    "choices one by one": "shape=openai&deltas=3&choices=3",
    "choices in one chunk": "shape=openai&deltas=3&choices=3&packed",
    "choices in one chunk each with the role": "shape=ollama&deltas=3&choices=2&packed",
    "logprobs": "shape=openai&deltas=3&logprobs",
}
ROLE = ({"role"}, "it concatenates the role: assistantassistant")
SDK_IS_WRONG: dict[str, tuple[type[Exception] | set[str], str]] = {
    "shape ollama": ROLE,
    "shape tgi": ROLE,
    "shape openrouter": ROLE,
    "shape together": ROLE,
    "shape perplexity": ROLE,
    "choices in one chunk each with the role": ROLE,
    "shape azure": (AttributeError, "it needs a delta in every choice"),
    "shape gemini": (TypeError, "it needs an index in every choice"),
    "shape mistral": ({"content", "reasoning"}, "it drops lists of parts between strings"),
    "content parts": (RuntimeError, "it needs an index in every part"),
    "reasoning parts": (RuntimeError, "it needs an index in every part"),
    "calls no_index": (TypeError, "it needs an index in every fragment"),
    "calls sparse": (IndexError, "it takes the index for a position"),
    "calls zero_index": ({"tool_calls"}, "it merges two calls of one index, and concatenates ids and names"),
    "calls repeated": ({"tool_calls"}, "it concatenates ids and names that are repeated"),
    "calls no_type": ({"tool_calls"}, "it leaves the type null, which its own type refuses"),
    "calls no_name": ({"tool_calls"}, "it leaves the name null, which its own type refuses"),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_sdk_agrees_where_it_is_right(scenario: str) -> None:
    """Where it is not, it fails in the way that the table names."""
    body = body_of(answer_to(f"practice?{SCENARIOS[scenario]}"))
    ours = [_plain(choice) for choice in of_stream(body)["choices"]]
    wrong, _ = SDK_IS_WRONG.get(scenario, (set(), ""))

    if not isinstance(wrong, set):
        with pytest.raises(wrong):
            sdk_choices(body)
        return
    pairs = zip(sdk_choices(body), ours, strict=True)
    assert {name for theirs, our in pairs for name in our if theirs[name] != our[name]} == wrong


def test_sdk_merges_two_calls_that_the_assembler_separates() -> None:
    """The SDK returns one call with the arguments of two."""
    body = body_of(answer_to("practice?deltas=0&tool_calls=2&calls_as=zero_index"))
    [theirs], [ours] = sdk_choices(body), of_stream(body)["choices"]

    assert len(theirs["tool_calls"]) == 1
    assert [call["function"]["name"] for call in ours["message"]["tool_calls"]] == ["look_up", "look_up"]
