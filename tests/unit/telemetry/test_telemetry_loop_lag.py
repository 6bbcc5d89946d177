"""Event-loop lag, on a loop that is really held up."""

import asyncio
import time

from streamworker.telemetry import LoopLag


async def test_stall_is_seen_while_the_window_lasts_and_then_forgotten() -> None:
    lag = LoopLag(interval_s=0.01, window_s=0.1)
    lag.start()
    await asyncio.sleep(0.03)
    time.sleep(0.3)  # noqa: ASYNC251 - the stall
    await asyncio.sleep(0.03)
    assert lag.lag_s >= 0.25
    while lag.lag_s >= 0.25:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.02)
    lag.stop()


async def test_stall_that_is_not_over_counts() -> None:
    lag = LoopLag(interval_s=0.01)
    lag.start()
    time.sleep(0.2)  # noqa: ASYNC251 - the stall
    assert lag.lag_s >= 0.15
    lag.stop()


async def test_stopped_measures_nothing() -> None:
    lag = LoopLag(interval_s=0.01)
    lag.stop()
    lag.start()
    lag.start()
    lag.stop()
    lag.stop()
    time.sleep(0.05)  # noqa: ASYNC251 - the stall
    await asyncio.sleep(0.02)
    assert lag.lag_s == 0
