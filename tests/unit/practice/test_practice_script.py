import pytest

from streamworker.practice import ScriptError
from streamworker.practice.script import Fault, Script, parse


def test_base_name_alone_has_every_default() -> None:
    assert parse("apertus-70b-instruct") == Script(name="apertus-70b-instruct")


def test_options_are_percent_decoded_and_converted() -> None:
    script = parse("p?text=Ciao%20%F0%9F%90%9F&deltas=3&pace_ms=0.5&no_done&choices=2")
    assert script == Script(name="p", text="Ciao 🐟", deltas=3, pace_ms=0.5, no_done=True, choices=2)


def test_bare_reasoning_and_tool_calls_take_their_counts() -> None:
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
        ("p?status=200", "'status'"),
        ("p?status=429&retry_after=2%0d%0ax:y", "'retry_after'"),
        ("p?retry_after=2", "need status"),
        ("p?break_after=1&status=500", "only one thing can go wrong: break_after, status"),
        ("p?stall_after=1&close_after=1", "only one thing can go wrong: stall_after, close_after"),
        ("p?text=", "'text'"),
        ("?deltas=1", "no base name"),
        ("", "no base name"),
    ],
)
def test_what_cannot_be_played_is_refused_by_name(model: str, named: str) -> None:
    with pytest.raises(ScriptError, match=named):
        parse(model)


def test_every_option_at_fault_is_named_at_once() -> None:
    with pytest.raises(ScriptError, match=r"'pace'.*'deltas'"):
        parse("p?pace=1&deltas=x")
