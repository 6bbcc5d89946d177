"""New connections: which address is tried when, and what is remembered. Names and sockets are fakes, the clock is virtual."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.upstream import dial as module
from streamworker.upstream.dial import (
    LOOKUP_S,
    MAX_LOOKUPS,
    TlsFiles,
    _connect_first,
    _interleaved,
    _Resolver,
)
from tests.turnable import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Address = tuple[int, int, int, str, Any]


def address(name: str, family: int = socket.AF_INET) -> Address:
    """Return an address."""
    return family, socket.SOCK_STREAM, 0, "", (name, 80)


def names(addresses: list[Address]) -> list[str]:
    """Return the names of addresses."""
    return [str(one[4][0]) for one in addresses]


# The order of addresses


def test_families_take_turns() -> None:
    """RFC 8305: where one of them is broken, the second attempt is with the other."""
    six = [address(f"six{n}", socket.AF_INET6) for n in range(3)]
    four = [address("four0")]

    assert names(_interleaved(six + four, 0)) == ["six0", "four0", "six1", "six2"]
    assert names(_interleaved(four + six, 0)) == ["four0", "six0", "six1", "six2"]
    assert names(_interleaved(six + four, 1)) == ["six1", "four0", "six2", "six0"]
    assert _interleaved([], 5) == []


@given(st.lists(st.sampled_from([socket.AF_INET, socket.AF_INET6]), max_size=8), st.integers(0, 20))
def test_every_address_is_tried_once(families: list[int], turn: int) -> None:
    """In any order of families and at any turn; the families alternate as long as both have addresses."""
    addresses = [address(str(number), family) for number, family in enumerate(families)]
    tried = _interleaved(addresses, turn)

    assert sorted(tried) == sorted(addresses)
    fewest = min(Counter(families).values()) if len(set(families)) == 2 else 0
    pairs = [tried[at : at + 2] for at in range(0, 2 * fewest, 2)]
    assert all(one[0] != other[0] for one, other in pairs)


async def test_calls_spread_over_the_addresses_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many connections at once must not all go to the first one."""
    resolver = _Resolver()
    monkeypatch.setattr(resolver, "_lookup", lambda *_: _done([address(n) for n in "abc"]))
    firsts = [names(await resolver.addresses("host.invalid", 80))[0] for _ in range(6)]
    assert Counter(firsts) == {"a": 2, "b": 2, "c": 2}


def _done(value: Any) -> asyncio.Future[Any]:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


# Lookups


class Names:
    """Takes the place of `getaddrinfo` in threads. `answer` is set by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lookups: list[asyncio.Future[Any]] = []
        self._monkeypatch = monkeypatch

    def install(self) -> _Resolver:
        """Answer the lookups of the running loop; return a resolver."""

        def looked_up(*_: Any) -> asyncio.Future[Any]:
            self.lookups.append(asyncio.get_running_loop().create_future())
            return self.lookups[-1]

        self._monkeypatch.setattr(asyncio.get_running_loop(), "run_in_executor", looked_up)
        return _Resolver()


@pytest.fixture
def dns(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Return the lookups of a test."""
    return Names(monkeypatch)


async def test_lookup_in_progress_is_shared(dns: Names) -> None:
    """A burst of connections is one query; a caller that gives up does not end it for the others."""
    resolver = dns.install()
    waiting = [asyncio.create_task(resolver.addresses("host.invalid", 80)) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert len(dns.lookups) == 1
    waiting[0].cancel()
    await asyncio.sleep(0.01)
    dns.lookups[0].set_result([address("a")])
    assert [names(await task) for task in waiting[1:]] == [["a"], ["a"]]


@pytest.mark.parametrize(("wait_s", "lookups"), [(LOOKUP_S - 0.1, 1), (LOOKUP_S, 2)])
async def test_addresses_are_used_again_for_a_while(dns: Names, wait_s: float, lookups: int) -> None:
    """Then a change of the name is noticed."""
    resolver = dns.install()
    for number in range(2):
        task = asyncio.create_task(resolver.addresses("host.invalid", 80))
        await asyncio.sleep(0)
        if not dns.lookups[-1].done():
            dns.lookups[-1].set_result([address("a")])
        await task
        await asyncio.sleep(wait_s * (number == 0))
    assert len(dns.lookups) == lookups


@pytest.mark.parametrize("ends", ["fails", "is forgotten"])
async def test_lookup_that_failed_or_was_forgotten_is_repeated(dns: Names, ends: str) -> None:
    """A resolver that was away for a moment, or addresses that do not answer."""
    resolver = dns.install()
    task = asyncio.create_task(resolver.addresses("host.invalid", 80))
    await asyncio.sleep(0)
    if ends == "fails":
        dns.lookups[0].set_exception(socket.gaierror("no such name"))
        with pytest.raises(socket.gaierror):
            await task
    else:
        dns.lookups[0].set_result([address("a")])
        await task
        resolver.forget("host.invalid", 80)
        resolver.forget("host.invalid", 80)
    task = asyncio.create_task(resolver.addresses("host.invalid", 80))
    await asyncio.sleep(0)
    dns.lookups[1].set_result([address("b")])
    assert names(await task) == ["b"]


async def test_lookups_are_bounded(dns: Names) -> None:
    """A proxy of many hosts must not fill the memory."""
    resolver = dns.install()
    for number in range(2 * MAX_LOOKUPS):
        resolver._lookup(f"host{number}.invalid", 80)
        assert len(resolver._lookups) <= MAX_LOOKUPS
    for lookup in dns.lookups:
        lookup.cancel()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_address_is_not_looked_up(dns: Names, host: str) -> None:
    """It needs no thread."""
    assert names(await dns.install().addresses(host, 80)) == [host]
    assert dns.lookups == []


# The race


class Socket:
    """A socket that notes that it was closed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Network:
    """Connects after a time, or fails then. `answers` has seconds, and an error text for a failure, by name."""

    def __init__(self, answers: dict[str, tuple[float, str]]) -> None:
        self.answers = answers
        self.began: dict[str, float] = {}
        self.sockets: list[Socket] = []
        self.cancelled: list[str] = []

    async def connect(self, to: Address) -> Any:
        name = str(to[4][0])
        self.began[name] = asyncio.get_running_loop().time()
        seconds, error = self.answers[name]
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        if error:
            raise ConnectionRefusedError(error)
        self.sockets.append(Socket(name))
        return self.sockets[-1]


def raced(
    monkeypatch: pytest.MonkeyPatch,
    answers: dict[str, tuple[float, str]],
    check: Callable[[Network, Any], None],
) -> None:
    """Connect to the addresses in order; call `check` with the network, and the socket or the error."""
    network = Network(answers)
    monkeypatch.setattr(module, "_connect_socket", network.connect)

    async def work() -> None:
        try:
            result: Any = await _connect_first([address(name) for name in answers])
        except OSError as error:
            result = error
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        start = min(network.began.values(), default=0)
        network.began = {name: round(at - start, 3) for name, at in network.began.items()}
        check(network, result)

    run(work())


def test_address_that_answers_at_once_is_the_only_one_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others cost their servers nothing."""

    def check(network: Network, result: Any) -> None:
        assert (result.name, list(network.began)) == ("a", ["a"])

    raced(monkeypatch, {"a": (0.1, ""), "b": (0.1, "")}, check)


def test_address_that_is_slow_gets_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a quarter of a second each; what comes second is cancelled."""

    def check(network: Network, result: Any) -> None:
        assert result.name == "c"
        step = module.NEXT_ADDRESS_S
        assert network.began == {"a": 0, "b": step, "c": 2 * step}
        assert sorted(network.cancelled) == ["a", "b"]

    raced(monkeypatch, {"a": (90, ""), "b": (90, ""), "c": (0.1, "")}, check)


def test_slow_address_may_still_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not given up when the next one begins."""

    def check(network: Network, result: Any) -> None:
        assert (result.name, network.cancelled) == ("a", ["b"])

    raced(monkeypatch, {"a": (module.NEXT_ADDRESS_S + 0.1, ""), "b": (90, "")}, check)


def test_address_that_fails_is_followed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is known in a millisecond."""

    def check(network: Network, result: Any) -> None:
        assert (result.name, network.began) == ("b", {"a": 0, "b": 0.01})

    raced(monkeypatch, {"a": (0.01, "refused"), "b": (0.01, "")}, check)


def test_socket_that_connects_at_the_same_moment_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two may succeed in one iteration of the loop, and one of them is not returned to anything."""

    def check(network: Network, result: Any) -> None:
        assert [one.is_closed for one in network.sockets if one is not result] == [True]
        assert not result.is_closed

    step = module.NEXT_ADDRESS_S
    raced(monkeypatch, {"a": (step + 0.5, ""), "b": (0.5, "")}, check)


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ({"a": (0.0, "refused"), "b": (0.0, "no route")}, "refused; no route"),
        ({"a": (0.0, "refused"), "b": (0.0, "refused")}, "refused"),
        ({"a": (9.0, "late"), "b": (0.0, "soon")}, "soon; late"),
        ({"a": (0.0, "alone")}, "alone"),
        ({}, "the name has no address"),
    ],
)
def test_failure_names_each_reason_once(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, tuple[float, str]], text: str
) -> None:
    """When every address has failed."""
    raced(monkeypatch, answers, lambda _, result: _says(result, text))


def _says(error: OSError, text: str) -> None:
    assert str(error) == text


# TLS


def test_tls_context_is_made_again_when_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificates are renewed without a restart; an unchanged file costs a `stat` only."""
    made: list[tuple[str, ...]] = []

    def context(*files: str) -> object:
        made.append(files)
        return object()

    monkeypatch.setattr(module.tls_context, "__wrapped__", context)
    file = tmp_path / "ca.pem"
    file.write_text("one")
    files = TlsFiles(str(file))
    first = files()
    assert files() is first
    assert made == [(str(file), "", "")]
    os.utime(file, ns=(1, 1))
    second = files()
    assert second is not first

    new = tmp_path / "new.pem"
    new.write_text("two")
    os.utime(new, ns=(1, 1))
    new.replace(file)  # the same time, another file
    assert files() is not second


def test_tls_file_that_is_being_replaced_leaves_the_former_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is missing or half written for a moment must not refuse connections."""
    faults: list[OSError] = []

    def context(*_: str) -> object:
        if faults:
            raise faults.pop()
        return object()

    monkeypatch.setattr(module.tls_context, "__wrapped__", context)
    file = tmp_path / "ca.pem"
    with pytest.raises(FileNotFoundError):
        TlsFiles(str(file))()
    file.write_text("one")
    files = TlsFiles(str(file))
    first = files()
    file.unlink()
    assert files() is first
    file.write_text("half of it")
    faults.append(OSError("not a certificate"))
    assert files() is first

    assert files() is not first
