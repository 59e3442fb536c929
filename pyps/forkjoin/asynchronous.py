"""ForkJoin for asyncio: the work is done on a thread, and cancelling ends it at the next token."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from typing_extensions import Unpack

from pyps.engine.generate import Stopped, never
from pyps.engine.sampling import Sampling
from pyps.forkjoin.events import Completion, Done, Event, Result
from pyps.forkjoin.forkjoin import ForkJoin
from pyps.forkjoin.request import Branch, Options
from pyps.prompts.layout import Message

T = TypeVar("T")


class AsyncForkJoin:
    """The async versions of a ForkJoin's run, stream and generate, with the same arguments, results and exceptions.

    Jobs that are started at once wait for each other: two would only share the same cores.
    """

    def __init__(self, fj: ForkJoin) -> None:
        self._fj = fj
        self._turn = asyncio.Lock()

    async def run(
        self, task: str | Sequence[Message], branches: Sequence[str | Branch] = (), **options: Unpack[Options]
    ) -> Result:
        """Run branches and synthesizer to the end, and return the result, as ForkJoin.run does."""
        async for event in self.stream(task, branches, **options):
            if isinstance(event, Done):
                return event.result
        raise AssertionError("a stream ends with Done")

    async def stream(
        self, task: str | Sequence[Message], branches: Sequence[str | Branch] = (), **options: Unpack[Options]
    ) -> AsyncIterator[Event]:
        """Run branches and synthesizer, and yield events as it goes, as ForkJoin.stream does."""
        async with self._turn, _thread() as call:
            events = await call(lambda: self._fj.stream(task, branches, **options))
            try:
                while (event := await call(lambda: next(events, None))) is not None:
                    yield event
            finally:
                await call(events.close)

    async def generate(
        self,
        prompts: Sequence[str],
        n: int = 1,
        *,
        chat: bool = False,
        sampling: Sampling | None = None,
        stopped: Stopped = never,
    ) -> list[Completion]:
        """Return n completions of each prompt, as ForkJoin.generate does."""
        cancelled = threading.Event()

        def ends() -> bool:
            return cancelled.is_set() or stopped()

        async with self._turn, _thread() as call:
            try:
                return await call(lambda: self._fj.generate(prompts, n, chat=chat, sampling=sampling, stopped=ends))
            finally:
                cancelled.set()


@asynccontextmanager
async def _thread() -> AsyncIterator[Callable[[Callable[[], T]], Awaitable[T]]]:
    """Yield a function that calls another one on a thread of its own.

    At the end the thread has nothing left to do: a model that is closed next is not in use any more.
    """
    loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(1)

    async def call(work: Callable[[], T]) -> T:
        return await loop.run_in_executor(pool, work)

    try:
        yield call
    finally:
        await call(lambda: None)
        pool.shutdown()
