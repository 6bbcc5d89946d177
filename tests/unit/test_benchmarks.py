"""The parts of the benchmarks: upstream, the limit's parser, and the report. No performance is tested."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree as ET

import orjson
import pytest

from benchmarks import tables
from benchmarks.contenders.limit import Sink, Stream
from benchmarks.processes import CPU_RESOLUTION_S
from benchmarks.report import medians, table, write
from benchmarks.scenarios import FULL, QUICK, Scenario
from benchmarks.stage import CONTENDERS, Figures, _figures
from benchmarks.upstream import STAMP_DIGITS, Account, Connection
from streamworker.config import UpstreamSettings
from streamworker.upstream.client import HttpUpstream
from tests.streams import listening

ROOT = Path(__file__).parents[2]

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamworker.model import DeltaEvent


@pytest.fixture
async def upstream() -> AsyncIterator[tuple[HttpUpstream, Account]]:
    account = Account()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(account), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = HttpUpstream(UpstreamSettings(base_url=f"http://127.0.0.1:{port}/v1"))
    yield client, account
    await client.close()
    server.close()


async def stream(client: HttpUpstream, scenario: Scenario, account: Account, enough: int) -> list[DeltaEvent]:
    """Read a scenario's stream through an attempt; finish it after enough deltas."""
    attempt = listening()
    deltas: list[DeltaEvent] = []
    async with client.call(orjson.dumps({"model": scenario.model}), {}) as answer:
        async for data in answer:
            deltas += attempt.receive(data, 0)
            if len(deltas) >= enough:
                for connection in list(account.streams):
                    connection.finish()
            if not attempt.is_listening:
                break
    assert attempt.status == "completed"
    return deltas


@pytest.mark.parametrize(
    ("scenario", "characters"),
    [
        (Scenario("", 1, rate=200), 24),
        (Scenario("", 1, rate=50, burst=7), 24),
        (Scenario("", 1, rate=100, bytes=8192), 8192),
        (Scenario("", 1, deltas=20), 24),
    ],
)
async def test_benchmarks_upstream_streams_the_scenario(
    upstream: tuple[HttpUpstream, Account], scenario: Scenario, characters: int
) -> None:
    """The stream is a complete chat completion; each delta has the time of its write."""
    client, account = upstream
    begun = time.monotonic_ns() // 1000
    deltas = await stream(client, scenario, account, 20)
    texts = [event.delta["content"] for event in deltas[:-1]]
    assert len(texts) >= 20
    assert len(texts) == account.written
    assert deltas[-1].finish_reason == "stop"
    for text in texts:
        assert len(text) == characters
        assert begun <= int(text[1 : 1 + STAMP_DIGITS]) <= time.monotonic_ns() // 1000


class Kept:
    """A sink that collects the events of the limit."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def append(self, _: int, key: bytes, event: dict[str, Any], headers: list[Any]) -> None:
        assert key == b"job-1"
        assert headers[1] == ("streamworker-type", event["type"].encode())
        self.events.append(event)


class Wire:
    """A transport that collects what the benchmarks' upstream writes."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        pass


@pytest.mark.parametrize("size", [1, 2, 3, 100, 1 << 20])
async def test_benchmarks_limit_with_any_split_of_the_bytes_reads_every_delta(size: int) -> None:
    """It skips role and finish chunks, but no delta."""
    wire, kept = Wire(), Kept()
    connection = Connection(Account())
    connection.connection_made(cast("Any", wire))
    body = orjson.dumps({"model": "bench?deltas=3"})
    connection.data_received(
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    )
    limit = Stream({"job_id": "job-1", "request": {}}, cast("Sink", kept), 0, "host", "/v1")
    limit.connection_made(cast("Any", Wire()))
    for at in range(0, len(wire.written), size):
        limit.data_received(wire.written[at : at + size])
    assert [event["seq"] for event in kept.events] == [0, 1, 2, 3, 4]
    assert [event["type"] for event in kept.events] == ["delta"] * 4 + ["usage"]
    assert kept.events[4]["usage"] is not None


def figures(contender: str, cpu_us: float, **members: Any) -> Figures:
    given = dict.fromkeys(Figures._fields, 1.0) | {"contender": contender, "scenario": FULL[0].name}
    return Figures(**cast("Any", given | {"cpu_us": cpu_us, "fault": None, "lag_ms": None} | members))


def test_benchmarks_report_takes_medians_and_compares_with_the_limit(tmp_path: Path) -> None:
    """Table, JSON and chart have the same figures."""
    runs = [figures("limit", cpu) for cpu in (10, 30, 20)] + [
        figures("streamworker", 50, fault="it fell behind")
    ]
    taken = medians(runs)
    assert [(run.contender, run.cpu_us) for run in taken] == [("limit", 20), ("streamworker", 50)]
    assert "| streamworker | 50.0 | 2.50 |" in table(taken)
    assert "it fell behind" in table(taken)
    write(tmp_path, taken, runs)
    told = orjson.loads((tmp_path / "figures.json").read_bytes())
    assert [run["cpu_us"] for run in told["runs"]] == [10, 30, 20, 50]
    assert told["machine"]["cores"] >= 1
    assert len(ET.parse(tmp_path / "cpu.svg").getroot().findall("{*}rect")) == 1 + len(CONTENDERS) + 2


def measured(cpu_s: float) -> Figures:
    """Return the figures of a run with 2,000 deltas."""
    return _figures(
        CONTENDERS[0],
        QUICK[1],
        None,
        ages=[1000] * 2000,
        cpu_s=cpu_s,
        seconds=2.0,
        stream_kib=None,
        ramp_s=1.0,
    )


def test_benchmarks_run_without_a_tick_of_cpu_time_has_an_upper_bound() -> None:
    """The clock's resolution is 10 ms, and the limit takes less for the few jobs of a quick run."""
    bound = "less CPU time than the kernel's resolution"
    none, one, many = measured(0.0), measured(CPU_RESOLUTION_S), measured(0.5)

    assert (none.cpu_us, none.per_core) == (one.cpu_us, one.per_core) == (5.0, 200_000)
    assert (many.cpu_us, many.per_core) == (250.0, 4000)
    assert bound in table([none])
    assert bound not in table([many])


def test_benchmarks_scenarios_have_unique_names() -> None:
    """Figures are identified by the name of their scenario."""
    assert len({scenario.name for scenario in (*FULL, *QUICK)}) == len(FULL) + len(QUICK)


def shown_runs(**faults: str) -> list[Figures]:
    contenders = ("limit", "streamworker", "naive")
    runs = [
        figures(name, 20, scenario=scenario, fault=faults.get(name))
        for scenario in tables.SHOWN
        for name in contenders
    ]
    return [
        *runs,
        figures("faststream", 20, scenario=tables.SHOWN[0], stream_kib=None),
        figures("limit", 1, scenario="other"),
    ]


def test_benchmarks_table_of_the_readme_has_the_shown_scenarios() -> None:
    """A contender that falls behind says so, and one that cannot sustain a scenario is left out."""
    rows = (
        tables.compared(shown_runs(naive="falls behind: 19% of the deltas"))
        .partition("---: |\n")[2]
        .splitlines()
    )
    behind = "aiokafka and the openai SDK: 19% of the deltas, it falls behind"

    assert [[cell.strip() for cell in row.split("|")[1:3]] for row in rows] == [
        ["300 streams × 5/s", "limit"],
        ["", "**streamworker**"],
        ["", behind],
        ["", "FastStream and the openai SDK"],
        ["1,000 streams × 20/s", "limit"],
        ["", "**streamworker**"],
        ["", behind],
    ]
    assert rows[0] == "| 300 streams × 5/s | limit | 20.0 | 1 | 1 |"
    assert rows[3].endswith("| 20.0 | 1 | – |")


@pytest.mark.parametrize("missing", ["limit", "streamworker", "naive"])
def test_benchmarks_table_of_a_partial_run_is_refused(missing: str) -> None:
    """The table never mixes figures of several runs."""
    runs = [run for run in shown_runs() if (run.contender, run.scenario) != (missing, tables.SHOWN[1])]

    with pytest.raises(ValueError, match=f"1,000 streams × 20/s was not measured for {missing}"):
        tables.compared(runs)


def test_benchmarks_files_have_the_figures_of_the_json(tmp_path: Path) -> None:
    """The blocks in both files can be written from the file of any whole run, again and again, and agree with each other."""
    write(tmp_path, medians(shown_runs()), shown_runs())
    taken, machine = tables.read_figures(tmp_path / "figures.json")
    text = tables.every_scenario(taken, machine)
    for file, block in (("README.md", tables.compared(taken)), ("benchmarks/README.md", text)):
        before = (ROOT / file).read_text()
        written = tables.replaced(before, block)
        assert written.count(block) == 1
        assert tables.replaced(written, block) == written
        assert written.partition(tables.BEGIN)[0] == before.partition(tables.BEGIN)[0]
        assert written.partition(tables.END)[2] == before.partition(tables.END)[2]
    assert "| 300 streams × 5/s | limit | 20.0 | 1.00 | 1 |" in text
    assert taken == medians(shown_runs())


@pytest.mark.parametrize(
    "text", ["", tables.BEGIN, tables.END, tables.END + tables.BEGIN, (tables.BEGIN + tables.END) * 2]
)
def test_benchmarks_file_without_one_pair_of_marks_is_refused(text: str) -> None:
    """Nothing is written then."""
    with pytest.raises(ValueError, match="must have one pair"):
        tables.replaced(text, "block")
