"""pyps: fork-join agent workflows on llama.cpp.

Branches generate in parallel; a synthesizer answers straight from their KV caches instead of re-reading their text.

    from pyps import ForkJoin
    with ForkJoin.from_pretrained("smollm2") as fj:
        result = fj.run("Which database should a small desktop app use?",
                        branches=["Argue for SQLite.", "Argue for PostgreSQL.", "Argue for DuckDB."])
        print(result.answer)
"""

from pyps.agents.tools import Limits, Tool, ToolCall, calculator, file_tools, sql_tools, tool
from pyps.engine.sampling import Sampling
from pyps.errors import EngineError, InputError, MachineError, PypsError, RefusedError
from pyps.forkjoin import Branch, ForkJoin
from pyps.forkjoin.asynchronous import AsyncForkJoin
from pyps.forkjoin.branches import Branches, BranchResult
from pyps.forkjoin.chat import Chat
from pyps.forkjoin.events import (
    AnswerToken,
    BranchDone,
    BranchToken,
    Completion,
    Done,
    Event,
    Joined,
    Result,
    Synthesis,
    Timing,
    Tokens,
    ToolCalled,
)
from pyps.forkjoin.slots import read_slots

__version__ = "0.1.0"

__all__ = [
    "AnswerToken",
    "AsyncForkJoin",
    "Branch",
    "BranchDone",
    "BranchResult",
    "BranchToken",
    "Branches",
    "Chat",
    "Completion",
    "Done",
    "EngineError",
    "Event",
    "ForkJoin",
    "InputError",
    "Joined",
    "Limits",
    "MachineError",
    "PypsError",
    "RefusedError",
    "Result",
    "Sampling",
    "Synthesis",
    "Timing",
    "Tokens",
    "Tool",
    "ToolCall",
    "ToolCalled",
    "calculator",
    "file_tools",
    "read_slots",
    "sql_tools",
    "tool",
]
