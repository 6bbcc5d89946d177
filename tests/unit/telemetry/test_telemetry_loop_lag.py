"""Event-loop lag, on a loop that is blocked."""

import asyncio
import time

from streamworker.telemetry.loop_lag import LoopLag


async def test_lag_after_a_stall_is_reported_for_the_length_of_the_window() -> None:
    lag = LoopLag(interval_s=0.01, window_s=0.1)
    lag.start()
    await asyncio.sleep(0.03)
    time.sleep(0.3)  # noqa: ASYNC251 - the stall
    await asyncio.sleep(0.03)
    assert lag.lag_s >= 0.25
    while lag.lag_s >= 0.25:  # noqa: ASYNC110 - LoopLag has no event to wait for
        await asyncio.sleep(0.02)
    lag.stop()


async def test_lag_includes_a_stall_that_is_not_over() -> None:
    lag = LoopLag(interval_s=0.01)
    lag.start()
    time.sleep(0.2)  # noqa: ASYNC251 - the stall
    assert lag.lag_s >= 0.15
    lag.stop()


async def test_lag_after_stop_is_zero() -> None:
    lag = LoopLag(interval_s=0.01)
    lag.stop()
    lag.start()
    lag.start()
    lag.stop()
    lag.stop()
    time.sleep(0.05)  # noqa: ASYNC251 - the stall
    await asyncio.sleep(0.02)
    assert lag.lag_s == 0
