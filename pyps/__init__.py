"""pyps: fork-join agent workflows on llama.cpp.

Branches generate in parallel; a synthesizer answers straight from their KV caches instead of re-reading their text.

    from pyps import ForkJoin
    with ForkJoin.from_pretrained("smollm2") as fj:
        result = fj.run("Which database should a small desktop app use?",
                        branches=["Argue for SQLite.", "Argue for PostgreSQL.", "Argue for DuckDB."])
        print(result.answer)
"""

from pyps.errors import EngineError, InputError, PypsError, RefusedError
from pyps.events import AnswerToken, BranchDone, BranchResult, BranchToken, Done, Event, Joined, Result
from pyps.forkjoin import Branch, ForkJoin
from pyps.sampling import Sampling

__version__ = "0.1.0"

__all__ = [
    "AnswerToken",
    "Branch",
    "BranchDone",
    "BranchResult",
    "BranchToken",
    "Done",
    "EngineError",
    "Event",
    "ForkJoin",
    "InputError",
    "Joined",
    "PypsError",
    "RefusedError",
    "Result",
    "Sampling",
]
