"""One short seed in `make test-long`; `make chaos` runs many long ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.chaos import upstream
from tests.chaos.plan import FULL, SHORT, draw
from tests.chaos.run import play

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streamworker.demo.broker import EmbeddedBroker
    from streamworker.practice import PracticeUpstream
    from tests.brokers.apache import ApacheKafka

SEED = 390  # has every act once, and a kill whose session must expire


@pytest.mark.long
async def test_chaos_of_workers_breaks_no_guarantee(
    apache_kafka: ApacheKafka, practice: PracticeUpstream, topics: Callable[[str], str], tmp_path: Path
) -> None:
    """Every job ends once, with all events in order; no finished job is called again; no commit passes an open job."""
    outcome = await play(draw(SEED, SHORT), apache_kafka, practice, topics, tmp_path)

    assert outcome.breaches == []


@pytest.mark.long
async def test_chaos_of_the_upstream_loses_no_job_and_exceeds_no_limit(
    embedded_broker: EmbeddedBroker, topics: Callable[[str], str], tmp_path: Path
) -> None:
    """Every job ends once with calls within its policy, and the upstream's log shows that its limits were respected."""
    plan = upstream.Plan(jobs=60, dies_for_s=1, streams=20, requests_per_minute=1000)
    report = await upstream.play(plan, embedded_broker, topics, tmp_path)

    assert report.breaches == []
    assert sum(report.statuses.values()) == plan.jobs
    assert report.statuses.keys() <= {"completed", "interrupted", "failed"}
    assert report.exceeded == {}
    assert report.most_calls_of_a_job <= upstream.MAX_TRIES * (1 + upstream.MAX_RESTARTS)
    assert report.answered_with["died"] > 0


def test_plan_of_the_same_seed_is_equal() -> None:
    """A seed that failed can be run again."""
    assert draw(3, FULL) == draw(3, FULL)
    assert draw(3, FULL) != draw(4, FULL)
