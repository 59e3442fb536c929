"""After the answer: a conversation with the synthesizer, in front of the branches' caches, which stay there."""

from collections.abc import Iterator, Sequence

from pyps.agents.agent import Agent, Assignment, run_agents
from pyps.agents.tools import Limits, Tool, ToolCall
from pyps.engine.generate import Stopped, never
from pyps.engine.sampling import Sampling
from pyps.errors import InputError
from pyps.forkjoin.branches import Branches
from pyps.forkjoin.forkjoin import ForkJoin
from pyps.prompts.layout import follow_up


class Chat:
    """A conversation that begins with an answer.

    Args:
        fj: What gave the answer.
        kept: The answer with its cache: `run(…, keep=True, room=…).kept`, with room for what is still to be said.
        tools: What it may call before each of its answers.
        limits: How often and how long it may call.
    """

    def __init__(self, fj: ForkJoin, kept: Branches, tools: Sequence[Tool] = (), limits: Limits | None = None) -> None:
        self._kept, self._tools, self._limits = kept, tuple(tools), limits or Limits()
        self._model = fj.model

    @property
    def room(self) -> int:
        """Tokens that still fit into the cache, and into what the model was trained on."""
        ctx = self._kept.ctx
        return min(ctx.n_ctx - ctx.n_cells(0), ctx.model.n_ctx_train - ctx.end(0))

    def say(self, text: str, sampling: Sampling | None = None, stopped: Stopped = never) -> Iterator[str | ToolCall]:
        """Say something, and yield the answer's text as it grows, and the calls of tools that are over.

        Args:
            text: What the user says.
            sampling: Of the answer, or None for the defaults.
            stopped: Asked at every token; once true, the answer stays as far as it is.

        Raises:
            InputError: There is no room for it.
            EngineError: llama.cpp failed.
        """
        ctx = self._kept.ctx
        assignment = Assignment(
            instruction=text, sampling=sampling or Sampling(), tools=self._tools, limits=self._limits
        )
        prompt = follow_up(self._model, assignment.text)
        most = len(prompt) + assignment.max_cells(self._model)
        if most > self.room:
            raise InputError(f"this may need {most:,} tokens, and there is room for {self.room:,}: the chat is full")
        agent = Agent(ctx, 0, prompt, assignment)
        for _, update in run_agents(ctx, [agent], stopped):
            yield update
        if agent.error:
            raise agent.error
