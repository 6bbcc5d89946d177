"""The limits of a caller: requests per minute and open streams, on a clock that the test sets."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.gateway.auth import Caller
from streamworker.gateway.errors import ApiError
from streamworker.gateway.limits import FACES, Limits


def caller(account: str = "key a", *, requests: int | None = None, streams: int = 2) -> Caller:
    return Caller(
        name="a",
        account=account,
        tenant="",
        scopes=frozenset(),
        max_streams=streams,
        requests_per_minute=requests,
    )


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def admitted(limits: Limits, who: Caller, requests: int) -> int:
    """Make requests until one is refused; return how many were admitted."""
    for number in range(requests):
        try:
            limits.admit(who)
        except ApiError:
            return number
    return requests


def wait_s(limits: Limits, who: Caller) -> int:
    """Make a request that is refused; return its `Retry-After`."""
    with pytest.raises(ApiError) as refused:
        limits.admit(who)
    assert (refused.value.status, refused.value.code) == (429, "too_many_requests")
    assert f"{who.requests_per_minute} requests per minute" in str(refused.value)
    return int(refused.value.headers["Retry-After"])


def test_requests_of_a_key_are_refused_beyond_its_allowance() -> None:
    """A full minute's allowance may be used at once; it grows by a sixtieth each second."""
    clock = Clock()
    limits, who = Limits(clock), caller(requests=120)

    assert admitted(limits, who, 200) == 120
    clock.now += 1
    assert admitted(limits, who, 200) == 2
    clock.now += 10.5
    assert admitted(limits, who, 200) == 21


def test_allowance_of_a_quiet_key_is_one_minutes_and_not_more() -> None:
    """An hour without requests does not allow sixty minutes of them at once."""
    clock = Clock()
    limits, who = Limits(clock), caller(requests=5)
    limits.admit(who)
    clock.now += 3600

    assert admitted(limits, who, 100) == 5


def test_requests_of_other_accounts_and_of_tokens_are_not_concerned() -> None:
    """Each key has an allowance of its own; a read token has none."""
    limits = Limits(Clock())
    assert admitted(limits, caller("key a", requests=3), 10) == 3
    assert admitted(limits, caller("key b", requests=3), 10) == 3
    assert admitted(limits, caller("token x"), 10_000) == 10_000


@pytest.mark.parametrize(("requests", "used", "wait"), [(1, 1, 60), (7, 7, 9), (60, 60, 1), (6000, 6000, 1)])
def test_refused_request_names_the_first_second_at_which_it_would_be_admitted(
    requests: int, used: int, wait: int
) -> None:
    """Rounded up to whole seconds, at least one."""
    limits, who = Limits(Clock()), caller(requests=requests)
    assert admitted(limits, who, requests + 1) == used

    assert wait_s(limits, who) == wait


@given(st.integers(1, 10_000), st.lists(st.floats(0, 30), max_size=30))
def test_request_after_the_time_that_a_refusal_names_is_admitted(requests: int, pauses: list[float]) -> None:
    """Whatever was refused meanwhile, and however the times are rounded."""
    clock = Clock()
    limits, who = Limits(clock), caller(requests=requests)
    admitted(limits, who, requests)
    for pause in pauses:
        clock.now += pause
        admitted(limits, who, requests + 1)
        clock.now += wait_s(limits, who)
        limits.admit(who)


def test_streams_of_an_account_are_refused_at_its_limit() -> None:
    """A refused stream counts nothing; one that ends makes room for another."""
    limits, who = Limits(), caller(streams=2)
    limits.enter(who, "sse")
    limits.enter(who, "websocket")
    with pytest.raises(ApiError, match="the credential may have 2 streams open at once") as refused:
        limits.enter(who, "sse")
    assert (refused.value.status, refused.value.code) == (429, "too_many_streams")
    limits.enter(caller("token x", streams=1), "sse")
    assert (limits.streams, limits.open) == (3, Counter(sse=2, websocket=1))
    limits.leave(who, "websocket")
    limits.enter(who, "chat")
    assert (limits.streams, +limits.open) == (3, Counter(sse=2, chat=1))


def test_stream_is_counted_while_its_block_runs_however_that_ends() -> None:
    """And nothing is held of an account without streams: each read token is one."""
    limits, who = Limits(), caller(streams=1)

    def serve() -> None:
        with limits.stream(who, "sse"):
            assert (limits.streams, limits.open["sse"]) == (1, 1)
            raise ConnectionResetError

    for _ in range(3):
        with pytest.raises(ConnectionResetError):
            serve()
    assert (limits.streams, limits.open["sse"], limits._streams) == (0, 0, {})


def test_every_face_has_a_count_of_delivered_events() -> None:
    """One of its own."""
    delivered = Limits().delivered

    assert tuple(delivered) == FACES
    assert len({id(tally) for tally in delivered.values()}) == len(FACES)
