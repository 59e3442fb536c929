"""What a fork-join is asked for: its branches and its options, each described once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from pyps.agents.tools import JoinedPart, Limits, Tool
from pyps.engine.generate import Stopped, never
from pyps.engine.sampling import Sampling
from pyps.forkjoin.branches import Branches
from pyps.forkjoin.events import Mode
from pyps.forkjoin.reading import Read
from pyps.prompts.layout import DEFAULT_SYNTHESIZE, Message


@dataclass(frozen=True)
class Branch:
    """One branch.

    Attributes:
        prompt: Its instruction; empty for a plain sample of the task.
        name: Its name; None for branch-1, branch-2, …
        sampling: How it is sampled; None for the run's sampling.
        tools: What it may call before it answers.
        limits: How often and how long it may call.
        joined: What of it the synthesizer receives: its answer ("final"), its calls too ("generated"), or these and the
            tools' results ("everything").
        task: A task of its own instead of the run's: a text, or messages; None for the run's.
        system: A system message of its own; None for the run's.
    """

    prompt: str = ""
    name: str | None = None
    sampling: Sampling | None = None
    tools: tuple[Tool, ...] = ()
    limits: Limits = field(default_factory=Limits)
    joined: JoinedPart = "final"
    task: str | Sequence[Message] | None = None
    system: str | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """A fork-join, as it is asked for. All but task and branches are the options of ForkJoin.run and stream.

    Attributes:
        task: What the job is about; every branch and the synthesizer see it. A text, or a conversation: messages with
            role ("system", "user", "assistant", "tool") and content.
        branches: Up to 256 instructions, or Branch objects.
        join: Finished branches, of earlier runs or from files, which come before these; they stay as they are, and
            open. There must be at least one branch of either kind.
        system: The system message; None for the model's own default, or the conversation's.
        synthesize: The synthesizer's instruction.
        mode: "cache" joins the branches' caches; "text" pastes their texts and reads them again.
        compare: In cache mode, run text synthesis on the same branches afterwards.
        read: In cache mode, the share of the branches' tokens that the synthesizer reads again, 0 to 1; "auto" for what
            the adapter was trained for, or for what this model was found to need to answer as from texts; None for what
            the ForkJoin says.
        sampling: Of the branches; None for the defaults. Branches get consecutive seeds.
        answer: Sampling of the answer; None for that of the branches. Its seed is the first branch's if it has none.
        save: A file for the branches that this run generates, to be joined later (ForkJoin.load).
        keep: In cache mode, keep the answer's cache: the result's `kept`, to be joined to others, or to go on from
            (Chat). Close it.
        room: Tokens that there should be room for after the answer.
        tools: What the synthesizer may call before it answers.
        limits: How often and how long it may call.
        stopped: Asked at every token; once true, the run ends early with what there is.
    """

    task: str | Sequence[Message]
    branches: Sequence[str | Branch] = ()
    join: Branches | Sequence[Branches] = ()
    system: str | None = None
    synthesize: str = DEFAULT_SYNTHESIZE
    mode: Mode = "cache"
    compare: bool = False
    read: Read | None = None
    sampling: Sampling | None = None
    answer: Sampling | None = None
    save: Path | None = None
    keep: bool = False
    room: int = 0
    tools: Sequence[Tool] = ()
    limits: Limits | None = None
    stopped: Stopped = never


class Options(TypedDict, total=False):
    """The options of ForkJoin.run and stream, for type checkers; Request describes them."""

    join: Branches | Sequence[Branches]
    system: str | None
    synthesize: str
    mode: Mode
    compare: bool
    read: Read | None
    sampling: Sampling | None
    answer: Sampling | None
    save: Path | None
    keep: bool
    room: int
    tools: Sequence[Tool]
    limits: Limits | None
    stopped: Stopped
