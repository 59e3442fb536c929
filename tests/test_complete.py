"""Many prompts at once, and the async versions."""

import asyncio
from pathlib import Path

import pytest

from pyps import AsyncForkJoin, BranchToken, ForkJoin, InputError, Sampling

GREEDY = Sampling(temperature=0, repeat_penalty=1, max_tokens=12)
PROMPTS = ["The capital of France is", "The capital of Italy is", "Once upon a time", "The capital of France is"]


def test_each_prompt_as_if_it_were_alone(smollm2_path: Path) -> None:
    with ForkJoin.from_pretrained(str(smollm2_path)) as fj:
        at_once = fj.generate(PROMPTS, sampling=GREEDY)
        alone = [fj.generate([prompt], sampling=GREEDY)[0] for prompt in PROMPTS]
        assert at_once == alone
        assert "Paris" in at_once[0].text
        chat = fj.generate(["Say hello. <|im_end|>"], chat=True, sampling=GREEDY)
        assert chat[0].text
        assert chat[0] != fj.generate(["Say hello. <|im_end|>"], sampling=GREEDY)[0]


def test_more_than_one_batch_and_several_of_each(tiny_path: Path) -> None:
    sampling = Sampling(seed=3, max_tokens=6, ignore_eos=True)
    with ForkJoin.from_pretrained(str(tiny_path)) as fj:
        many = fj.generate([f"Number {i}" for i in range(40)], 2, sampling=sampling)
        assert len(many) == 80
        assert all(c.tokens == 6 and c.finish_reason == "length" for c in many)
        one = fj.generate(["Number 0"], 2, sampling=sampling)
        assert one == many[:2]
        assert one[0] != one[1], "each has a seed of its own"
        assert fj.generate([]) == []
        assert all(c.tokens <= 1 for c in fj.generate(["a", "b"], sampling=sampling, stopped=lambda: True))


def test_refused(tiny_path: Path) -> None:
    with ForkJoin.from_pretrained(str(tiny_path)) as fj:
        for prompts, n, message in (
            ("abc", 1, "list of texts"),
            (["a"], 0, "at least 1"),
            (["a" * 9000], 1, "may need"),
        ):
            with pytest.raises(InputError, match=message):
                fj.generate(prompts, n)


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
        assert events[-1].result.answer == want.answer
        with pytest.raises(InputError, match="no branches"):
            await asynchronous.run("Go")

    with ForkJoin.from_pretrained(str(tiny_path)) as fj:
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
        await stream.aclose()
        for work in (asynchronous.run("Go", ["a"], sampling=endless), asynchronous.generate(["Go"], sampling=endless)):
            task = asyncio.create_task(work)
            await asyncio.sleep(0.5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not [ctx for ctx in fj.model.contexts if ctx._pointer is not None]
        assert (await asynchronous.generate(["Go"], sampling=Sampling(max_tokens=2)))[0].tokens <= 2

    with ForkJoin.from_pretrained(str(smollm2_path)) as fj:
        asyncio.run(cancel(fj))
