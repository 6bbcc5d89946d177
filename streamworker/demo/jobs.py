"""The jobs of the demo: answers in several languages, and jobs that fail in different ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode

from streamworker.demo import texts

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DemoJob", "practice_jobs", "real_jobs"]


class DemoJob(NamedTuple):
    """A job record, and how its panel is named.

    `goes_to_second`: the record's key selects a partition of the second worker, which the demo kills.
    """

    name: str
    title: str
    job_id: str
    value: dict[str, Any]
    goes_to_second: bool = False

    def key(self, is_of_second: Callable[[bytes], bool]) -> bytes:
        """Return a key whose partition belongs to the worker that shall run the job."""
        keys = (f"{self.name}-{number}".encode() for number in range(10_000))
        return next(key for key in keys if is_of_second(key) == self.goes_to_second)


def practice_jobs(run: str, *, speed: float = 1.0) -> list[DemoJob]:
    """Return jobs for the practice upstream, whose behaviour the model name selects. `speed` divides the pauses."""
    return [
        _job(run, "german", "streams an answer", texts.GERMAN, goes_to_second=True, pace_ms=int(85 / speed)),
        _job(
            run, "japanese", "streams an answer", texts.JAPANESE, goes_to_second=True, pace_ms=int(60 / speed)
        ),
        _job(run, "greek", "streams an answer", texts.GREEK, goes_to_second=True, pace_ms=int(85 / speed)),
        _job(run, "italian", "reasons first", texts.ITALIAN, pace_ms=int(130 / speed)),
        _job(run, "tool", "calls a tool", texts.LOOKUP, pace_ms=int(250 / speed), tool_calls=1),
        _job(
            run,
            "breaks",
            "breaks, keeps its text",
            texts.PORTUGUESE,
            pace_ms=int(120 / speed),
            break_after=15,
        ),
        _job(run, "refused", "the upstream refuses it", texts.LOOKUP, status=400),
        DemoJob(
            "invalid",
            "is not a valid job",
            f"{run}-invalid",
            {"job_id": f"{run}-invalid", "requst": {"model": "practice"}},
        ),
    ]


_PROMPTS = (
    ("sky", "Why is the sky blue? Three sentences."),
    ("haiku", "Write a haiku about queues."),
    ("count", "Conta da 1 a 10."),
    ("tea", "How do I make good tea? Short."),
)


def real_jobs(run: str, model: str) -> list[DemoJob]:
    """Return jobs for a real upstream."""
    return [_record(run, name, prompt, prompt, model) for name, prompt in _PROMPTS]


def _job(
    run: str,
    name: str,
    title: str,
    exchange: texts.Exchange,
    *,
    goes_to_second: bool = False,
    **options: str | int,
) -> DemoJob:
    script: dict[str, Any] = {**options, "text": exchange.answer}
    if exchange.thoughts:
        script["thoughts"] = exchange.thoughts
    if "status" in options:
        del script["text"]
    job = _record(run, name, title, exchange.question, f"practice?{urlencode(script)}")
    return job._replace(goes_to_second=goes_to_second)


def _record(run: str, name: str, title: str, prompt: str, model: str) -> DemoJob:
    job_id = f"{run}-{name}"
    request = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    value = {"job_id": job_id, "request": request, "metadata": {"demo": run}}
    return DemoJob(name, title, job_id, value)
