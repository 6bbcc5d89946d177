"""What a script says: a pure function of model and messages, so that a test can know the answer beforehand."""

from __future__ import annotations

import re
import zlib
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from streamworker.practice.script import DEFAULT_DELTAS, Script, ScriptError, parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Each word is here because some reader once broke on it: other alphabets, joined emoji, the line ends that
# only Unicode knows (raw in JSON), JSON's own escapes, and the protocol's words inside text.
WORDS: Final = (
    "one",
    "due",
    "τρία",
    "четыре",
    "五",
    "ستة",
    "सात",
    "🐟",
    "👩\u200d🚀",
    "line\u2028separator",
    "next\u0085line",
    'quo"ted',
    "back\\slash",
    "new\nline",
    "[DONE]",
    "data: {}",
)


class Piece(NamedTuple):
    """One delta but for the role: `text` is set for content only."""

    choice: int
    delta: bytes
    text: str | None


def pieces(script: Script, messages: Sequence[Any], choices: int) -> Iterator[Piece]:
    """All deltas in the order sent: every choice says its first, then every choice its second, ..."""
    said = [_choice_pieces(script, messages, choice) for choice in range(choices)]
    return chain.from_iterable(zip(*said, strict=True))


def count(script: Script, choices: int) -> int:
    """How many deltas `pieces` gives."""
    calls = script.tool_calls * (1 + len(_ARGUMENT_CUTS))
    return choices * (script.reasoning + _words(script)[1] + calls)


def check(script: Script, choices: int) -> None:
    """Raise ScriptError for a fault that would never come: it lies behind the last delta."""
    if script.fault and script.after > (deltas := count(script, choices)):
        raise ScriptError(f"option '{script.fault.value}': there are only {deltas} deltas")


def message(script: Script, messages: Sequence[Any], choice: int) -> dict[str, Any]:
    """One choice put together, as a whole completion has it."""
    whole: dict[str, Any] = {"role": "assistant", "content": "".join(_texts(script, messages, choice))}
    if script.reasoning:
        whole["reasoning_content"] = "".join(_thoughts(script))
    if script.tool_calls:
        whole["tool_calls"] = [_tool_call(choice, number) for number in range(script.tool_calls)]
    return whole


def expected_text(model: str, messages: Sequence[Any], n: int = 1) -> list[str]:
    """The content of each choice of a stream that goes well; `n` is the request's, `choices=` overrules it."""
    script = parse(model)
    return ["".join(_texts(script, messages, choice)) for choice in range(script.choices or n)]


def expected_usage(model: str, messages: Sequence[Any], n: int = 1) -> dict[str, int]:
    """The usage of a stream that goes well: prompt words, and one completion token per delta."""
    script = parse(model)
    return usage(script, prompt_tokens(messages), count(script, script.choices or n))


def expected_tool_calls(model: str, choice: int = 0) -> list[dict[str, Any]]:
    """The tool calls of one choice, put together."""
    return [_tool_call(choice, number) for number in range(parse(model).tool_calls)]


def usage(script: Script, prompt: int, completion: int) -> dict[str, int]:
    """A usage object; the seed's, on the finish chunk, has no total."""
    tokens = {"prompt_tokens": prompt, "completion_tokens": completion}
    return tokens if script.usage == "finish" else tokens | {"total_tokens": prompt + completion}


def prompt_tokens(messages: Sequence[Any]) -> int:
    """Words in the messages' string contents."""
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    return sum(len(content.split()) for content in contents if isinstance(content, str))


def _choice_pieces(script: Script, messages: Sequence[Any], choice: int) -> Iterator[Piece]:
    for thought in _thoughts(script):
        yield Piece(choice, orjson.dumps({"reasoning_content": thought}), None)
    for text in _texts(script, messages, choice):
        yield Piece(choice, b'{"content":' + orjson.dumps(text) + b"}", text)
    for number in range(script.tool_calls):
        for delta in _fragments(choice, number):
            yield Piece(choice, orjson.dumps({"tool_calls": [delta]}), None)


def _thoughts(script: Script) -> Iterator[str]:
    return (f"thought {number + 1} " for number in range(script.reasoning))


def _texts(script: Script, messages: Sequence[Any], choice: int) -> Iterator[str]:
    words, deltas = _words(script)
    first = 0 if script.text else zlib.crc32(orjson.dumps(messages)) + choice
    for number in range(deltas):
        word = words[(first + number) % len(words)]
        text = word if script.text else f"{number + 1} {word} "
        yield _big(text, script.big_delta) if script.big_delta and number == 0 else text


def _words(script: Script) -> tuple[Sequence[str], int]:
    if script.text is None:
        return WORDS, DEFAULT_DELTAS if script.deltas is None else script.deltas
    words = re.findall(r"\w+\s*|[^\w\s]+\s*|\s+", script.text)
    return words, len(words) if script.deltas is None else script.deltas


def _big(text: str, size: int) -> str:
    """`text` filled up to `size` bytes of UTF-8."""
    room = size - len(text.encode())
    return "x" * size if room < 0 else text + "x" * room


_ARGUMENT_CUTS: Final = ((0, 1), (1, 14), (14, None))  # a first `{`, a cut inside a string, the rest


def _tool_call(choice: int, number: int) -> dict[str, Any]:
    arguments = f'{{"place":"Zürich 🐟","number":{number}}}'
    function = {"name": "look_up", "arguments": arguments}
    return {"id": f"call_{choice}_{number}", "type": "function", "function": function}


def _fragments(choice: int, number: int) -> Iterator[dict[str, Any]]:
    call = _tool_call(choice, number)
    function = call["function"]
    yield {"index": number, **call, "function": {**function, "arguments": ""}}
    for start, end in _ARGUMENT_CUTS:
        yield {"index": number, "function": {"arguments": function["arguments"][start:end]}}
