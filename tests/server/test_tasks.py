"""What runs in the background always ends when it is told to."""

from __future__ import annotations

import asyncio

from aq_server.service import tasks


def test_a_cancellation_that_a_library_swallows_is_repeated(monkeypatch):
    monkeypatch.setattr(tasks, "AGAIN_SECONDS", 0.05)
    swallowed = 0

    async def hard_of_hearing() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 3:
                    raise

    async def main() -> None:
        running = asyncio.create_task(hard_of_hearing())
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await tasks.stop([running])

    asyncio.run(main())
    assert swallowed == 3


def test_a_task_has_time_to_clear_up_and_what_it_raises_is_dropped(caplog):
    cleared = []

    async def failing() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            cleared.append(True)
            raise ValueError("while it cleared up")

    async def ended() -> None:
        pass

    async def main() -> None:
        running = [asyncio.create_task(failing()), asyncio.create_task(ended())]
        await asyncio.sleep(0)
        await tasks.stop(running)
        assert all(task.done() for task in running)
        await tasks.stop([])

    asyncio.run(main())
    assert cleared == [True]
    assert not caplog.records
