"""The async versions: the same results, several at once, and cancelled."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from pyps import AsyncForkJoin, BranchToken, Done, ForkJoin, InputError, Sampling
from pyps.engine.context import Context


def test_async_versions_give_the_same(tiny_path: Path) -> None:
    sampling = Sampling(seed=1, max_tokens=10)

    async def together(fj: ForkJoin) -> None:
        asynchronous = AsyncForkJoin(fj)
        run, generated = await asyncio.gather(
            asynchronous.run("Go", ["a", "b"], sampling=sampling), asynchronous.generate(["x", "y"], sampling=sampling)
        )
        want = fj.run("Go", ["a", "b"], sampling=sampling)
        assert (run.answer, run.branches) == (want.answer, want.branches)
        assert generated == fj.generate(["x", "y"], sampling=sampling)
        events = [event async for event in asynchronous.stream("Go", ["a", "b"], sampling=sampling)]
        assert isinstance(events[-1], Done)
        assert events[-1].result.answer == want.answer
        with pytest.raises(InputError, match="no branches"):
            await asynchronous.run("Go")

    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj:
        asyncio.run(together(fj))


def test_async_cancelled(smollm2_path: Path) -> None:
    """It ends soon, nothing is in use afterwards, and the next job has its turn."""
    endless = Sampling(max_tokens=4000, ignore_eos=True)

    async def cancel(fj: ForkJoin) -> None:
        asynchronous = AsyncForkJoin(fj)
        seen = 0
        stream = asynchronous.stream("Go", ["a", "b"], sampling=endless)
        async for event in stream:
            seen += isinstance(event, BranchToken)
            if seen == 5:
                break
        assert isinstance(stream, AsyncGenerator)
        await stream.aclose()
        for work in (asynchronous.run("Go", ["a"], sampling=endless), asynchronous.generate(["Go"], sampling=endless)):
            task = asyncio.create_task(work)
            await asyncio.sleep(0.5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        for ctx in fj.model.contexts:
            assert isinstance(ctx, Context)
            with pytest.raises(InputError, match="closed"):
                ctx.synchronize()
        assert (await asynchronous.generate(["Go"], sampling=Sampling(max_tokens=2)))[0].tokens <= 2

    with ForkJoin.from_pretrained(str(smollm2_path), read=0) as fj:
        asyncio.run(cancel(fj))
