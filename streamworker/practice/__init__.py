"""A practice upstream: an OpenAI-compatible server whose behaviour the model name selects (see `script`)."""

from streamworker.practice.calls import Call, Outcome, Sent
from streamworker.practice.limits import Limits, Mishaps
from streamworker.practice.script import ScriptError
from streamworker.practice.server import PracticeUpstream, serve
from streamworker.practice.text import expected_text, expected_tool_calls, expected_usage

__all__ = [
    "Call",
    "Limits",
    "Mishaps",
    "Outcome",
    "PracticeUpstream",
    "ScriptError",
    "Sent",
    "expected_text",
    "expected_tool_calls",
    "expected_usage",
    "serve",
]
