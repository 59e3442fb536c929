"""What a fork-join reports while it runs, and what it returns. Times are in milliseconds."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pyps.agents.tools import ToolCall
from pyps.forkjoin.branches import Branches, BranchResult

Mode = Literal["cache", "text"]


@dataclass(frozen=True)
class Completion:
    """What ForkJoin.generate gives for a prompt; fields as of a BranchResult."""

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Tokens:
    """Tokens of a synthesis: joined from caches, prefilled before the answer, generated as the answer."""

    joined: int
    prefilled: int
    generated: int


@dataclass(frozen=True)
class Timing:
    """branches: from the start to the last branch's last token. ttft: from there to the answer's first token; join and
    prefill lie inside it. total: everything, the loading of the model aside."""

    branches: float
    join: float
    prefill: float
    ttft: float
    total: float


@dataclass(frozen=True)
class Synthesis:
    """An answer, what it took, and the synthesizer's calls of tools."""

    answer: str
    tokens: Tokens
    timing_ms: Timing
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Result:
    """A fork-join's outcome. `compare` is the text synthesis of the same branches, and `kept` the answer with its
    cache, if asked for."""

    model: str
    adapter: str | None
    mode: Mode
    layout: str
    seed: int
    answer: str
    branches: tuple[BranchResult, ...]
    tokens: Tokens
    timing_ms: Timing
    compare: Synthesis | None = None
    interrupted: bool = False
    calls: tuple[ToolCall, ...] = ()
    kept: Branches | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the object that `pyps run --json` prints."""
        found = asdict(replace(self, kept=None))
        del found["kept"]
        return found


@dataclass(frozen=True)
class BranchToken:
    """A branch has generated a token; its text may be empty."""

    branch: int
    text: str


@dataclass(frozen=True)
class ToolCalled:
    """A call of a tool is over: a branch's, or the synthesizer's (None), whose `mode` is as of an AnswerToken."""

    branch: int | None
    call: ToolCall
    mode: Mode = "cache"


@dataclass(frozen=True)
class BranchDone:
    branch: int
    result: BranchResult


@dataclass(frozen=True)
class Joined:
    """The spans lie in the synthesizer's cache."""

    tokens: int
    ms: float


@dataclass(frozen=True)
class AnswerToken:
    """The answer has grown; `mode` tells the answer from the one it is compared with."""

    text: str
    mode: Mode = field(default="cache")


@dataclass(frozen=True)
class Done:
    result: Result


Event = BranchToken | ToolCalled | BranchDone | Joined | AnswerToken | Done
