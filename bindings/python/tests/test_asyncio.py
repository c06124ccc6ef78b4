"""Events and texts for asyncio: no thread waits, and cancelled tasks cancel requests."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

import redraft

PROMPT = "Once upon a time"


def test_texts_and_events(engine: redraft.Engine) -> None:
    whole = engine.generate(PROMPT, length=40, seed=7, schedule="did")

    async def main() -> None:
        assert (await engine.agenerate(PROMPT, length=40, seed=7, schedule="did")).text == whole.text
        text, snapshots, done = "", 0, None
        async for event in engine.astream(PROMPT, length=40, seed=7, schedule="did"):
            if isinstance(event, redraft.Delta):
                text += event.text
            elif isinstance(event, redraft.Snapshot):
                snapshots += 1
            else:
                done = event.generation
        assert done is not None and text == done.text == whole.text and snapshots > 0

    asyncio.run(main())


def num_threads() -> int:
    """All threads of the process, those of the native module included, where the system lists them."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()


def test_tasks_share_a_batch_and_need_no_threads(engine: redraft.Engine) -> None:
    alone = [engine.generate("One day", length=16, seed=seed).text for seed in range(20)]

    async def main() -> list[str]:
        # The thread that makes the calls is there from the first wait on.
        await engine.agenerate("One day", length=4)
        before = num_threads()
        tasks = [asyncio.create_task(engine.agenerate("One day", length=16, seed=seed)) for seed in range(20)]
        turns = 0
        while not all(task.done() for task in tasks):
            # The loop turns meanwhile.
            turns += 1
            await asyncio.sleep(0.001)
        assert turns > 1 and num_threads() == before
        return [task.result().text for task in tasks]

    assert asyncio.run(main()) == alone


def test_a_cancelled_task_cancels_its_request(engine: redraft.Engine) -> None:
    async def main() -> None:
        async def read() -> None:
            async for _ in engine.astream("One day", length=400, ignore_eos=True):
                pass

        for work in (engine.agenerate("One day", length=400, ignore_eos=True), read()):
            task: asyncio.Task[object] = asyncio.create_task(work)
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            deadline = time.monotonic() + 20
            while engine.stats["running"] + engine.stats["queued"] > 0:
                assert time.monotonic() < deadline, engine.stats
                await asyncio.sleep(0.01)
        # A stream that is left in the middle.
        async with engine.astream("One day", length=400, ignore_eos=True) as stream:
            assert isinstance(await stream.__anext__(), redraft.Snapshot)
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()

    asyncio.run(main())


def test_refused_requests(engine: redraft.Engine) -> None:
    async def main() -> None:
        with pytest.raises(redraft.RequestError, match="top_p"):
            await engine.agenerate("a", top_p=3)
        with pytest.raises(redraft.RequestError, match="presets"):
            async for _ in engine.astream("a", schedule="best"):
                pass

    asyncio.run(main())


def test_a_loop_that_ends_early(engine: redraft.Engine) -> None:
    """Wakes for a loop that is closed are lost without a word."""

    async def main() -> None:
        stream = engine.astream(PROMPT, length=100, seed=7, ignore_eos=True)
        task = asyncio.create_task(_first(stream))
        await asyncio.sleep(0)
        task.cancel()

    async def _first(stream: redraft.AsyncStream) -> None:
        await stream.__anext__()

    asyncio.run(main())
    assert engine.generate("One day", length=4).text
