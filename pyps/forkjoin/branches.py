"""Finished branches whose caches are still there: to be joined, once or many times, or saved."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyps.agents.tools import ToolCall
from pyps.engine.context import Context
from pyps.engine.generate import FinishReason
from pyps.errors import InputError
from pyps.forkjoin.synthesis import Output


@dataclass(frozen=True)
class BranchResult:
    """What came of a branch.

    Attributes:
        name: Its name.
        prompt: Its instruction.
        text: The text of what is joined.
        tokens: The number of tokens of what is joined.
        finish_reason: "stop"; "length" if max_tokens was reached, or the run was interrupted; "error" if it failed.
        calls: Its calls of tools.
        error: What went wrong, with the finish reason "error".
    """

    name: str
    prompt: str
    text: str
    tokens: int
    finish_reason: FinishReason
    calls: tuple[ToolCall, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Cached:
    """A finished branch: its result, and where its cells are.

    Attributes:
        result: What came of it.
        seq: Its sequence.
        spans: What of it is joined, as stretches [start, end) of positions in their order. A branch with tools may have
            several.
        tokens: The tokens there.
    """

    result: BranchResult
    seq: int
    spans: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]


class Branches:
    """Finished branches with their caches.

    `ForkJoin.fork` and `ForkJoin.load` return them, and `run(…, keep=True)` for its answer. They hold a context: close
    them, or use `with`.

    Attributes:
        cached: Each branch, and where its cells are.
    """

    def __init__(self, ctx: Context, cached: Sequence[Cached]) -> None:
        self._ctx = ctx
        self.cached = tuple(cached)

    @property
    def results(self) -> tuple[BranchResult, ...]:
        """Name, instruction, text and length of each."""
        return tuple(branch.result for branch in self.cached)

    @property
    def ctx(self) -> Context:
        """The context that holds the cells. Raises InputError once closed."""
        self._ctx.pointer  # noqa: B018
        return self._ctx

    @property
    def outputs(self) -> list[Output]:
        """Where the cells of each lie, without branches that said nothing. Raises InputError once closed."""
        return [Output(self.ctx, b.seq, b.spans, b.tokens, b.result.name) for b in self.cached if b.tokens]

    def named(self, name: str) -> "Branches":
        """Return the same branches with `name` as their name."""
        return Branches(self._ctx, [replace(c, result=replace(c.result, name=name)) for c in self.cached])

    def __len__(self) -> int:
        return len(self.cached)

    def __enter__(self) -> "Branches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the context."""
        self._ctx.close()


def as_list(branches: "Branches | Sequence[Branches]") -> list[Branches]:
    """Return one or several Branches as a list. Raises InputError for anything else."""
    items = [branches] if isinstance(branches, Branches) else list(branches)
    for item in items:
        if not isinstance(item, Branches):
            raise InputError(f"only Branches can be joined (from fork, load or keep=True), not {type(item).__name__}")
    return items
