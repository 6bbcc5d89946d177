"""Answer one call as its script says: not at all, with an error, a whole completion, or a stream."""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import TYPE_CHECKING

from streamworker.practice.completion import completion
from streamworker.practice.errors import HTML, JSON, body
from streamworker.practice.request import error_kind
from streamworker.practice.stream import Player, words

if TYPE_CHECKING:
    from streamworker.practice.calls import Call, Outcome
    from streamworker.practice.moves import Answer
    from streamworker.practice.peer import Peer
    from streamworker.practice.script import Script


async def give(peer: Peer, call: Call, answer: Answer) -> Outcome:
    """Answer the call; return how it ended.

    Raises:
        ClientGoneError: the client closed or reset the connection.
    """
    script = answer.script
    await peer.pause(script.slow_headers_ms / 1000)
    if script.no_answer is not None:
        return await _no_answer(peer, script.no_answer)
    call.status = script.status or 200
    if script.status is not None or script.error200:
        said = words(script.code, call.status)._replace(kind=error_kind(call.status))
        kind, text = body(script.error, said._replace(message=f"{said.message} Status {call.status}."))
        await peer.reply(call.status, JSON if script.error200 else kind, text, _headers(script))
        return "fault"
    if script.html200:
        await peer.reply(200, "text/html; charset=utf-8", HTML)
        return "fault"
    if answer.chat.stream and not script.json200:
        return await Player(peer, call, answer).play()
    await peer.reply_json(200, completion(answer, call))
    return "fault" if script.json200 else "completed"


async def _no_answer(peer: Peer, how: str) -> Outcome:
    match how:
        case "reset":
            peer.reset()
        case "stall":
            await peer.pause(None)
        case "half":
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-ty")
        case "garbage":
            await peer.send(b"220 practice.example ESMTP\r\n\r\n")
    return "fault"


def _headers(script: Script) -> list[tuple[str, str]]:
    date = script.retry_after_date
    given = {
        "retry-after": script.retry_after if date is None else formatdate(time.time() + date, usegmt=True),
        "retry-after-ms": script.retry_after_ms,
        "x-should-retry": script.should_retry,
    }
    return [(name, value) for name, value in given.items() if value is not None]
