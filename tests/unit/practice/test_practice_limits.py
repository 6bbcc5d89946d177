"""Limits and mishaps of the practice upstream: the classes, then the server over HTTP."""

import asyncio
from random import Random

import pytest
from click.testing import CliRunner

from streamworker.cli.commands import cli
from streamworker.practice import Limits, Mishaps, PracticeUpstream
from streamworker.practice.limits import WINDOW_S, CallLimiter, Luck
from streamworker.practice.script import Fault, parse
from tests.unit.practice.practice_client import answer, connected, ended


def test_limiter_without_limits_admits_every_call() -> None:
    limiter = CallLimiter(Limits())

    assert [limiter.enter(0, 1_000_000) for _ in range(1000)] == [None] * 1000
    assert (limiter.open, limiter.peak) == (1000, 1000)


def test_limiter_counts_open_streams() -> None:
    limiter = CallLimiter(Limits(streams=2))
    first, second, third = (limiter.enter(0, 1) for _ in range(3))

    assert (first, second) == (None, None)
    assert third is not None
    assert third.limit == "streams"
    limiter.leave()
    assert limiter.enter(0, 1) is None
    assert limiter.peak == 2


def test_limiter_over_requests_returns_when_the_oldest_one_leaves_the_window() -> None:
    limiter = CallLimiter(Limits(requests_per_minute=2))
    assert [limiter.enter(now, 1) for now in (0.0, 10.0)] == [None, None]

    excess = limiter.enter(15.5, 1)

    assert excess is not None
    assert (excess.limit, excess.retry_after_s) == ("requests_per_minute", WINDOW_S - 15.5)
    assert excess.headers == [("retry-after", "45"), ("retry-after-ms", "44500")]
    assert limiter.enter(WINDOW_S, 1) is None


def test_limiter_over_tokens_returns_when_enough_have_left_the_window() -> None:
    limiter = CallLimiter(Limits(tokens_per_minute=100))
    assert [limiter.enter(now, 40) for now in (0.0, 10.0)] == [None, None]

    excess = limiter.enter(20, 70)

    assert excess is not None
    assert (excess.limit, excess.retry_after_s) == ("tokens_per_minute", WINDOW_S + 10 - 20)
    assert limiter.enter(20, 20) is None
    huge = limiter.enter(20, 101)
    assert huge is not None
    assert huge.retry_after_s == WINDOW_S


@pytest.mark.parametrize("seed", range(5))
def test_limiter_admits_no_more_than_its_limit_in_any_window(seed: int) -> None:
    """The sum is calculated for every window of 60 seconds."""
    chance, limiter = Random(seed), CallLimiter(Limits(requests_per_minute=20, tokens_per_minute=500))
    now, entered = 0.0, []
    for _ in range(500):
        now += chance.expovariate(1)
        tokens = chance.randint(1, 60)
        if limiter.enter(now, tokens) is None:
            entered.append((now, tokens))

    assert len(entered) > 50
    for start, _ in entered:
        window = [tokens for came, tokens in entered if start <= came < start + WINDOW_S]
        assert len(window) <= 20
        assert sum(window) <= 500


def test_luck_of_the_same_seed_selects_the_same_share_of_calls() -> None:
    mishaps = Mishaps(limited=0.3, stalled=0.1, broken=0.1, seed=7)
    script = parse("p?deltas=20")
    drawn = [[Luck(mishaps)] for _ in range(2)]
    befallen = [[luck.befall(script, 20) for _ in range(2000)] for [luck] in drawn]
    names = [name for _, name in befallen[0]]

    assert befallen[0] == befallen[1]
    assert {name: round(names.count(name) / 2000, 1) for name in ("limited", "stalled", "broken")} == {
        "limited": 0.3,
        "stalled": 0.1,
        "broken": 0.1,
    }
    for changed, name in befallen[0]:
        assert (changed.status == 429) is (name == "limited")
        assert (changed.fault is Fault.STALL) is (name == "stalled")
        assert (changed.fault is Fault.BREAK) is (name == "broken")
        assert 0 <= changed.after <= 20


def test_luck_leaves_scripts_with_a_fault_unchanged() -> None:
    script = parse("p?deltas=5&status=500")

    assert Luck(Mishaps(broken=1)).befall(script, 5) == (script, None)


@pytest.mark.parametrize("shares", [{"limited": 0.7, "broken": 0.4}, {"stalled": -0.1}])
def test_mishaps_with_shares_above_one_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be 0 to 1 together"):
        Mishaps(**shares)  # type: ignore[arg-type]


async def test_call_over_a_limit_is_answered_429_and_logged() -> None:
    async with PracticeUpstream(limits=Limits(requests_per_minute=1)) as practice:
        await answer(practice, "p?deltas=1")
        async with connected(practice) as connection:
            connection.ask("p?deltas=1")
            status, headers, body = await connection.whole()
            connection.request("GET", "/calls")
            log = (await connection.whole())[2]
        call = await ended(practice, 2)

    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 50 <= int(headers["retry-after"]) <= 60
    assert (call.outcome, call.exceeded, call.status) == ("limited", "requests_per_minute", 429)
    assert practice.exceeded == log["exceeded"] == {"requests_per_minute": 1}


async def test_streams_over_the_limit_are_not_opened() -> None:
    async with PracticeUpstream(limits=Limits(streams=1)) as practice, connected(practice) as holder:
        holder.ask("p?stall_after=0")
        await holder.head()
        async with connected(practice) as connection:
            connection.ask("p?deltas=1")
            assert (await connection.whole())[0] == 429
        holder.writer.close()
        await ended(practice, 2)
        await answer(practice, "p?deltas=1")

    assert (practice.max_streams, practice.max_open, practice.exceeded) == (1, 2, {"streams": 1})


async def test_tokens_of_prompt_and_answer_are_counted() -> None:
    async with PracticeUpstream(limits=Limits(tokens_per_minute=20)) as practice:
        await answer(practice, "p?deltas=14")  # the prompt has 5 tokens
        async with connected(practice) as connection:
            connection.ask("p?deltas=1")
            assert (await connection.whole())[0] == 429


async def test_mishap_is_played_and_logged() -> None:
    async with PracticeUpstream(mishaps=Mishaps(limited=1, retry_after_ms=40)) as practice:
        async with connected(practice) as connection:
            connection.ask("p?deltas=1")
            status, headers, _ = await connection.whole()
        call = await ended(practice)

    assert (status, headers["retry-after-ms"]) == (429, "40")
    assert (call.mishap, call.exceeded, call.outcome) == ("limited", None, "fault")


async def test_upstream_that_dies_resets_streams_refuses_calls_and_returns() -> None:
    async with PracticeUpstream() as practice, connected(practice) as connection:
        port = practice.port
        connection.ask("p?deltas=5&stall_after=2")
        await connection.head()
        dying = asyncio.create_task(practice.die(0.05))
        with pytest.raises(ConnectionResetError):
            while await connection.reader.read(65536):
                pass
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        await dying
        await answer(practice, "p?deltas=1")

    assert practice.calls[0].outcome == "died"
    assert practice.calls[1].outcome == "completed"


async def test_upstream_stopped_while_dead_does_not_return() -> None:
    practice = PracticeUpstream()
    await practice.start()
    dying = asyncio.create_task(practice.die(0.01))
    await asyncio.sleep(0)
    await practice.stop()
    await dying

    with pytest.raises(RuntimeError, match="not started"):
        _ = practice.port
    with pytest.raises(RuntimeError, match="not started"):
        await practice.die(0)


def test_command_help_has_the_grammar_of_model_names() -> None:
    text = CliRunner().invoke(cli, ["practice-upstream", "--help"]).output

    assert "ping_stall_after=N" in text
    assert "--requests-per-minute" in text


def test_command_refuses_shares_above_one() -> None:
    result = CliRunner().invoke(cli, ["practice-upstream", "--limited", "0.8", "--broken", "0.3"])

    assert result.exit_code == 2
    assert "add up to 1.1" in result.output
