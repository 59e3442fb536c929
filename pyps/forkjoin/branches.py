"""Finished branches whose caches are still there: to be joined, once or many times, or saved."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pyps.agents.tools import ToolCall
from pyps.engine.context import Context
from pyps.errors import InputError


@dataclass(frozen=True)
class BranchResult:
    """A finished branch. `text` and `tokens` are of what is joined; finish_reason "length" means max_tokens was reached
    (or the run was interrupted)."""

    name: str
    prompt: str
    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Cached:
    """One of them: spans [start, end) of a sequence's positions, in their order, and the tokens there. What is joined
    of a branch with tools may be several spans."""

    result: BranchResult
    seq: int
    spans: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]


class Branches:
    """What `ForkJoin.fork` and `ForkJoin.load` give, and `run(…, keep=True)` for its answer. Holds a context: close it,
    or use `with`.

    Attributes:
        results: name, prompt, text and length of each.
    """

    def __init__(self, ctx: Context, cached: Sequence[Cached]) -> None:
        self._ctx = ctx
        self.cached = tuple(cached)

    @property
    def results(self) -> tuple[BranchResult, ...]:
        return tuple(c.result for c in self.cached)

    @property
    def ctx(self) -> Context:
        """The context they are in. Raises InputError once closed."""
        self._ctx.pointer  # noqa: B018
        return self._ctx

    def named(self, name: str) -> "Branches":
        """The same ones under a name."""
        return Branches(self._ctx, [replace(c, result=replace(c.result, name=name)) for c in self.cached])

    def __len__(self) -> int:
        return len(self.cached)

    def __enter__(self) -> "Branches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._ctx.close()


def as_list(branches: "Branches | Sequence[Branches]") -> list[Branches]:
    """One or several. Raises InputError for anything else."""
    found = [branches] if isinstance(branches, Branches) else list(branches)
    for item in found:
        if not isinstance(item, Branches):
            raise InputError(f"only Branches can be joined (from fork, load or keep=True), not {type(item).__name__}")
    return found
