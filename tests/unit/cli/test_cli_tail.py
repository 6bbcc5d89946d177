"""`tail`: the text on standard output, everything else on standard error, and the exit code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from aiokafka.errors import KafkaConnectionError

from streamworker.client.ids import new_job_id
from tests.unit.cli.conftest import Events

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.memory_kafka import MemoryKafka
    from tests.unit.cli.conftest import Outcome


def test_text_of_a_job_that_has_ended_is_printed(events: Events, command: Callable[..., Outcome]) -> None:
    """The text alone is on standard output, so that it can be piped; the summary is for people."""
    events.started("other")
    events.started()
    events.delta(1, "Hello")
    events.delta(1, "noise", "other")
    events.delta(2, ", wörld")
    events.ended(3)
    ended = command("tail", "j")

    assert (ended.code, ended.out) == (0, "Hello, wörld\n")
    assert ended.err == "[completed · prompt_tokens 3, completion_tokens 2 (upstream)]\n"


@pytest.mark.parametrize("status", ["failed", "interrupted", "expired", "cancelled"])
def test_job_that_did_not_complete_exits_with_1(
    events: Events, command: Callable[..., Outcome], status: str
) -> None:
    """With the reason; what was generated is printed all the same."""
    events.started()
    events.delta(1, "Hel")
    events.ended(2, status)
    ended = command("tail", "j")

    assert (ended.code, ended.out) == (1, "Hel\n")
    assert ended.err.startswith(f"[{status} · auth: the key is wrong · prompt_tokens 3")


def test_rejected_job_has_one_event_and_no_usage(events: Events, command: Callable[..., Outcome]) -> None:
    """The summary leaves the counts out."""
    events.ended(0, "rejected", usage=None, usage_source="none")
    ended = command("tail", "j")

    assert (ended.code, ended.out, ended.err) == (1, "\n", "[rejected · auth: the key is wrong]\n")


@pytest.mark.parametrize(
    ("cause", "notice"),
    [
        ("redelivered", "[a new attempt begins: ignore the text above]"),
        ("restart", "[a new attempt begins: ignore the text above]"),
        ("new", "[the job was run again: ignore the text above]"),
    ],
)
def test_new_attempt_is_announced_on_standard_error(
    events: Events, command: Callable[..., Outcome], cause: str, notice: str
) -> None:
    """What was printed before is void; a terminal cannot take it back. Events of the old attempt are left out."""
    events.started()
    events.delta(1, "void")
    events.started(attempt="b", cause=cause)
    events.delta(2, "late", attempt="a")
    events.delta(1, "valid", attempt="b")
    events.ended(2, attempt="b")
    ended = command("tail", "j")

    assert (ended.code, ended.out) == (0, "voidvalid\n")
    assert notice in ended.err.splitlines()


def test_missing_events_are_reported(events: Events, command: Callable[..., Outcome]) -> None:
    """Retention may have deleted them: the text must not look whole."""
    events.started()
    events.delta(1, "a")
    events.delta(4, "d")
    events.ended(5)

    ended = command("tail", "j")
    assert "[events are missing: seq 4 instead of 2]" in ended.err
    assert ended.err.count("events are missing") == 1


def test_choice_is_selected(events: Events, command: Callable[..., Outcome]) -> None:
    """Only one is printed: two would be mixed token by token."""
    events.started()
    for seq, (text, choice) in enumerate([("a", 0), ("b", 1), ("c", 0)], 1):
        events.delta(seq, text, choice=choice)
    events.ended(4)

    assert command("tail", "j").out == "ac\n"
    assert command("tail", "j", "--choice", "1").out == "b\n"
    assert command("tail", "j", "--choice", "7").out == "\n"


def test_json_prints_every_valid_event_as_a_line(events: Events, command: Callable[..., Outcome]) -> None:
    """As it is in the topic: members that this version does not know are kept."""
    events.started()
    events.write("delta", 1, choice=0, delta={"content": "\u2028 ä"}, finish_reason=None, new_member=1)
    events.ended(2, "failed")
    ended = command("tail", "j", "--json")
    found = [json.loads(line) for line in ended.out.split("\n")[:-1]]

    assert ended.code == 1
    assert [event["type"] for event in found] == ["started", "delta", "usage"]
    assert (found[1]["delta"], found[1]["new_member"]) == ({"content": "\u2028 ä"}, 1)


def test_job_with_a_time_in_its_id_is_looked_for_since_then(
    events: Events, command: Callable[..., Outcome]
) -> None:
    """Reading a topic of a week from its beginning takes minutes; `--since` overrides the time."""
    job_id = new_job_id(10_000_000)
    for ts, text in ((1_000_000, "before"), (10_000_000, "after")):
        attempt = text[0]
        events.write(
            "started", 0, job_id, attempt, ts, model="m", upstream="u", cause="new", metadata={}, source=text
        )
        events.write("delta", 1, job_id, attempt, ts, choice=0, delta={"content": text}, finish_reason=None)
        events.write(
            "usage", 2, job_id, attempt, ts, status="completed", usage=None, usage_source="none", error=None
        )

    assert command("tail", job_id).out == "after\n"
    assert command("tail", job_id, "--since", "1970-01-01T00:01:00Z").out == "before\n"


def test_events_of_a_job_with_reply_to_are_in_another_topic(
    kafka: MemoryKafka, command: Callable[..., Outcome]
) -> None:
    """`--topic` names it."""
    kafka.create("replies")
    events = Events(kafka)
    events.topic = "replies"
    events.whole("j")

    assert command("tail", "j", "--topic", "replies").out == "text\n"


def test_missing_topic_or_broker_fails_at_once(kafka: MemoryKafka, command: Callable[..., Outcome]) -> None:
    """One line that names what was opened, and where."""
    ended = command("tail", "j", "--topic", "absent")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: topic absent does not exist")

    kafka.errors["start"].append(KafkaConnectionError("no route"))
    ended = command("tail", "j")
    assert ended.code == 1
    assert ended.err.startswith("error: connecting to localhost:9092")
    assert all(consumer.is_stopped for consumer in kafka.consumers)
