"""The plan of a run: a pure function of its seed."""

from __future__ import annotations

import random
from enum import StrEnum
from typing import NamedTuple

__all__ = ["FULL", "GENTLE", "SHORT", "Act", "Action", "Job", "Plan", "Size", "draw"]


class Act(StrEnum):
    """A failure of workers or of the broker."""

    KILL = "kill -9"
    SLEEP = "stop and continue"
    JOIN = "join"
    LEAVE = "leave"
    BROKER_RESTART = "broker restart"
    BROKER_KILL = "broker kill"
    BROKER_PAUSE = "broker pause"


class Action(NamedTuple):
    """One failure, `at_s` seconds after the start. `whom` (0 to 1) selects one of the running workers."""

    at_s: float
    act: Act
    whom: float
    for_s: float


class Job(NamedTuple):
    """One job, submitted `at_s` seconds after the start."""

    at_s: float
    job_id: str
    model: str
    partition: int


class Size(NamedTuple):
    """The size of a run: weights of the acts; those of the broker happen at most `broker_acts` times."""

    jobs: int
    partitions: int
    workers: int
    actions: int
    seconds: float
    broker_acts: int
    weights: dict[Act, int]


_ALL = {
    Act.KILL: 4,
    Act.SLEEP: 4,
    Act.JOIN: 3,
    Act.LEAVE: 2,
    Act.BROKER_RESTART: 1,
    Act.BROKER_KILL: 1,
    Act.BROKER_PAUSE: 2,
}
FULL = Size(400, 8, 4, 14, 35, 2, _ALL)
SHORT = Size(80, 4, 2, 4, 6, 0, {Act.KILL: 3, Act.SLEEP: 2, Act.JOIN: 2, Act.LEAVE: 1})
GENTLE = Size(200, 4, 2, 6, 12, 0, {Act.JOIN: 2, Act.LEAVE: 1})
"""For the embedded broker, whose groups do not recover from members that die without leaving."""


class Plan(NamedTuple):
    """The plan of one run."""

    seed: int
    size: Size
    jobs: tuple[Job, ...]
    actions: tuple[Action, ...]
    static_names: bool
    max_in_flight: int


_FAULTS = (
    "break_after={n}",
    "close_after={n}",
    "cut_utf8_after={n}",
    "error_frame_after={n}",
    "error_then_done_after={n}",
    "status=400",
    "status=503",
    "json200",
    "html200",
    "no_done",
    "endless_line",
)


def draw(seed: int, size: Size) -> Plan:
    """Return the plan of a seed."""
    chance = random.Random(seed)
    jobs = sorted(_job(chance, number, size) for number in range(size.jobs))
    return Plan(
        seed,
        size,
        tuple(jobs),
        tuple(_actions(chance, size)),
        static_names=chance.random() < 0.3,
        max_in_flight=chance.choice([8, 40, 256]),
    )


def _job(chance: random.Random, number: int, size: Size) -> Job:
    deltas = min(400, 1 + int(chance.expovariate(1 / 50)))
    options = [f"deltas={deltas}", f"pace_ms={chance.choice([0, 2, 10, 30, 60])}"]
    if chance.random() < 0.1:
        options.append("choices=3")
    if chance.random() < 0.15:
        options.append(chance.choice(_FAULTS).format(n=chance.randint(0, deltas)))
    if chance.random() < 0.1:
        options.append(f"first_delta_ms={chance.randint(1, 3000)}")
    at_s = chance.uniform(0, size.seconds * 0.7)
    return Job(at_s, f"job-{number}", "practice?" + "&".join(options), chance.randrange(size.partitions))


def _actions(chance: random.Random, size: Size) -> list[Action]:
    acts = chance.choices(list(size.weights), weights=list(size.weights.values()), k=size.actions)
    left = size.broker_acts
    drawn = []
    for act in acts:
        if act in {Act.BROKER_RESTART, Act.BROKER_KILL, Act.BROKER_PAUSE}:
            left -= 1
            if left < 0:
                continue
        # Sleeps are shorter and longer than the session of six seconds: some workers wake as members, some as zombies.
        drawn.append(Action(chance.uniform(1, size.seconds), act, chance.random(), chance.uniform(0.3, 11)))
    return sorted(drawn)
