"""ForkJoin for asyncio: the work is done on a thread, and cancelling ends it at the next token."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pyps.forkjoin import Branch, ForkJoin
from pyps.forkjoin.events import Completion, Done, Event, Result

T = TypeVar("T")


class AsyncForkJoin:
    """The async versions of a ForkJoin's run, stream and generate: same arguments, results and exceptions. Jobs given
    at once wait for each other: two would only share the same cores."""

    def __init__(self, fj: ForkJoin) -> None:
        self._fj = fj
        self._turn = asyncio.Lock()

    async def run(self, task: str, branches: Sequence[str | Branch] = (), **options: Any) -> Result:
        async for event in self.stream(task, branches, **options):
            if isinstance(event, Done):
                return event.result
        raise AssertionError("a stream ends with Done")

    async def stream(self, task: str, branches: Sequence[str | Branch] = (), **options: Any) -> AsyncIterator[Event]:
        async with self._turn, _thread() as call:
            events = await call(lambda: self._fj.stream(task, branches, **options))
            try:
                while (event := await call(lambda: next(events, None))) is not None:
                    yield event
            finally:
                await call(events.close)  # type: ignore[attr-defined]  # it is a generator

    async def generate(self, prompts: Sequence[str], n: int = 1, **options: Any) -> list[Completion]:
        cancelled = threading.Event()
        asked: Callable[[], bool] = options.pop("stopped", lambda: False)
        async with self._turn, _thread() as call:
            try:
                return await call(
                    lambda: self._fj.generate(prompts, n, stopped=lambda: cancelled.is_set() or asked(), **options)
                )
            finally:
                cancelled.set()


@asynccontextmanager
async def _thread() -> AsyncIterator[Callable[[Callable[[], T]], Awaitable[T]]]:
    """A function that calls another on a thread of its own. At the end it has nothing left to do: a model that is
    closed next is not in use any more."""
    loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(1)

    async def call(work: Callable[[], T]) -> T:
        return await loop.run_in_executor(pool, work)

    try:
        yield call
    finally:
        await call(lambda: None)
        pool.shutdown()
