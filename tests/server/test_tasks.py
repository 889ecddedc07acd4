"""What runs in the background always ends when it is told to."""

from __future__ import annotations

import asyncio

import pytest
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


async def numbers(count: int):
    for i in range(count):
        yield i


def test_what_is_made_ahead_comes_in_order_and_no_more_than_so_many_at_a_time():
    running, most = 0, 0

    async def work(i: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01 * (5 - i % 5))
        running -= 1
        return i * i

    async def main() -> list[int]:
        assert [made async for made in tasks.ahead(numbers(0), work, 4)] == []
        return [made async for made in tasks.ahead(numbers(30), work, 4)]

    assert asyncio.run(main()) == [i * i for i in range(30)]
    assert most == 4


def test_the_first_failure_stops_what_is_under_way():
    ended = []

    async def work(i: int) -> int:
        try:
            if i == 2:
                raise ValueError("this one")
            await asyncio.sleep(0.01 if i < 2 else 60)
        finally:
            ended.append(i)
        return i

    async def main() -> list[int]:
        made = []
        with pytest.raises(ValueError, match="this one"):
            async for i in tasks.ahead(numbers(9), work, 4):
                made.append(i)
        assert sorted(ended) == list(range(len(ended))), "somebody is still at work"
        return made

    assert asyncio.run(main()) == [0, 1]
    assert len(ended) >= 4
