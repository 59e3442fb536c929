"""What a fork-join reports while it runs, and what it returns. Times are in milliseconds."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pyps.agents.tools import ToolCall
from pyps.engine.generate import FinishReason
from pyps.forkjoin.branches import Branches, BranchResult

Mode = Literal["cache", "text"]


@dataclass(frozen=True)
class Completion:
    """What ForkJoin.generate returns for a prompt. Its fields are those of a BranchResult."""

    text: str
    tokens: int
    finish_reason: FinishReason
    error: str | None = None


@dataclass(frozen=True)
class Tokens:
    """Tokens of a synthesis.

    Attributes:
        joined: Placed from caches.
        prefilled: Read before the answer: the prompt, and labels before the outputs.
        generated: Of the answer.
        again: Of the branches, read again instead of joined.
    """

    joined: int
    prefilled: int
    generated: int
    again: int = 0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of a run's parts.

    Attributes:
        branches: From the start to the last branch's last token.
        join: Placing the branches' cells.
        again: Reading tokens of the branches again, and labels.
        prefill: Reading the synthesizer's prompt, up to the answer's first token.
        ttft: From the last branch's last token to the answer's first; join, again and prefill lie inside it.
        total: Everything, the loading of the model aside.
    """

    branches: float = 0.0
    join: float = 0.0
    again: float = 0.0
    prefill: float = 0.0
    ttft: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """An answer, why it ended, what it took, the synthesizer's calls of tools, and why it read so much again."""

    answer: str
    finish_reason: FinishReason
    tokens: Tokens
    timing_ms: Timing
    calls: tuple[ToolCall, ...] = ()
    reading: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A fork-join's outcome.

    Attributes:
        model: The model's file name.
        adapter: The adapter's path, or None.
        mode: "cache" or "text": how the answer came about.
        layout: The prompt layout, "shared" or "paper".
        seed: The first branch's seed; the others have the next ones.
        answer: The answer's text.
        finish_reason: "stop" if the model ended its answer, "length" if it was cut at its limit or by an interruption.
        branches: The branches, joined ones of earlier runs first.
        tokens: What the synthesis took.
        timing_ms: Where the time went.
        compare: The text synthesis of the same branches, if it was asked for.
        interrupted: Whether `stopped` ended the run early.
        calls: The synthesizer's calls of tools.
        reading: In cache mode, why so many of the branches' tokens were read again.
        kept: The answer with its cache, if it was asked for. Close it.
    """

    model: str
    adapter: str | None
    mode: Mode
    layout: str
    seed: int
    answer: str
    finish_reason: FinishReason
    branches: tuple[BranchResult, ...]
    tokens: Tokens
    timing_ms: Timing
    compare: Synthesis | None = None
    interrupted: bool = False
    calls: tuple[ToolCall, ...] = ()
    reading: str = ""
    kept: Branches | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the object that `pyps run --json` prints."""
        values = asdict(replace(self, kept=None))
        del values["kept"]
        return values


@dataclass(frozen=True)
class BranchToken:
    """A branch has generated a token of its answer; the text may be empty."""

    branch: int
    text: str


@dataclass(frozen=True)
class ToolCalled:
    """A call of a tool is over: a branch's, or the synthesizer's (None). `mode` is that of an AnswerToken."""

    branch: int | None
    call: ToolCall
    mode: Mode = "cache"


@dataclass(frozen=True)
class BranchDone:
    """A branch has ended."""

    branch: int
    result: BranchResult


@dataclass(frozen=True)
class Joined:
    """The branches' cells lie in the synthesizer's cache, and some of their tokens were read again there."""

    tokens: int
    ms: float
    again: int = 0
    again_ms: float = 0.0


@dataclass(frozen=True)
class AnswerToken:
    """The answer has grown; `mode` tells the answer from the text synthesis that it is compared with."""

    text: str
    mode: Mode = "cache"


@dataclass(frozen=True)
class Done:
    """The run is over: the last event."""

    result: Result


Event = BranchToken | ToolCalled | BranchDone | Joined | AnswerToken | Done
