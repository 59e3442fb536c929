"""After the answer: a conversation with the synthesizer, in front of the branches' caches, which stay there."""

from collections.abc import Callable, Iterator, Sequence

from pyps.agents.agent import Agent, instruct, run_agents
from pyps.agents.tools import Limits, Tool
from pyps.engine.sampling import Sampling
from pyps.errors import InputError
from pyps.forkjoin import ForkJoin
from pyps.forkjoin.branches import Branches
from pyps.forkjoin.events import ToolCall
from pyps.prompts.layout import follow_up


class Chat:
    """A conversation that begins with an answer.

    Args:
        fj: what gave the answer.
        kept: the answer with its cache: `run(…, keep=True, room=…).kept`, with room for what is still to be said.
        tools, limits: what it may call before each of its answers.
    """

    def __init__(self, fj: ForkJoin, kept: Branches, tools: Sequence[Tool] = (), limits: Limits | None = None) -> None:
        self._kept, self._tools, self._limits = kept, tuple(tools), limits or Limits()
        self._model = fj.model

    @property
    def room(self) -> int:
        """Tokens that still fit: into the cache, and into what the model was trained on."""
        ctx = self._kept.ctx
        return min(ctx.n_ctx - ctx.n_cells(0), ctx.model.n_ctx_train - ctx.end(0))

    def say(
        self, text: str, sampling: Sampling | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[str | ToolCall]:
        """Says something, and yields the answer's text as it grows, and calls of tools that are over.

        Raises:
            InputError: there is no room for it.
            EngineError: llama.cpp failed.
        """
        sampling = sampling or Sampling()
        ctx = self._kept.ctx
        prompt = follow_up(self._model, instruct(text, self._tools))
        most = len(prompt) + Agent.cells(self._model, text, sampling, self._tools, self._limits)
        if most > self.room:
            raise InputError(f"this may need {most:,} tokens, and there is room for {self.room:,}: the chat is full")
        agent = Agent(ctx, 0, text, prompt, sampling, self._tools, self._limits)
        for _, said in run_agents(ctx, [agent], stopped):
            yield said
