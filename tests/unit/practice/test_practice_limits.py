"""What the server allows and what befalls its calls: the gate and the draw by themselves, then over HTTP."""

import asyncio
from random import Random

import pytest
from click.testing import CliRunner

from streamworker.cli.commands import cli
from streamworker.practice import Limits, Mishaps, PracticeUpstream
from streamworker.practice.limits import WINDOW_S, Gate, Luck
from streamworker.practice.script import Fault, parse
from tests.unit.practice.practice_client import answer, connected, ended


def test_gate_without_limits_lets_everyone_in() -> None:
    gate = Gate(Limits())

    assert [gate.enter(0, 1_000_000) for _ in range(1000)] == [None] * 1000
    assert (gate.open, gate.peak) == (1000, 1000)


def test_gate_counts_streams_that_are_open() -> None:
    gate = Gate(Limits(streams=2))
    first, second, third = (gate.enter(0, 1) for _ in range(3))

    assert (first, second) == (None, None)
    assert third is not None
    assert third.limit == "streams"
    gate.leave()
    assert gate.enter(0, 1) is None
    assert gate.peak == 2


def test_gate_says_when_the_oldest_request_leaves_the_window() -> None:
    gate = Gate(Limits(requests_per_minute=2))
    assert [gate.enter(now, 1) for now in (0.0, 10.0)] == [None, None]

    excess = gate.enter(15.5, 1)

    assert excess is not None
    assert (excess.limit, excess.retry_after_s) == ("requests_per_minute", WINDOW_S - 15.5)
    assert excess.headers == [("retry-after", "45"), ("retry-after-ms", "44500")]
    assert gate.enter(WINDOW_S, 1) is None


def test_gate_says_when_enough_tokens_have_left_the_window() -> None:
    gate = Gate(Limits(tokens_per_minute=100))
    assert [gate.enter(now, 40) for now in (0.0, 10.0)] == [None, None]

    excess = gate.enter(20, 70)

    assert excess is not None
    assert (excess.limit, excess.retry_after_s) == ("tokens_per_minute", WINDOW_S + 10 - 20)
    assert gate.enter(20, 20) is None
    huge = gate.enter(20, 101)
    assert huge is not None
    assert huge.retry_after_s == WINDOW_S


@pytest.mark.parametrize("seed", range(5))
def test_gate_never_lets_more_through_in_any_window(seed: int) -> None:
    """Held to the sum over all windows, counted by hand."""
    chance, gate = Random(seed), Gate(Limits(requests_per_minute=20, tokens_per_minute=500))
    now, entered = 0.0, []
    for _ in range(500):
        now += chance.expovariate(1)
        tokens = chance.randint(1, 60)
        if gate.enter(now, tokens) is None:
            entered.append((now, tokens))

    assert len(entered) > 50
    for start, _ in entered:
        window = [tokens for came, tokens in entered if start <= came < start + WINDOW_S]
        assert len(window) <= 20
        assert sum(window) <= 500


def test_luck_befalls_its_share_of_calls_and_the_same_ones_again() -> None:
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


def test_luck_leaves_alone_what_goes_wrong_by_itself() -> None:
    script = parse("p?deltas=5&status=500")

    assert Luck(Mishaps(broken=1)).befall(script, 5) == (script, None)


@pytest.mark.parametrize("shares", [{"limited": 0.7, "broken": 0.4}, {"stalled": -0.1}])
def test_mishaps_of_more_than_everything_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="of all calls"):
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


async def test_tokens_of_prompt_and_answer_count() -> None:
    async with PracticeUpstream(limits=Limits(tokens_per_minute=20)) as practice:
        await answer(practice, "p?deltas=14")  # and 5 of the prompt
        async with connected(practice) as connection:
            connection.ask("p?deltas=1")
            assert (await connection.whole())[0] == 429


async def test_mishap_is_played_and_told() -> None:
    async with PracticeUpstream(mishaps=Mishaps(limited=1, retry_after_ms=40)) as practice:
        async with connected(practice) as connection:
            connection.ask("p?deltas=1")
            status, headers, _ = await connection.whole()
        call = await ended(practice)

    assert (status, headers["retry-after-ms"]) == (429, "40")
    assert (call.mishap, call.exceeded, call.outcome) == ("limited", None, "fault")


async def test_upstream_that_dies_resets_its_streams_refuses_new_ones_and_comes_back() -> None:
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


async def test_upstream_that_was_stopped_stays_dead() -> None:
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


def test_command_tells_the_grammar_of_model_names() -> None:
    text = CliRunner().invoke(cli, ["practice-upstream", "--help"]).output

    assert "ping_stall_after=N" in text
    assert "--requests-per-minute" in text


def test_command_refuses_shares_of_more_than_everything() -> None:
    result = CliRunner().invoke(cli, ["practice-upstream", "--limited", "0.8", "--broken", "0.3"])

    assert result.exit_code == 2
    assert "1.1 of all calls" in result.output
