"""The content of an answer: a pure function of model and messages, so that a test knows it beforehand."""

from __future__ import annotations

import re
import zlib
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from streamworker.practice import tools
from streamworker.practice.script import DEFAULT_DELTAS, Script, ScriptError, parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Each word has broken a reader: other alphabets, joined emoji, line ends of Unicode (raw in JSON), JSON's escapes, and
# words of the protocol inside text.
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


_IDEOGRAPHS: Final = "\u3040-\u30ff\u3400-\u9fff"  # Japanese and Chinese, which put no spaces between words
_WORD: Final = re.compile(rf"[{_IDEOGRAPHS}]{{1,2}}\s*|[^\W{_IDEOGRAPHS}]+\s*|[^\w\s]+\s*|\s+")


class Piece(NamedTuple):
    """One delta that has more than a role or a finish reason. `content` and `reasoning` are its text, for the counts."""

    choice: int
    delta: dict[str, Any]
    content: str = ""
    reasoning: str = ""


def pieces(script: Script, messages: Sequence[Any], choices: int) -> Iterator[Piece]:
    """Yield all deltas in the order sent: the first one of every choice, then the second one of every choice, ..."""
    said = [_choice_pieces(script, messages, choice) for choice in range(choices)]
    return chain.from_iterable(zip(*said, strict=True))


def count(script: Script, choices: int) -> int:
    """Return the number of deltas that `pieces` yields."""
    calls = tools.count(script.speaks.calls, script.tool_calls)
    return choices * (_thoughts_count(script) + _words(script)[1] + calls)


def check(script: Script, choices: int) -> None:
    """Raise ScriptError for a fault that would never happen, because there are fewer deltas."""
    if script.fault and script.after > (deltas := count(script, choices)):
        raise ScriptError(f"option '{script.fault.value}': there are only {deltas} deltas")


def message(script: Script, messages: Sequence[Any], choice: int) -> dict[str, Any]:
    """Return the message of one choice of a whole completion."""
    whole: dict[str, Any] = {"role": "assistant", "content": "".join(_texts(script, messages, choice))}
    if script.reasoning or script.thoughts:
        whole["reasoning_content"] = "".join(_thoughts(script))
    if script.tool_calls:
        whole["tool_calls"] = [tools.tool_call(choice, number) for number in range(script.tool_calls)]
    return whole


def expected_text(model: str, messages: Sequence[Any], n: int = 1) -> list[str]:
    """Return the content of each choice of a stream without a fault. `choices=` overrides the request's `n`."""
    script = parse(model)
    how = script.speaks.content
    texts = (_texts(script, messages, choice) for choice in range(script.choices or n))
    return ["".join(_counted(how, text) for text in said) for said in texts]


def expected_usage(model: str, messages: Sequence[Any], n: int = 1) -> dict[str, Any]:
    """Return the usage of a stream without a fault: the words of the prompt, and one completion token per delta."""
    script = parse(model)
    return usage(script, prompt_tokens(messages), count(script, script.choices or n))


def expected_tool_calls(model: str, choice: int = 0) -> list[dict[str, Any]]:
    """Return the complete tool calls of one choice."""
    return [tools.tool_call(choice, number) for number in range(parse(model).tool_calls)]


def usage(script: Script, prompt: int, completion: int) -> dict[str, Any]:
    """Return a usage object. On the finish chunk, as on the seed page, it has no total."""
    shape = script.speaks
    tokens: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if shape.has_total or shape.usage != "finish":
        tokens["total_tokens"] = prompt + completion + shape.hidden_tokens
    return {**tokens, **shape.usage_members}


def prompt_tokens(messages: Sequence[Any]) -> int:
    """Return the number of words in the messages' string contents."""
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    return sum(len(content.split()) for content in contents if isinstance(content, str))


def _choice_pieces(script: Script, messages: Sequence[Any], choice: int) -> Iterator[Piece]:
    shape = script.speaks
    for thought in _thoughts(script):
        yield Piece(choice, _reasoned(shape.reasoning, thought), reasoning=thought)
    for number, text in enumerate(_texts(script, messages, choice)):
        yield Piece(choice, _said(shape.content, text, number), _counted(shape.content, text))
    for delta in tools.deltas(shape.calls, choice, script.tool_calls):
        yield Piece(choice, delta)


def _reasoned(how: str, thought: str) -> dict[str, Any]:
    match how:
        case "both":
            return {"reasoning_content": thought, "reasoning": thought}
        case "details":
            details = [{"type": "reasoning.text", "text": thought, "format": "unknown", "index": 0}]
            return {"reasoning": thought, "reasoning_details": details}
        case "parts":
            return {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": thought}]}]}
        case name:
            return {name: thought}


def _said(how: str, text: str, number: int) -> dict[str, Any]:
    match how:
        case "refusal":
            return {"refusal": text}
        case "audio":
            return {"audio": {"id": "audio_practice", "transcript": text}}
        case "parts" if number % 2 == 0:  # lists and strings in one stream
            return {"content": [{"type": "text", "text": text}]}
        case _:
            return {"content": text}


def _counted(how: str, text: str) -> str:
    return text if how in {"text", "parts"} else ""


def _thoughts(script: Script) -> Iterator[str]:
    if script.thoughts is not None:
        return iter(_split(script.thoughts))
    return (f"thought {number + 1} " for number in range(script.reasoning))


def _thoughts_count(script: Script) -> int:
    return script.reasoning if script.thoughts is None else len(_split(script.thoughts))


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
    words = _split(script.text)
    return words, len(words) if script.deltas is None else script.deltas


def _split(text: str) -> list[str]:
    return _WORD.findall(text)


def _big(text: str, size: int) -> str:
    """Return `text` extended to `size` bytes of UTF-8."""
    room = size - len(text.encode())
    return "x" * size if room < 0 else text + "x" * room
