"""Sequences that take several turns and call tools.

Each turn is a generation: first choices, JSON that a grammar keeps right, then the answer.

    prompt, tools | {"tool": "sql", "arguments": …} | result | {"tool": "answer"} | "Give your answer, …" | answer

Agents take their turns in one batch. While a call runs, on a thread, its agent is left out and the others decode.
"""

import json
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pyps.agents.tools import ANSWER, JoinedPart, Limits, Tool, ToolCall, explain
from pyps.engine.context import Context
from pyps.engine.generate import Generation, LockStep, Stopped, never
from pyps.engine.model import Model
from pyps.engine.sampling import Sampling
from pyps.errors import PypsError
from pyps.prompts.layout import follow_up

_CALL_TOKENS = 192  # most of a choice
_SLACK = 32  # tokens that a text may have more in its place than alone
_POLL_SECONDS = 0.005  # between two looks at calls that run, while nobody decodes


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What an agent is to do: a branch, the synthesizer, or a turn of a chat.

    Attributes:
        instruction: What it is told.
        sampling: Of its answer.
        tools: What it may call before it answers.
        limits: How often and how long it may call.
    """

    instruction: str
    sampling: Sampling
    tools: tuple[Tool, ...] = ()
    limits: Limits = field(default_factory=Limits)

    @property
    def text(self) -> str:
        """The instruction, and how to call the tools."""
        if not self.tools:
            return self.instruction
        signatures = "\n".join(f"- {tool.signature}" for tool in self.tools)
        return (
            f'{self.instruction}\n\nYou have tools:\n{signatures}\nTo use one, reply with {{"tool": its name, '
            f'"arguments": {{…}}}}. When you know enough, reply with {{"tool": "{ANSWER}"}}.'
        )

    def max_cells(self, model: Model) -> int:
        """Return how many cells it may need, at most, after its prompt."""
        if not self.tools:
            return self.sampling.max_tokens
        after_result = len(follow_up(model, _after_result("x" * 64, "", self.instruction))) + _SLACK
        a_call = _CALL_TOKENS + self.limits.result_tokens + after_result
        return self.limits.max_calls * a_call + _CALL_TOKENS + after_result + self.sampling.max_tokens

    def choice_grammar(self, may_answer: bool) -> str:
        """Return the grammar of a choice among the tools, and of answering.

        Raises InputError if a tool's parameters have no grammar.
        """
        kinds: list[dict[str, Any]] = [{"tool": {"const": t.name}, "arguments": t.parameters} for t in self.tools]
        if may_answer:
            kinds.append({"tool": {"const": ANSWER}})
        definitions = {k: v for t in self.tools for k, v in t.parameters.get("$defs", {}).items()}
        options = [{"type": "object", "properties": kind, "required": list(kind)} for kind in kinds]
        return Sampling.grammar_of({"anyOf": options, "$defs": definitions})


class Agent:
    """One sequence that does an assignment, with tools or without: a member of a lock step.

    Args:
        ctx: The context of the sequence.
        seq: The sequence; what it holds comes before the prompt.
        prompt: Tokens to read first.
        assignment: What it is to do.

    Attributes:
        seq: Its sequence.
        turns: Its generations, the newest last.
        final: The turn that is the answer, once it has begun.
        calls: The calls of tools that are over.

    Raises:
        InputError: A grammar cannot be made or used.
    """

    def __init__(self, ctx: Context, seq: int, prompt: Sequence[int], assignment: Assignment) -> None:
        self.seq = seq
        self.turns: list[Generation] = []
        self.final: Generation | None = None
        self.calls: list[ToolCall] = []
        self._ctx, self._assignment = ctx, assignment
        self._tools = {t.name: t for t in assignment.tools}
        self._call: _RunningCall | None = None
        self._follow_ups: list[
            list[int]
        ] = []  # tokens between its turns: before each one, but nothing before the first
        self._start = ctx.end(seq) + len(prompt)
        self._begin_turn(list(prompt), final=not assignment.tools or assignment.limits.max_calls == 0)

    @property
    def turn(self) -> Generation:
        """Its newest generation."""
        return self.turns[-1]

    @property
    def answer(self) -> str:
        """The text of its answer, as far as it has come."""
        return self.final.text if self.final else ""

    @property
    def done(self) -> bool:
        """Whether nothing more will come of it."""
        return self.error is not None or (self.turn is self.final and self.turn.finish_reason is not None)

    @property
    def error(self) -> PypsError | None:
        """What went wrong, if something did."""
        return self.turn.error

    @property
    def waiting(self) -> bool:
        """Whether a call runs."""
        return self._call is not None

    @property
    def end(self) -> int:
        """The position after everything that it has said and was told."""
        return self._start + len(self._tokens())

    def stretches(self, joined: JoinedPart) -> tuple[tuple[int, int], ...]:
        """Return which of its positions are joined, as stretches [start, end)."""
        if joined == "everything":
            return ((self._start, self.end),) if self.end > self._start else ()
        turns = self.turns if joined == "generated" else [self.final] if self.final else []
        return tuple((turn.start, turn.end) for turn in turns if turn.tokens)

    def tokens_of(self, stretches: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Return the tokens of stretches of its positions."""
        tokens = self._tokens()
        return tuple(token for a, b in stretches for token in tokens[a - self._start : b - self._start])

    def _tokens(self) -> list[int]:
        """Return everything after its prompt: what it has said, and what it was told between."""
        return [
            token
            for follow_up_tokens, turn in zip(self._follow_ups, self.turns, strict=True)
            for tokens in (follow_up_tokens, turn.tokens)
            for token in tokens
        ]

    @property
    def pending(self) -> list[int]:
        """Tokens to compute next; none while a call runs, but for its last one."""
        return self.turn.pending

    @property
    def samples(self) -> bool:
        """Whether a token is to be chosen after the pending ones."""
        return self.turn.samples

    def computed(self) -> None:
        """Note that the pending tokens are in the cache."""
        self.turn.computed()

    def advance(self, index: int) -> str:
        """Choose the next token from the index-th logits of the last batch; return new text of the answer.

        A choice that is complete begins a call, or the answer.
        """
        turn = self.turn
        text = turn.advance(index)
        if turn is self.final:
            return text
        if turn.finish_reason:
            self._choose(turn.text)
        return ""

    def fail(self, error: PypsError) -> None:
        """End here, with what there is, because of an error."""
        self.turn.fail(error)

    def close(self) -> None:
        """Free the sampler: nothing is chosen any more."""
        self.turn.close()

    def poll(self) -> ToolCall | None:
        """Return the call that was waited for if it is over; the turn after it has then begun."""
        call = self._call.poll() if self._call else None
        if call is None:
            return None
        self._call = None
        self.calls.append(call)
        last = len(self.calls) >= self._assignment.limits.max_calls
        text = _after_result(call.name, self._cut(call.result), self._assignment.instruction if last else None)
        try:
            self._begin_turn(follow_up(self._ctx.model, text), final=last)
        except PypsError as error:
            self.fail(error)
        return call

    def _begin_turn(self, prompt: list[int], final: bool) -> None:
        sampling = self._assignment.sampling
        if not final:
            # a penalty for repeated tokens is one for quotes and braces
            sampling = replace(
                sampling,
                grammar=self._assignment.choice_grammar(len(self.calls) >= self._assignment.limits.min_calls),
                max_tokens=_CALL_TOKENS,
                stop=(),
                repeat_penalty=1,
                ignore_eos=False,
            )
        # the last token of a turn that was cut at its limit may still be pending: it comes first
        pending = self.turn.pending if self.turns else []
        turn = Generation(self._ctx, self.seq, pending + prompt, sampling)
        self._follow_ups.append(prompt if self.turns else [])
        self.turns.append(turn)
        self.final = turn if final else None

    def _choose(self, text: str) -> None:
        try:
            choice = json.loads(text)
        except ValueError:
            name = re.search(r'"tool"\s*:\s*"([^"]*)"', text)  # it was cut at its limit
            choice = {"tool": name[1] if name else "", "arguments": text}
        if choice["tool"] == ANSWER:
            self._begin_turn(follow_up(self._ctx.model, _ask_for_answer(self._assignment.instruction)), final=True)
        else:
            self._call = _RunningCall(
                choice["tool"], choice.get("arguments"), self._tools, self._assignment.limits.seconds
            )

    def _cut(self, text: str) -> str:
        """Cut a tool's result to as many tokens as it may have."""
        model, most = self._ctx.model, self._assignment.limits.result_tokens
        tokens = model.tokenize(model.as_data(text))
        if len(tokens) <= most:
            return text
        return b"".join(map(model.piece, tokens[: max(most - 2, 1)])).decode("utf-8", "ignore") + " …"


def _after_result(name: str, result: str, instruction: str | None) -> str:
    """Return what an agent is told after a call; without its instruction while more calls may follow."""
    go_on = "Use a tool again, or answer." if instruction is None else _ask_for_answer(instruction)
    return f"{name} says:\n{result}\n\n{go_on}"


def _ask_for_answer(instruction: str) -> str:
    # small models go on in JSON, and forget what they were asked
    return f"Give your answer, in plain words. {instruction}".strip()


class _RunningCall:
    """A tool at work on a thread. One that does not end in time is left alone: Python cannot stop a thread."""

    def __init__(self, name: str, arguments: Any, tools: dict[str, Tool], seconds: float) -> None:
        self._name, self._arguments, self._seconds = name, arguments, seconds
        self._began = time.monotonic()
        self._results: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()

        def work() -> None:
            try:
                if name not in tools or not isinstance(arguments, dict):
                    raise ValueError("the call was cut off: it was too long")
                self._results.put((str(tools[name].call(**arguments)), False))
            except (Exception, SystemExit) as error:
                # whatever a tool may raise is the model's to know and nobody else's
                self._results.put((explain(error), True))

        threading.Thread(target=work, daemon=True).start()

    def poll(self) -> ToolCall | None:
        seconds = time.monotonic() - self._began
        try:
            result, failed = self._results.get_nowait()
        except queue.Empty:
            if seconds < self._seconds:
                return None
            result, failed = f"no result after {self._seconds:g} seconds", True
        if failed:
            result = f"error: {result}"
        return ToolCall(self._name, self._arguments, result, failed, seconds * 1e3)


def run_agents(
    ctx: Context, agents: Sequence[Agent], stopped: Stopped = never
) -> Iterator[tuple[Agent, str | ToolCall]]:
    """Run all turns of all agents, in lock step.

    Yields (agent, new text of its answer), which may be empty, for each token of an answer; (agent, a call) when a call
    is over; and (agent, "") when an agent has failed. When the iteration ends, everything that the agents have said and
    were told is in the cache, and nothing after it.

    Args:
        ctx: The context of all agents.
        agents: Each in a sequence of its own.
        stopped: Asked before each step; once true, agents stay as far as they are.

    Raises:
        InputError, EngineError: As Context.decode.
    """
    together = LockStep(ctx, agents)
    try:
        while not stopped():
            for agent in agents:
                if call := agent.poll():
                    yield agent, call
                    if agent.error:
                        yield agent, ""
            turns = {agent: agent.turn for agent in agents}
            updates = together.step()
            for agent, text in updates:
                if turns[agent] is agent.final or agent.error:
                    yield agent, text
            if not updates:
                if not any(agent.waiting for agent in agents):
                    break
                time.sleep(_POLL_SECONDS)
        together.flush()
    finally:
        together.close()
