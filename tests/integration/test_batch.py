"""`streamworker batch` against Apache Kafka, the worker and the practice upstream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.integration.batches import Files, calls_by_prompt, request, run_batch, write_lines

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.stage import Stage


async def test_batch_writes_every_line_into_one_of_two_files(apache: Stage, tmp_path: Path) -> None:
    """Completed lines are OpenAI's output lines, failed ones have code, message and the upstream's own error."""
    await apache.open(partitions=2, results_topic=f"{apache.events_topic}.results")
    files = Files.of(tmp_path)
    ids = [f"request-{number}" for number in range(40)]
    lines = [request(custom_id) for custom_id in ids[:-2]]
    lines += [request(ids[-2], "practice?status=400"), request(ids[-1], "practice?break_after=2")]
    write_lines(files.input, lines)
    async with apache.worker():
        code, text = await run_batch(apache, files.input, "--on-break", "fail", "--window", "10")

    assert code == 1, text
    completed, failed = files.check(ids)
    assert len(completed) == 38
    by_id = {line["custom_id"]: line for line in failed}
    assert by_id[ids[-2]]["error"]["code"] == "upstream_rejected"
    assert by_id[ids[-2]]["response"]["status_code"] == 400
    assert by_id[ids[-1]]["partial"]["choices"]
    assert calls_by_prompt(apache) == {f"prompt of {custom_id}": 1 for custom_id in ids}
    assert files.leftovers() == []
    assert "40 lines: 38 completed, 2 failed" in text
