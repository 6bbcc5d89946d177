"""One short seed in every run of the tests; `make chaos` plays many long ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.chaos import upstream
from tests.chaos.plan import FULL, SHORT, draw
from tests.chaos.run import play

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streamworker.demo.broker import EmbeddedBroker
    from streamworker.practice import PracticeUpstream
    from tests.brokers.apache import ApacheKafka

SEED = 390  # every act once, and a kill whose session has to end


async def test_workers_that_are_killed_stopped_and_moved_break_no_promise(
    apache_kafka: ApacheKafka, practice: PracticeUpstream, topics: Callable[[str], str], tmp_path: Path
) -> None:
    """Every job ends once, in order, whole; nothing finished is paid again; no commit runs ahead."""
    outcome = await play(draw(SEED, SHORT), apache_kafka, practice, topics, tmp_path)

    assert outcome.breaches == []


async def test_upstream_that_refuses_stalls_breaks_and_dies_costs_no_job_and_no_call_too_many(
    embedded_broker: EmbeddedBroker, topics: Callable[[str], str], tmp_path: Path
) -> None:
    """Every job ends once, within policy, and the upstream's own log says that its limits were never exceeded."""
    plan = upstream.Plan(jobs=60, dies_for_s=1, streams=20, requests_per_minute=1000)
    report = await upstream.play(plan, embedded_broker, topics, tmp_path)

    assert report.breaches == []
    assert sum(report.statuses.values()) == plan.jobs
    assert report.statuses.keys() <= {"completed", "interrupted", "failed"}
    assert report.exceeded == {}
    assert report.most_calls_of_a_job <= upstream.MAX_TRIES * (1 + upstream.MAX_RESTARTS)
    assert report.answered_with["died"] > 0


def test_plan_of_a_seed_is_the_same_each_time() -> None:
    """A seed that failed can be played again."""
    assert draw(3, FULL) == draw(3, FULL)
    assert draw(3, FULL) != draw(4, FULL)
