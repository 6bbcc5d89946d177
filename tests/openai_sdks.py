"""openai-python and openai-node behind one interface: a case in, an outcome out."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import openai

from tests.node import running_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

__all__ = ["Outcome", "PythonSDK", "Sdk", "node_sdk"]


@dataclass
class Outcome:
    """What a program with the SDK gets. `texts`, `calls` and `finish` are by choice; `error` is what was raised."""

    texts: dict[str, str] = field(default_factory=dict)
    calls: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    finish: dict[str, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    streamworker: dict[str, Any] | None = None
    chunks: int = 0
    events: list[str] = field(default_factory=list)
    """The types of the events of a Responses stream."""

    error: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.texts.get("0", "")

    @property
    def error_class(self) -> str | None:
        """The name of the exception's class; None if nothing was raised."""
        return None if self.error is None else self.error["class"]

    def gather(self, choice: Any, said: Any) -> None:
        """Add a delta or a message."""
        at = str(choice.index)
        if said.content:
            self.texts[at] = self.texts.get(at, "") + said.content
        for place, call in enumerate(said.tool_calls or ()):
            index = getattr(call, "index", place)
            one = self.calls.setdefault(at, {}).setdefault(str(index), {"name": "", "arguments": ""})
            one["name"] += call.function.name or ""
            one["arguments"] += call.function.arguments or ""
        if choice.finish_reason:
            self.finish[at] = choice.finish_reason


class Sdk(Protocol):
    """A client library in its own language."""

    name: str

    async def ask(
        self,
        base_url: str,
        api_key: str,
        body: Mapping[str, Any],
        *,
        max_retries: int = 0,
        timeout_s: float = 30,
        headers: Mapping[str, str] | None = None,
        stop_after: int | None = None,
        abort_after_s: float | None = None,
    ) -> Outcome:
        """Run one chat completion, or, with `input` in the body, a streamed response of the Responses API.

        Leave the stream after `stop_after` chunks, or abort after `abort_after_s` s.
        """
        ...


class PythonSDK:
    """openai-python, in this process."""

    name = "python"

    async def ask(
        self,
        base_url: str,
        api_key: str,
        body: Mapping[str, Any],
        *,
        max_retries: int = 0,
        timeout_s: float = 30,
        headers: Mapping[str, str] | None = None,
        stop_after: int | None = None,
        abort_after_s: float | None = None,
    ) -> Outcome:
        """Run one chat completion; see `Sdk`."""
        outcome = Outcome()
        client = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key, max_retries=max_retries, timeout=timeout_s
        )
        async with client:
            try:
                async with asyncio.timeout(abort_after_s):
                    await self._ask(client, outcome, body, headers, stop_after)
            except TimeoutError:
                outcome.error = {"class": "aborted", "code": None, "status": None}
            except (openai.OpenAIError, ValueError) as error:
                code, status = getattr(error, "code", None), getattr(error, "status_code", None)
                outcome.error = {"class": type(error).__name__, "code": code, "status": status}
        return outcome

    async def _ask(
        self,
        client: openai.AsyncOpenAI,
        outcome: Outcome,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None,
        stop_after: int | None,
    ) -> None:
        if "input" in body:
            respond: Any = client.responses.create
            async for event in await respond(**body):
                outcome.events.append(event.type)
            return
        create: Any = client.chat.completions.create
        answer = await create(**body, extra_headers=dict(headers or {}))
        if not body.get("stream"):
            self._take(outcome, answer)
            return
        async with answer:
            async for chunk in answer:
                self._take(outcome, chunk)
                if outcome.chunks == stop_after:
                    return

    def _take(self, outcome: Outcome, chunk: Any) -> None:
        outcome.chunks += 1
        for choice in chunk.choices or ():
            outcome.gather(choice, choice.delta if hasattr(choice, "delta") else choice.message)
        if chunk.usage is not None:
            outcome.usage = chunk.usage.model_dump(exclude_unset=True)
        outcome.streamworker = getattr(chunk, "streamworker", None) or outcome.streamworker


class _NodeSDK:
    name = "node"

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, base_url: str, api_key: str, body: Mapping[str, Any], **options: Any) -> Outcome:
        """Run one chat completion; see `Sdk`. One at a time."""
        reads, writes = self._process.stdout, self._process.stdin
        assert reads is not None
        assert writes is not None
        case = {"base_url": base_url, "api_key": api_key, "body": body, **options}
        writes.write(json.dumps(case).encode() + b"\n")
        await writes.drain()
        line = await reads.readline()
        assert line, "node has ended"
        return Outcome(**json.loads(line))


@asynccontextmanager
async def node_sdk() -> AsyncIterator[Sdk]:
    """Yield openai-node, in a process of its own."""
    async with running_node("openai_client.cjs") as process:
        yield _NodeSDK(process)
