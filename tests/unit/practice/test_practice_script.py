import re
from collections.abc import Iterable

import pytest

from streamworker.practice import ScriptError
from streamworker.practice import script as grammar
from streamworker.practice.errors import ERRORS
from streamworker.practice.events import DONES, FORMATS, KEEPALIVES
from streamworker.practice.script import NO_ANSWERS, Fault, Script, parse
from streamworker.practice.shapes import CALLS, CONTENTS, REASONINGS, SHAPES, USAGES


def test_model_without_options_has_every_default() -> None:
    assert parse("apertus-70b-instruct") == Script(name="apertus-70b-instruct")


def test_options_are_percent_decoded_and_converted() -> None:
    script = parse("p?text=Ciao%20%F0%9F%90%9F&deltas=3&pace_ms=0.5&no_done&choices=2")
    assert script == Script(name="p", text="Ciao 🐟", deltas=3, pace_ms=0.5, no_done=True, choices=2)


def test_bare_reasoning_and_tool_calls_have_their_default_counts() -> None:
    assert parse("p?reasoning&tool_calls") == Script(name="p", reasoning=3, tool_calls=1)


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_is_an_option_that_takes_a_count(fault: Fault) -> None:
    script = parse(f"p?{fault.value}=4")
    assert (script.fault, script.after) == (fault, 4)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("p?pace=20", "unknown option 'pace'"),
        ("p?fault=stall_after", "unknown option 'fault'"),
        ("p?name=x", "unknown option 'name'"),
        ("p?deltas=1&deltas=2", "'deltas' is given twice"),
        ("p?deltas=+5", "'deltas'"),
        ("p?deltas=1_000", "'deltas'"),
        ("p?deltas=١٢", "'deltas'"),
        ("p?deltas=", "'deltas'"),
        ("p?choices=0", "'choices'"),
        ("p?pace_ms=-1", "'pace_ms'"),
        ("p?pace_ms=nan", "'pace_ms'"),
        ("p?format=lf", "'format'"),
        ("p?no_done=no", "'no_done'"),
        ("p?shape=gpt", "'shape'"),
        ("p?usage=somewhere", "'usage'"),
        ("p?keepalive=loud", "'keepalive'"),
        ("p?error=none", "'error'"),
        ("p?status=200", "'status'"),
        ("p?status=429&retry_after_date=soon", "'retry_after_date'"),
        ("p?status=429&retry_after_date=5&retry_after=5", "same header"),
        ("p?should_retry=true", "need status"),
        ("p?code=x", "code needs"),
        ("p?break_after=1&code=x", "code needs"),
        ("p?framing=length&keepalive=bare", "framing=length"),
        ("p?framing=length&shape=deepseek", "framing=length"),
        ("p?framing=length&encoding=gzip", "framing=length"),
        ("p?no_answer=close&html200", "only one fault is allowed: no_answer, html200"),
        ("p?status=429&retry_after=2%0d%0ax:y", "'retry_after'"),
        ("p?retry_after=2", "need status"),
        ("p?break_after=1&status=500", "only one fault is allowed: break_after, status"),
        ("p?stall_after=1&close_after=1", "only one fault is allowed: stall_after, close_after"),
        ("p?text=", "'text'"),
        ("?deltas=1", "no base name"),
        ("", "no base name"),
    ],
)
def test_invalid_option_is_refused_with_its_name(model: str, named: str) -> None:
    with pytest.raises(ScriptError, match=named):
        parse(model)


def test_several_invalid_options_are_all_named() -> None:
    with pytest.raises(ScriptError, match=r"'pace'.*'deltas'"):
        parse("p?pace=1&deltas=x")


def test_documentation_names_every_option_and_no_other() -> None:
    """The docstring is the help text of the command."""
    told = set(re.findall(r"^    ([a-z_0-9]+)(?:\[?=[A-Z\]]+| )", grammar.__doc__ or "", re.MULTILINE))

    assert told - {"option"} == set(grammar._OPTIONS)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("shape", SHAPES),
        ("usage", USAGES),
        ("content_as", CONTENTS),
        ("reasoning_as", REASONINGS),
        ("calls_as", CALLS),
        ("keepalive", KEEPALIVES),
        ("done", DONES),
        ("format", FORMATS),
        ("no_answer", NO_ANSWERS),
        ("error", ERRORS),
    ],
)
def test_documentation_names_every_value(option: str, values: Iterable[str]) -> None:
    """The lines of an option name each of its values."""
    text = grammar.__doc__ or ""
    told = re.split(r"\n    (?=[a-z=])", text[text.index(f"\n    {option}=") + 1 :])[0]

    assert [value for value in values if not re.search(rf"\b{value}\b", told.replace("-\n", ""))] == []


@pytest.mark.parametrize("shape", SHAPES)
def test_option_set_separately_overrides_the_shape(shape: str) -> None:
    speaks = parse(f"p?shape={shape}&usage=none&content_as=parts&calls_as=whole&keepalive=data").speaks

    assert (speaks.usage, speaks.content, speaks.calls, speaks.keepalive) == (
        "none",
        "parts",
        "whole",
        "data",
    )
    assert (speaks.id, speaks.ends) == (SHAPES[shape].id, SHAPES[shape].ends)
