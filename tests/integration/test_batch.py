"""`streamworker batch` against Apache Kafka, the worker and the practice upstream."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.admin import RecordsToDelete

from tests.integration.batches import (
    Files,
    calls_by_prompt,
    lines_of,
    request,
    run_batch,
    start_batch,
    write_lines,
)
from tests.integration.stage import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.integration.stage import Stage

SLOW = "practice?deltas=2&pace_ms=50"
ENDLESS = "practice?deltas=9999&pace_ms=50"


async def open_stage(stage: Stage, *, has_results: bool = True) -> None:
    await stage.open(partitions=2, results_topic=f"{stage.events_topic}.results" if has_results else None)


def ids_of(count: int) -> list[str]:
    return [f"request-{number}" for number in range(count)]


def once(ids: Sequence[str]) -> dict[str, int]:
    """Return the upstream calls of lines that were each submitted once."""
    return {f"prompt of {custom_id}": 1 for custom_id in ids}


def own_mounts() -> str | None:
    """Return the path of `unshare` if it can make a namespace in which this user may mount a file system."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Urm", "true"], check=False).returncode:
        return None
    return unshare


@pytest.mark.parametrize("has_results", [True, False], ids=["results", "events"])
async def test_batch_writes_every_line_into_one_of_two_files(
    apache: Stage, tmp_path: Path, has_results: bool
) -> None:
    """With a results topic, and from the events alone. Failed lines have the upstream's own error, or partial text."""
    await open_stage(apache, has_results=has_results)
    files, ids = Files.of(tmp_path), ids_of(40)
    lines = [request(custom_id) for custom_id in ids[:-3]]
    lines += [request(ids[-3], "practice?status=400"), request(ids[-2], "practice?break_after=2")]
    lines += [request(ids[-1], "practice?shape=vllm&logprobs&tool_calls=2&deltas=3", n=2)]
    write_lines(files.input, lines)
    summary = tmp_path / "summary.json"
    async with apache.worker():
        arguments = (
            "--on-break",
            "fail",
            "--window",
            "10",
            "-d",
            "team=blue",
            "--price",
            "1,2",
            "--summary",
            summary,
        )
        code, text = await run_batch(apache, files.input, *arguments)

    assert code == 1, text
    assert "--retry-failed runs the retriable ones again" in text
    completed, failed = files.check(ids)
    assert len(completed) == 38
    by_id = {line["custom_id"]: line for line in failed}
    assert by_id[ids[-3]]["error"]["code"] == "upstream_rejected"
    assert by_id[ids[-3]]["response"]["status_code"] == 400
    assert by_id[ids[-3]]["response"]["body"]["error"]["message"]
    assert by_id[ids[-2]]["partial"]["choices"][0]["finish_reason"] is None
    assert calls_by_prompt(apache) == once(ids)
    assert files.leftovers() == ["summary.json"]
    assert "40 lines: 38 completed, 2 failed" in text
    assert "tokens:" in text
    counts = json.loads(summary.read_text())
    assert (counts["status"], counts["request_counts"]) == (
        "completed",
        {"total": 40, "completed": 38, "failed": 2},
    )
    started = [record.event for record in apache.records if record.event["type"] == "started"]
    assert all(event["metadata"]["team"] == "blue" for event in started)
    assert {event["metadata"]["custom_id"] for event in started} == set(ids)


@pytest.mark.long
async def test_batch_that_is_finished_sends_nothing(apache: Stage, tmp_path: Path) -> None:
    """The same command again needs no broker; a grown input runs its new lines only."""
    await open_stage(apache)
    files, ids = Files.of(tmp_path), ids_of(6)
    write_lines(files.input, map(request, ids[:4]))
    async with apache.worker():
        assert (await run_batch(apache, files.input))[0] == 0
        before = files.output.read_bytes()
        code, text = await run_batch(apache, files.input, kafka__bootstrap_servers="127.0.0.1:1")
        assert (code, files.output.read_bytes()) == (0, before), text
        write_lines(files.input, map(request, reversed(ids)))
        code, text = await run_batch(apache, files.input, "--sort")

    assert code == 0, text
    files.check(ids)
    assert [line["custom_id"] for line in lines_of(files.output)] == ids[::-1]
    assert calls_by_prompt(apache) == once(ids)
    assert files.leftovers() == []


@pytest.mark.long
async def test_batch_with_edited_lines_refuses_keeps_or_runs_them(apache: Stage, tmp_path: Path) -> None:
    """Nothing is sent before the caller has decided."""
    await open_stage(apache)
    files, ids = Files.of(tmp_path), ids_of(3)
    write_lines(files.input, map(request, ids))
    async with apache.worker():
        assert (await run_batch(apache, files.input))[0] == 0
        write_lines(files.input, [request(ids[0]), request(ids[1], "practice?deltas=3"), request(ids[2])])
        code, text = await run_batch(apache, files.input)
        assert (code, "edited since (line 2)" in text) == (2, True), text
        assert (await run_batch(apache, files.input, "--changed", "keep"))[0] == 0
        assert sum(calls_by_prompt(apache).values()) == 3
        assert (await run_batch(apache, files.input, "--changed", "rerun"))[0] == 0

    files.check(ids)
    assert calls_by_prompt(apache) == once(ids) | {f"prompt of {ids[1]}": 2}


async def test_batch_continues_after_kill_9(apache: Stage, tmp_path: Path) -> None:
    """The command is killed at random moments; every line is called once and is in one file."""
    await open_stage(apache)
    files, ids = Files.of(tmp_path), ids_of(300)
    write_lines(files.input, (request(custom_id, SLOW) for custom_id in ids))
    random_ = random.Random(7)
    async with apache.worker():
        for _ in range(3):
            command = await start_batch(apache, files.input, "--window", "40")
            await eventually(lambda: files.part.exists() or files.output.exists(), what=lambda: command.text)  # noqa: B023
            await asyncio.sleep(random_.uniform(0, 0.7))
            await command.kill()
        with files.part.open("ab") as part:  # as a full disk or a crash of the machine may leave it
            part.write(b'{"id":"batch_req_sw00')
        code, text = await run_batch(apache, files.input)

    assert code == 0, text
    files.check(ids)
    assert calls_by_prompt(apache) == once(ids)
    assert files.leftovers() == []


@pytest.mark.long
async def test_batch_without_its_files_collects_by_its_name(apache: Stage, tmp_path: Path) -> None:
    """A pod that lost its volume: the name alone finds what was submitted and how it ended."""
    await open_stage(apache)
    files, ids = Files.of(tmp_path), ids_of(30)
    write_lines(files.input, map(request, ids))
    async with apache.worker():
        assert (await run_batch(apache, files.input, "--batch-id", "nightly"))[0] == 0
        first = sorted(files.output.read_bytes().splitlines())
        files.output.unlink()
        code, text = await run_batch(apache, files.input, "--batch-id", "nightly")

    assert code == 0, text
    assert sorted(files.output.read_bytes().splitlines()) == first
    assert calls_by_prompt(apache) == once(ids)


async def test_batch_reads_standard_input_and_writes_standard_output(apache: Stage, tmp_path: Path) -> None:
    """In a pipe, errors are among the results; progress is on standard error."""
    await open_stage(apache)
    lines = [request("a"), request("b", "practice?status=400")]
    async with apache.worker():
        command = await start_batch(apache, "-", stdin=asyncio.subprocess.PIPE)
        assert command.child.stdin is not None
        command.child.stdin.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        command.child.stdin.close()
        code = await command.ends()

    assert code == 1, command.text
    written = [json.loads(line) for line in command.output.splitlines()]
    assert {line["custom_id"]: line["error"] is None for line in written} == {"a": True, "b": False}


@pytest.mark.long
async def test_batch_lets_one_run_write_an_output(apache: Stage, tmp_path: Path) -> None:
    """A second one on the same files, or elsewhere under the same name, ends with code 2 and submits nothing."""
    await open_stage(apache)
    files, other = Files.of(tmp_path), Files.of(tmp_path, "other")
    ids = ids_of(60)
    write_lines(files.input, (request(custom_id, "practice?deltas=3&pace_ms=300") for custom_id in ids))
    other.input.write_bytes(files.input.read_bytes())
    async with apache.worker():
        first = await start_batch(apache, files.input, "--batch-id", "n", "--window", "2")
        await eventually(lambda: bool(apache.practice.calls), what=lambda: first.text)
        code, text = await run_batch(apache, files.input, "--batch-id", "n")
        assert (code, "another run writes" in text) == (2, True), text
        second = await start_batch(apache, other.input, "--batch-id", "n", "--window", "60")
        codes = (await first.ends(), await second.ends())

    assert codes == (2, 0), first.text + second.text
    assert "another run is active" in first.text
    assert calls_by_prompt(apache) == once(ids)
    assert Counter(line["custom_id"] for line in lines_of(other.output)) == Counter(ids)


@pytest.mark.long
async def test_batch_runs_failed_lines_again(apache: Stage, tmp_path: Path) -> None:
    """`--retry-failed` runs the retriable lines under new ids; `all` runs the others, too."""
    await open_stage(apache)
    files, ids = Files.of(tmp_path), ids_of(5)
    models = [
        "practice",
        "practice?break_after=1&times=1",
        "practice?status=400&times=1",
        "practice",
        "practice",
    ]
    write_lines(files.input, (request(*pair) for pair in zip(ids, models, strict=True)))
    async with apache.worker():
        code, text = await run_batch(apache, files.input, "--on-break", "fail")
        assert (code, len(lines_of(files.errors))) == (1, 2), text
        code, text = await run_batch(apache, files.input, "--on-break", "fail", "--retry-failed")
        assert (code, [line["custom_id"] for line in lines_of(files.errors)]) == (1, [ids[2]]), text
        code, text = await run_batch(apache, files.input, "--on-break", "fail", "--retry-failed=all")

    assert code == 0, text
    files.check(ids)
    assert calls_by_prompt(apache) == once(ids) | {f"prompt of {one}": 2 for one in ids[1:3]}
    assert files.leftovers() == []


@pytest.mark.long
async def test_batch_writes_faulty_lines_to_the_error_file_if_asked_to(apache: Stage, tmp_path: Path) -> None:
    """Otherwise it names them and sends nothing."""
    await open_stage(apache)
    files = Files.of(tmp_path)
    files.input.write_text(
        "\n".join(
            [
                json.dumps(request("a")),
                "{",
                "",
                json.dumps(request("a")),
                json.dumps(request("b") | {"method": "GET"}),
            ]
        )
    )
    async with apache.worker():
        code, text = await run_batch(apache, files.input)
        assert code == 2
        assert "line 2: invalid_json_line" in text
        assert "line 4: duplicate_custom_id: custom_id is that of line 1" in text
        assert "line 5: invalid_method" in text
        code, text = await run_batch(apache, files.input, "--skip-invalid")
        again, _ = await run_batch(apache, files.input, "--skip-invalid")

    assert (code, again) == (1, 1), text
    assert [line["custom_id"] for line in lines_of(files.output)] == ["a"]
    errors = {line["error"]["code"]: line for line in lines_of(files.errors)}
    assert errors.keys() == {"invalid_json_line", "duplicate_custom_id", "invalid_method"}
    assert errors["invalid_json_line"]["line"] == 2
    assert sum(calls_by_prompt(apache).values()) == 1


# Signals


async def test_batch_ctrl_c_waits_for_what_is_in_flight(apache: Stage, tmp_path: Path) -> None:
    """Nothing more is submitted, and what was is written; the next start runs the rest."""
    await open_stage(apache)
    files, ids = Files.of(tmp_path), ids_of(30)
    write_lines(files.input, (request(custom_id, "practice?deltas=3&pace_ms=300") for custom_id in ids))
    async with apache.worker():
        command = await start_batch(apache, files.input, "--window", "10")
        await eventually(lambda: len(apache.practice.calls) >= 5, what=lambda: command.text)
        command.send(signal.SIGINT)
        code = await command.ends()
        assert code == 3, command.text
        assert "stopping: 10 in flight; Ctrl-C again cancels them" in command.text
        done = len(lines_of(files.part))
        assert done == sum(calls_by_prompt(apache).values()) < 30
        assert (await run_batch(apache, files.input))[0] == 0

    files.check(ids)
    assert calls_by_prompt(apache) == once(ids)


def with_text(stage: Stage) -> set[str]:
    """Return the ids of the jobs that have a delta."""
    return {record.event["job_id"] for record in stage.records if record.event["type"] == "delta"}


async def test_batch_second_ctrl_c_cancels_what_is_in_flight(apache: Stage, tmp_path: Path) -> None:
    """Cancelled lines are in the error file with the text that was paid for; the exit code is 130."""
    await open_stage(apache)
    files, ids = Files.of(tmp_path), ids_of(10)
    write_lines(files.input, (request(custom_id, ENDLESS) for custom_id in ids))
    async with apache.worker():
        command = await start_batch(apache, files.input, "--window", "4")
        await apache.until(lambda: len(with_text(apache)) == 4)
        command.send(signal.SIGINT)
        await command.says("stopping: 4 in flight")
        command.send(signal.SIGINT)
        code = await command.ends()

    assert code == 130, command.text
    part = lines_of(files.errors.with_name(files.errors.name + ".part"))
    assert [line["error"]["code"] for line in part] == ["batch_cancelled"] * 4
    assert all("partial" in line for line in part)
    assert len(apache.practice.calls) == 4


async def test_batch_sigterm_leaves_what_is_in_flight_to_the_next_start(
    apache: Stage, tmp_path: Path
) -> None:
    """It ends at once with code 3; its jobs end meanwhile, and are collected without being paid for again."""
    await open_stage(apache)
    files, ids = Files.of(tmp_path), ids_of(8)
    write_lines(files.input, (request(custom_id, "practice?deltas=4&pace_ms=400") for custom_id in ids))
    async with apache.worker():
        command = await start_batch(apache, files.input)
        await eventually(lambda: apache.practice.open_streams == 8, what=lambda: command.text)
        command.send(signal.SIGTERM)
        assert await command.ends(10) == 3, command.text
        assert lines_of(files.part) == []
        code, text = await run_batch(apache, files.input)

    assert code == 0, text
    files.check(ids)
    assert calls_by_prompt(apache) == once(ids)


@pytest.mark.long
async def test_batch_cancel_ends_what_a_former_start_left_in_flight(apache: Stage, tmp_path: Path) -> None:
    """The lines that were not submitted stay for a later run."""
    await open_stage(apache)
    files, ids = Files.of(tmp_path), ids_of(6)
    write_lines(files.input, (request(custom_id, ENDLESS) for custom_id in ids))
    async with apache.worker():
        command = await start_batch(apache, files.input, "--window", "3")
        await eventually(lambda: apache.practice.open_streams == 3, what=lambda: command.text)
        await command.kill()
        code, text = await run_batch(apache, files.input, "--cancel")

    assert code == 3, text
    part = lines_of(files.errors.with_name(files.errors.name + ".part"))
    assert [line["error"]["code"] for line in part] == ["batch_cancelled"] * 3
    assert len(apache.practice.calls) == 3


# Limits


async def test_batch_stops_after_its_errors(apache: Stage, tmp_path: Path) -> None:
    """`--max-errors` submits nothing more, writes what was submitted, and asks to be run again."""
    await open_stage(apache)
    files = Files.of(tmp_path)
    write_lines(files.input, (request(custom_id, "practice?status=400") for custom_id in ids_of(100)))
    async with apache.worker():
        code, text = await run_batch(apache, files.input, "--max-errors", "5", "--window", "10")

    assert code == 3
    assert "(--max-errors 5)" in text
    assert 5 <= len(apache.practice.calls) <= 20


async def test_batch_expires(apache: Stage, tmp_path: Path) -> None:
    """Lines that were not submitted, and jobs that run, end as `batch_expired`; the run is finished."""
    await open_stage(apache)
    files, ids = Files.of(tmp_path), ids_of(6)
    write_lines(files.input, (request(custom_id, ENDLESS) for custom_id in ids))
    async with apache.worker():
        code, text = await run_batch(apache, files.input, "--window", "3", "--expires-in", "2s")

    assert code == 1, text
    _, failed = files.check(ids)
    assert [line["error"]["code"] for line in failed] == ["batch_expired"] * 6
    assert len(apache.practice.calls) == 3


@pytest.mark.long
async def test_batch_reports_that_no_worker_runs(apache: Stage, tmp_path: Path) -> None:
    """After ten seconds without a started job. SIGTERM ends the wait."""
    await open_stage(apache)
    files = Files.of(tmp_path)
    write_lines(files.input, [request("a")])
    command = await start_batch(apache, files.input)
    await command.says("no job has started for 10 s", 40)
    command.send(signal.SIGTERM)

    assert await command.ends(10) == 3
    assert "batch: 0/1 done, 0 failed, 1 in flight" in command.text


async def test_batch_of_a_result_over_the_size_limit_reads_its_completion_from_the_events(
    apache: Stage, tmp_path: Path
) -> None:
    """The results topic omits it; the output line has it."""
    await open_stage(apache)
    files = Files.of(tmp_path)
    write_lines(files.input, [request("big", "practice?big_delta=60000&deltas=3"), request("small")])
    async with apache.worker(kafka__max_result_bytes=50_000, kafka__max_record_bytes=200_000):
        code, text = await run_batch(apache, files.input)

    assert code == 0, text
    completed, _ = files.check(["big", "small"])
    sizes = {
        line["custom_id"]: len(line["response"]["body"]["choices"][0]["message"]["content"])
        for line in completed
    }
    assert sizes["big"] > 50_000


async def test_batch_without_a_broker_ends_with_the_reason(apache: Stage, tmp_path: Path) -> None:
    """Code 3: the same command may succeed later."""
    files = Files.of(tmp_path)
    write_lines(files.input, [request("a")])
    code, text = await run_batch(
        apache, files.input, "--timeout", "3", kafka__bootstrap_servers="127.0.0.1:1"
    )

    assert code == 3
    assert "run the same command again" in text
    assert files.leftovers() == []


async def test_batch_with_a_missing_topic_ends_with_the_reason(apache: Stage, tmp_path: Path) -> None:
    """Code 2, at once: a person has to create the topic."""
    files = Files.of(tmp_path)
    write_lines(files.input, [request("a")])
    code, text = await run_batch(apache, files.input)

    assert code == 2
    assert "topics create" in text


@pytest.mark.long
async def test_batch_lists_lines_whose_records_retention_has_deleted(apache: Stage, tmp_path: Path) -> None:
    """They may have been paid for, so they are run again on request only."""
    await open_stage(apache)
    files, ids = Files.of(tmp_path), ids_of(8)
    write_lines(files.input, (request(custom_id, ENDLESS) for custom_id in ids))
    async with apache.worker(worker__drain_timeout_s=1):
        command = await start_batch(apache, files.input, "--window", "4")
        await eventually(lambda: apache.practice.open_streams == 4, what=lambda: command.text)
        await command.kill()
    everything = {KafkaTopicPartition(apache.jobs_topic, number): RecordsToDelete(-1) for number in (0, 1)}
    await apache._admin.delete_records(everything)
    code, text = await run_batch(apache, files.input)
    assert code == 3
    assert "--resubmit-unknown" in text
    calls = len(apache.practice.calls)
    async with apache.worker(
        worker__group_id=f"{apache.group}.2", worker__on_no_offset="earliest", worker__drain_timeout_s=1
    ):
        command = await start_batch(apache, files.input, "--resubmit-unknown", "--window", "8")
        await eventually(lambda: len(apache.practice.calls) >= calls + 8, what=lambda: command.text)
        await command.kill()


async def test_batch_on_a_full_disk_continues_when_there_is_room(apache: Stage, tmp_path: Path) -> None:
    """A small tmpfs in a user namespace: ENOSPC in the middle of a line ends with code 3; nothing is lost or paid twice."""
    if (unshare := own_mounts()) is None:
        pytest.skip("user namespaces are not available here")
    await open_stage(apache)
    files, ids = Files.of(tmp_path), ids_of(60)
    write_lines(files.input, (request(custom_id, "practice?big_delta=3000&deltas=2") for custom_id in ids))
    small = tmp_path / "small"
    small.mkdir()
    command = f'{sys.executable} -c "from streamworker.cli import main; main()" batch {files.input} -o {small}/out.jsonl'
    script = f"""
        mount -t tmpfs -o size=96k tmpfs {small}
        {command}; echo "first: $?" >&2
        tail -c 1 {small}/out.jsonl.part | od -An -c >&2
        mount -o remount,size=8m {small}
        {command} || exit 1
        cp {small}/out.jsonl {files.output}
    """
    async with apache.worker():
        child = await asyncio.create_subprocess_exec(
            *(unshare, "-Urm", "sh", "-c", script),
            env={**os.environ, **apache._environment({})},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await asyncio.wait_for(child.communicate(), 60)

    assert child.returncode == 0, errors.decode()
    assert b"No space left on device; make room and run the same command again" in errors
    assert b"first: 3\n  \\n\n" in errors, errors.decode()
    files.check(ids)
    assert calls_by_prompt(apache) == once(ids)
