"""Rules of the gateway that hold for any caller, clock, header and order of calls."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiohttp.test_utils import make_mocked_request
from aiohttp.web import Response
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from streamworker.client.ids import new_job_id
from streamworker.gateway.auth import Caller
from streamworker.gateway.cors import Cors
from streamworker.gateway.cursors import Cursor
from streamworker.gateway.errors import ApiError
from streamworker.gateway.feeds import InvalidCursor
from streamworker.gateway.idempotency import Memory
from streamworker.gateway.keys import tenant_fault
from streamworker.gateway.limits import Limits
from streamworker.gateway.negotiation import JSON, NDJSON, SSE, stream_format
from streamworker.gateway.requests import seconds, since_ms
from streamworker.gateway.tokens import ReadToken, job_fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.gateway.idempotency import Entry

TENANTS = st.text("abc0_-", min_size=1, max_size=4).filter(lambda name: name != "b")
IDS = st.text("abAB01._:-", min_size=1, max_size=8)


def caller(*, account: str = "key k", tenant: str = "", streams: int = 5, limit: int | None = None) -> Caller:
    """Return the holder of a key."""
    return Caller(
        name=account, account=account, tenant=tenant, scopes=frozenset({"read"}), max_streams=streams,
        requests_per_minute=limit,
    )  # fmt: skip


def result_of(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Return what a call returns, or the error with which it refuses a request."""
    try:
        return call(*arguments, **named)
    except ApiError as error:
        return error


def admitted(limits: Limits, who: Caller) -> int | None:
    """Return None where a request is admitted, and else the seconds that the refusal names."""
    refusal = result_of(limits.admit, who)
    if refusal is None:
        return None
    assert (refusal.status, refusal.code, refusal.retriable) == (429, "too_many_requests", True)
    return int(refusal.headers["Retry-After"])


# Limits


@settings(max_examples=40)
@given(st.integers(1, 600), st.lists(st.floats(0, 90), max_size=80))
def test_requests_never_pass_the_allowance_of_a_minute_and_what_grew_meanwhile(
    limit: int, pauses: list[float]
) -> None:
    """From any request on, at most a full allowance and the growth of the time since are admitted."""
    now = [1e6]
    limits, who = Limits(lambda: now[0]), caller(limit=limit)
    times = []
    for pause in pauses:
        now[0] += pause
        if admitted(limits, who) is None:
            times.append(now[0])

    for first in range(len(times)):
        for last in range(first, len(times)):
            grown = (times[last] - times[first]) * limit / 60
            assert last - first + 1 <= limit + grown + 1e-6


@given(st.integers(1, 600), st.floats(0, 5))
def test_request_after_the_time_that_the_refusal_named_is_admitted(limit: int, elapsed: float) -> None:
    """A client that obeys `Retry-After` is never refused twice."""
    now = [1e6]
    limits, who = Limits(lambda: now[0]), caller(limit=limit)
    while admitted(limits, who) is None:
        pass
    now[0] += elapsed
    if (wait_s := admitted(limits, who)) is not None:
        now[0] += wait_s
        assert admitted(limits, who) is None


@given(st.integers(1, 100))
def test_request_is_admitted_to_one_caller_whatever_others_have_spent(limit: int) -> None:
    """Allowances are counted by credential, and a quiet minute fills them."""
    now = [1e6]
    limits, greedy, other = Limits(lambda: now[0]), caller(limit=limit), caller(account="key o", limit=1)
    assert [admitted(limits, greedy) for _ in range(limit)] == [None] * limit
    assert admitted(limits, greedy) is not None
    assert admitted(limits, other) is None

    now[0] += 60
    assert [admitted(limits, greedy) for _ in range(limit)] == [None] * limit


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["one", "two"]), st.booleans()), max_size=40), st.integers(1, 4))
def test_streams_are_counted_while_they_are_open(calls: list[tuple[str, bool]], most: int) -> None:
    """Per caller and in total, whatever the order in which they open and close; a refused one counts nowhere."""
    limits = Limits()
    open_: dict[str, list[Any]] = {"one": [], "two": []}
    for account, opens in calls:
        mine = open_[account]
        if not opens and mine:
            mine.pop().__exit__(None, None, None)
        elif opens:
            stream = limits.stream(caller(account=account, streams=most), "sse")
            if len(mine) < most:
                stream.__enter__()
                mine.append(stream)
            else:
                with pytest.raises(ApiError, match=f"may have {most} streams"):
                    stream.__enter__()
        total = sum(map(len, open_.values()))
        assert (limits.streams, limits.open["sse"]) == (total, total)
    for stream in [*open_["one"], *open_["two"]]:
        stream.__exit__(None, None, None)

    assert limits._streams == {}  # nothing is kept of callers that have none


# Requests that are repeated


class Remembered:
    """The rules of `Memory`, without its structure: (key, entry, time), oldest first."""

    def __init__(self, keep_s: float, most: int) -> None:
        self.entries: list[tuple[str, Entry, float]] = []
        self.keep_s, self.most = keep_s, most

    def expire(self, now: float) -> None:
        self.entries = [entry for entry in self.entries if entry[2] + self.keep_s > now]

    def drop(self, key: str) -> None:
        self.entries = [entry for entry in self.entries if entry[0] != key]

    def find(self, key: str) -> Entry | None:
        return next((entry for name, entry, _ in self.entries if name == key), None)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "find", "forget", "job"]), st.sampled_from("abcde"), st.integers(0, 6)
        ),
        max_size=60,
    ),
    st.integers(1, 4),
)
def test_memory_of_requests_equals_a_list(steps: list[tuple[str, str, int]], most: int) -> None:
    """A limited number, each for a limited time, the oldest goes first, and a job that is forgotten has no entry."""
    memory, model, now = Memory(10.0, most), Remembered(10.0, most), 0.0
    for number, (step, key, pause) in enumerate(steps):
        now += pause
        model.expire(now)
        if step == "add":
            entry = memory.add(key, b"%d" % number, f"j{number}", cast("Any", None), now)
            model.drop(key)
            model.entries = [*model.entries, (key, entry, now)][-most:]
        elif step == "forget" and (found := model.find(key)) is not None:
            memory.forget(key, found)
            model.drop(key)
        elif step == "job" and (found := model.find(key)) is not None:
            memory.forget_job(found.job_id)
            model.drop(key)
        for name in "abcde":
            assert memory.find(name, now) is model.find(name)
        assert len(memory) == len(model.entries) <= most
        assert set(memory._by_job) == {entry.job_id for _, entry, _ in model.entries}


# Callers and jobs


@given(TENANTS, TENANTS, IDS)
def test_job_is_seen_by_its_tenant_only(tenant: str, other: str, rest: str) -> None:
    """The first part of the id decides, also where one tenant's name is the beginning of another's."""
    assume(tenant != other)
    job_id = f"{tenant}.{rest}"

    assert caller(tenant=tenant).allows(job_id)
    assert caller(tenant="").allows(job_id)
    assert not caller(tenant=other).allows(job_id)


@given(TENANTS, TENANTS)
def test_new_id_of_a_tenant_belongs_to_it(tenant: str, other: str) -> None:
    """And an id without a tenant belongs to none, whatever its digits are."""
    assume(tenant != other)

    assert caller(tenant=tenant).allows(f"{tenant}.{new_job_id()}")
    assert not caller(tenant=tenant).allows(new_job_id())
    assert not caller(tenant=tenant).allows(f"{other}.{new_job_id()}")


@given(TENANTS, st.lists(st.text("abc0_.-", min_size=1, max_size=8), max_size=3), st.integers(0, 99))
def test_tenant_that_may_be_used_owns_no_job_without_a_tenant(
    tenant: str, topics: list[str], offset: int
) -> None:
    """A job without an id is named by its coordinates, a job of a batch begins with `b.`."""
    assume(tenant_fault(tenant, topics) is None)

    assert not any(caller(tenant=tenant).allows(f"{topic}-0-{offset}") for topic in topics if "." in topic)
    assert not caller(tenant=tenant).allows("b.night.0123")


@given(st.lists(st.tuples(IDS, st.booleans()), min_size=1, max_size=5), IDS)
def test_token_allows_what_it_names_and_nothing_else(jobs: list[tuple[str, bool]], job_id: str) -> None:
    """An id whole, a prefix with its star; the star does not belong to the prefix."""
    names = tuple(job + "*" * is_prefix for job, is_prefix in jobs)
    token = ReadToken(jobs=names, scopes=frozenset({"read"}), expires_at=1.0, kid="k")

    assert job_fault(names) is None
    assert token.allows(job_id) == any(
        job_id.startswith(job) if is_prefix else job_id == job for job, is_prefix in jobs
    )
    assert all(token.allows(job) for job, _ in jobs)


@given(st.lists(st.text(max_size=5) | st.integers(), max_size=3) | st.text() | st.none())
def test_jobs_of_a_token_are_ids_or_have_a_fault(jobs: Any) -> None:
    """No empty prefix, which would be every job of every tenant."""
    if job_fault(jobs) is None:
        assert jobs
        assert all(re.fullmatch(r"[A-Za-z0-9._:-]+\*?", job) for job in jobs)


# Cursors


@given(
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**63 - 1),
    st.none() | st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.booleans()),
)
def test_any_cursor_is_read_back(partition: int, offset: int, event: tuple[int, int, bool] | None) -> None:
    """Whether it is behind an event or a place."""
    cursor = Cursor(partition, offset)
    if event is not None:
        cursor = Cursor(partition, offset, event[0], f"{event[1]:08x}", event[2])

    assert Cursor.parse(str(cursor)) == cursor
    assert cursor.is_place == (event is None)


@given(st.text("0123456789abcdefw.end", max_size=40) | st.text(max_size=20))
def test_any_text_is_a_cursor_in_its_one_spelling_or_is_refused(text: str) -> None:
    """A client may send whatever it likes."""
    try:
        cursor = Cursor.parse(text)
    except InvalidCursor:
        return
    assert str(cursor) == text


# Headers and queries

RANGES = st.sampled_from([SSE, NDJSON, JSON, "text/*", "application/*", "*/*", "text/html", "image/png"])
ACCEPTS = st.lists(st.tuples(RANGES, st.integers(0, 1000)), min_size=1, max_size=6)


def accept_of(items: list[tuple[str, int]]) -> str:
    """Return a header from ranges with thousandths of quality."""
    return ", ".join(f"{range_};q={quality / 1000:g}" for range_, quality in items)


@given(ACCEPTS, st.randoms())
def test_accepted_format_does_not_depend_on_the_order_of_the_ranges(
    items: list[tuple[str, int]], random: Any
) -> None:
    """RFC 9110 section 12.5.1: quality decides, and the most specific range names it."""
    unique = list(dict(items).items())
    shuffled = random.sample(unique, len(unique))

    def chosen(ranges: list[tuple[str, int]]) -> str | None:
        found = result_of(stream_format, accept_of(ranges))
        return None if isinstance(found, ApiError) else str(found)

    qualities = dict(unique)

    def quality(offered: str) -> int:
        group = f"{offered.partition('/')[0]}/*"
        return qualities.get(offered, qualities.get(group, qualities.get("*/*", 0)))

    best = max((quality(offered), -at, offered) for at, offered in enumerate((SSE, NDJSON, JSON)))
    assert chosen(unique) == chosen(shuffled) == (best[2] if best[0] else None)


@given(st.text(max_size=60))
def test_any_accept_header_has_a_format_or_is_406(accept: str) -> None:
    """Also one that is not as the RFC says."""
    found = result_of(stream_format, accept)

    assert found in {SSE, NDJSON, JSON} or found.status == 406


@given(st.floats().map(str) | st.text("0123456789.e_- ", max_size=6) | st.text(max_size=6))
@example("1_0")
@example("٣")
@example(" 5")
def test_seconds_are_within_their_limits_or_refused(text: str) -> None:
    """And written as a plain number, in ASCII and without the underscores that Python allows."""
    found = result_of(seconds, {"wait_s": text}, "wait_s", low=0, high=60, default=5)
    if isinstance(found, ApiError):
        assert (found.status, found.code) == (400, "invalid_request")
        return
    assert 0 <= found <= 60
    assert re.fullmatch(r"[+-]?[0-9]*\.?[0-9]*([eE][+-]?[0-9]+)?", text)


@given(
    st.datetimes(datetime(1970, 1, 2), datetime(9000, 1, 1)),  # noqa: DTZ001 - the zone is drawn
    st.integers(-23 * 60, 23 * 60),
    st.booleans(),
)
def test_since_is_a_moment_in_any_zone(moment: datetime, minutes: int, is_lower: bool) -> None:
    """Letters of either case, and a plus that a query has turned into a blank."""
    aware = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    text = aware.isoformat()
    expected = (aware - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(milliseconds=1)

    found = since_ms(text.lower() if is_lower else text.replace("+", " "))
    assert found is not None
    assert found == pytest.approx(max(0, expected), abs=1)


@given(st.text(max_size=30))
def test_since_that_is_not_a_moment_is_refused(text: str) -> None:
    """A time without a zone is another moment at each reader."""
    found = result_of(since_ms, text)

    assert found.status == 400 if isinstance(found, ApiError) else found >= 0


@settings(max_examples=40)
@given(
    st.lists(
        st.from_regex(r"[A-Za-z-]{1,12}|streamworker-[a-z]{0,5}|x-stainless-[a-z]{0,5}", fullmatch=True)
    ),
    st.text(max_size=30).filter(lambda text: "\n" not in text and "\r" not in text and "\0" not in text),
)
def test_preflight_allows_known_headers_and_the_two_prefixes(names: list[str], noise: str) -> None:
    """Whatever a page asks for: no name that is not a token comes back, and their number is bounded."""
    request = make_mocked_request(
        "OPTIONS",
        "/v1/jobs",
        headers=CIMultiDict({
            "Origin": "https://app.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": ",".join([*names, noise]),
        }),
    )  # fmt: skip
    response = Cors(["https://app.example"]).preflight(request)
    assert response is not None
    allowed = response.headers["Access-Control-Allow-Headers"].split(", ")

    prefixes = ("streamworker-", "x-stainless-")
    asked = {name.lower() for name in names[:64] if name.lower().startswith(prefixes)}
    assert asked <= set(allowed)
    assert {"authorization", "content-type", "last-event-id", "idempotency-key", "x-api-key"} <= set(allowed)
    assert len(allowed) <= 6 + 64
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in allowed)


@given(st.sets(st.sampled_from(["https://a.example", "https://b.example:8443"])), st.text(max_size=25))
def test_response_is_readable_for_pages_of_the_configured_origins_only(origins: set[str], other: str) -> None:
    """Origins are compared whole; `Vary` names the origin as soon as one is configured."""
    cors = Cors(origins)
    for origin in ("https://a.example", "https://b.example:8443", "https://a.example.evil", "null", other):
        response = Response()
        cors.add_headers(cast("Any", SimpleNamespace(headers={"Origin": origin})), response)
        allowed = response.headers.get("Access-Control-Allow-Origin")
        assert allowed == (origin if origin in origins else None)
        assert ("Access-Control-Expose-Headers" in response.headers) == (origin in origins)
        assert response.headers.get("Vary") == ("Origin" if origins else None)
        assert "Access-Control-Allow-Credentials" not in response.headers
