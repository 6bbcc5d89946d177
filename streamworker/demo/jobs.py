"""The jobs of the demo: several kinds of answers, and some jobs that fail."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["DemoJob", "practice_jobs", "real_jobs"]


class DemoJob(NamedTuple):
    """The value of a job record, and the title of its panel."""

    job_id: str
    title: str
    value: dict[str, Any] | None


_PRACTICE = (
    ("count", "counts to forty", "practice?deltas=40&pace_ms=60"),
    ("long", "a longer answer", "practice?deltas=90&pace_ms=35"),
    ("thinks", "reasons first", "practice?deltas=40&pace_ms=60&reasoning"),
    (
        "unblanked",
        "no blank lines between events",
        "practice?deltas=40&pace_ms=60&format=unblanked",
    ),
    ("breaks", "breaks after 15 words", "practice?deltas=40&pace_ms=60&break_after=15"),
    ("retried", "two 503s, then succeeds", "practice?deltas=30&pace_ms=40&status=503&times=2"),
    ("refused", "is refused with 400", "practice?status=400"),
)


def practice_jobs(run: str) -> list[DemoJob]:
    """Return jobs for the practice upstream, whose behaviour the model name selects."""
    jobs = [_job(run, name, title, model, "Conta da 1 a 10.") for name, title, model in _PRACTICE]
    return [
        *jobs,
        DemoJob(f"{run}-invalid", "is not a valid job", {"job_id": f"{run}-invalid", "requst": {}}),
    ]


_PROMPTS = (
    ("sky", "Why is the sky blue? Three sentences."),
    ("haiku", "Write a haiku about queues."),
    ("count", "Conta da 1 a 10."),
    ("tea", "How do I make good tea? Short."),
)


def real_jobs(run: str, model: str) -> list[DemoJob]:
    """Return jobs for a real upstream."""
    return [_job(run, name, prompt, model, prompt) for name, prompt in _PROMPTS]


def _job(run: str, name: str, title: str, model: str, prompt: str) -> DemoJob:
    job_id = f"{run}-{name}"
    request = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    return DemoJob(job_id, title, {"job_id": job_id, "request": request, "metadata": {"demo": run}})
