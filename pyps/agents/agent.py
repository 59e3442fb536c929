"""Branches that call tools. Each turn is a generation: first choices, JSON that a grammar keeps right, then the answer.

    prompt, tools | {"tool": "sql", "arguments": …} | result | {"tool": "answer"} | "Give your answer, …" | answer

Branches take their turns in one batch. While a call runs, on a thread, its branch is left out and the others decode.
"""

import json
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from pyps.agents.tools import ANSWER, JoinedPart, Limits, Tool, ToolCall, explain
from pyps.engine.context import Context, Token
from pyps.engine.generate import Generation, feed
from pyps.engine.model import Model
from pyps.engine.sampling import Sampler, Sampling
from pyps.prompts.layout import follow_up

_CALL_TOKENS = 192  # most of a choice
_SLACK = 32  # tokens that a text may have more in its place than alone


def instruct(prompt: str, tools: Sequence[Tool]) -> str:
    """A branch's instruction, and how to call."""
    if not tools:
        return prompt
    listed = "\n".join(f"- {t.signature}" for t in tools)
    return (
        f'{prompt}\n\nYou have tools:\n{listed}\nTo use one, reply with {{"tool": its name, "arguments": {{…}}}}. '
        f'When you know enough, reply with {{"tool": "{ANSWER}"}}.'
    )


def choices(tools: Sequence[Tool], may_answer: bool) -> str:
    """The grammar of a choice. Raises InputError if there is none for a tool's parameters."""
    kinds: list[dict[str, Any]] = [{"tool": {"const": t.name}, "arguments": t.parameters} for t in tools]
    if may_answer:
        kinds.append({"tool": {"const": ANSWER}})
    definitions = {k: v for t in tools for k, v in t.parameters.get("$defs", {}).items()}
    options = [{"type": "object", "properties": kind, "required": list(kind)} for kind in kinds]
    return Sampling.grammar_of({"anyOf": options, "$defs": definitions})


class Agent:
    """One branch, or the synthesizer, with tools or without.

    Attributes:
        seq: its sequence. calls: those that are over. turns: its generations; final: the last, once it is the answer;
            done: whether that has ended.
    """

    def __init__(
        self, ctx: Context, seq: int, asked: str, prompt: list[int], sampling: Sampling,
        tools: Sequence[Tool], limits: Limits,
    ) -> None:  # fmt: skip
        self.seq, self.done = seq, False
        self.calls: list[ToolCall] = []
        self.turns: list[Generation] = []
        self.tokens: list[int] = []  # everything after the prompt
        self._ctx, self._asked, self._sampling, self._limits = ctx, asked, sampling, limits
        self._tools = {t.name: t for t in tools}
        self._sampler: Sampler | None = None
        self._call: _Call | None = None
        self._carry: list[int] = []  # sampled, but not in the cache yet
        self.feed: list[int] = []  # what is to be computed next
        self._start = ctx.end(seq) + len(prompt)
        self._begin(prompt, final=not tools or limits.max_calls == 0)

    @staticmethod
    def cells(model: Model, asked: str, sampling: Sampling, tools: Sequence[Tool], limits: Limits) -> int:
        """Most that are needed after the prompt."""
        if not tools:
            return sampling.max_tokens
        said = len(follow_up(model, _after_result("x" * 64, "", asked))) + _SLACK
        a_call = _CALL_TOKENS + limits.result_tokens + said
        return limits.max_calls * a_call + _CALL_TOKENS + said + sampling.max_tokens

    def spans(self, joined: JoinedPart) -> tuple[tuple[int, int], ...]:
        """What of it is joined: positions [start, end)."""
        if joined == "everything":
            end = self._start + len(self.tokens)
            return ((self._start, end),) if self.tokens else ()
        turns = self.turns if joined == "generated" else [self.final] if self.final else []
        return tuple((g.start, g.end) for g in turns if g.tokens)

    def tokens_of(self, spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        return tuple(t for a, b in spans for t in self.tokens[a - self._start : b - self._start])

    @property
    def answer(self) -> str:
        """Its text, as far as it has come."""
        return self.final.text if self.final else ""

    @property
    def turn(self) -> Generation:
        return self.turns[-1]

    @property
    def waiting(self) -> bool:
        return self._call is not None

    def _begin(self, prompt: list[int], final: bool) -> None:
        sampling = self._sampling
        if not final:
            # a penalty for repeated tokens is one for quotes and braces
            may_answer = len(self.calls) >= self._limits.min_calls
            grammar = choices(list(self._tools.values()), may_answer)
            sampling = replace(
                sampling, grammar=grammar, max_tokens=_CALL_TOKENS, stop=(), repeat_penalty=1, ignore_eos=False
            )
        self.feed = self._carry + prompt
        if self.turns:
            self.tokens += prompt
        self._carry = []
        self.turns.append(Generation(self._ctx, self.seq, self.feed, sampling))
        self.final = self.turns[-1] if final else None
        self.close()
        self._sampler = Sampler(self._ctx.model, sampling)

    def take(self, index: int) -> str:
        """Samples from the index-th logits of the last batch; returns new text of the answer."""
        assert self._sampler is not None
        g, token = self.turn, self._sampler.sample(self._ctx, index)
        self.feed = []
        if self._ctx.model.ends(token):
            g.finish_reason = "stop"
        else:
            before = len(g.tokens)
            g._add(token, self._ctx.model.piece(token))
            if len(g.tokens) > before:
                self.tokens.append(token)
            else:  # a stop text: it, and what is in the cache of it, go
                del self.tokens[len(self.tokens) - (before - len(g.tokens)) :]
                self._ctx.remove(self.seq, g.end)
            if g.finish_reason is None:
                self.feed = [token]
            elif g.finish_reason == "length":
                self._carry = [token]
        text = g._new_text() if self.final else ""
        if g.finish_reason and self.final:
            self.done = True
        elif g.finish_reason:
            self._choose(g.text)
        return text

    def _choose(self, text: str) -> None:
        try:
            choice = json.loads(text)
        except ValueError:
            name = re.search(r'"tool"\s*:\s*"([^"]*)"', text)  # it was cut at its limit
            choice = {"tool": name[1] if name else "", "arguments": text}
        if choice["tool"] == ANSWER:
            self._begin(follow_up(self._ctx.model, _answer(self._asked)), final=True)
        else:
            self._call = _Call(choice["tool"], choice.get("arguments"), self._tools, self._limits)

    def poll(self) -> ToolCall | None:
        """The call that was waited for, if it is over."""
        found = self._call.poll() if self._call else None
        if found is None:
            return None
        self._call = None
        self.calls.append(found)
        last = len(self.calls) >= self._limits.max_calls
        result = self._cut(found.result)
        asked = self._asked if last else None
        self._begin(follow_up(self._ctx.model, _after_result(found.name, result, asked)), final=last)
        return found

    def _cut(self, text: str) -> str:
        model, most = self._ctx.model, self._limits.result_tokens
        tokens = model.tokenize(model.as_data(text))
        if len(tokens) <= most:
            return text
        return b"".join(map(model.piece, tokens[: max(most - 2, 1)])).decode("utf-8", "ignore") + " …"

    def flush(self) -> list[Token]:
        """Tokens that nobody samples after, but whose K and V belong to the span."""
        left, self.feed, self._carry = self.feed or self._carry, [], []
        start = self._ctx.end(self.seq)
        return [Token(t, start + i, self.seq) for i, t in enumerate(left)]

    def close(self) -> None:
        if self._sampler:
            self._sampler.close()
        self._sampler = None


def _after_result(name: str, result: str, asked: str | None) -> str:
    """asked: for the answer, or None while calls may follow."""
    return f"{name} says:\n{result}\n\n" + ("Use a tool again, or answer." if asked is None else _answer(asked))


def _answer(asked: str) -> str:
    # small models go on in JSON, and forget what they were asked
    return f"Give your answer, in plain words. {asked}".strip()


class _Call:
    """A tool at work on a thread. One that does not end in time is left alone: Python cannot stop a thread."""

    def __init__(self, name: str, arguments: Any, tools: dict[str, Tool], limits: Limits) -> None:
        self._name, self._arguments, self._limits = name, arguments, limits
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
            if seconds < self._limits.seconds:
                return None
            result, failed = f"no result after {self._limits.seconds:g} seconds", True
        if failed:
            result = f"error: {result}"
        return ToolCall(self._name, self._arguments, result, failed, seconds * 1e3)


def run_agents(
    ctx: Context, agents: Sequence[Agent], stopped: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Agent, str | ToolCall]]:
    """All turns of all agents. Yields (agent, new text of its answer), which may be empty, for each of its tokens, and
    (agent, a call that is over).

    When the iteration ends, all of `agent.tokens` are in the cache and nothing after them. Once `stopped`, agents stay
    as far as they are.

    Raises:
        InputError, EngineError: from Context.decode, or a grammar that cannot be used.
    """
    try:
        while not stopped():
            for agent in agents:
                if call := agent.poll():
                    yield agent, call
            active = [agent for agent in agents if agent.feed]
            if not active:
                if not any(agent.waiting for agent in agents):
                    break
                time.sleep(0.005)
                continue
            feed(ctx, [(agent.seq, agent.feed) for agent in active])
            for i, agent in enumerate(active):
                turn, text = agent.turn, agent.take(i - len(active))
                if turn is agent.final:
                    yield agent, text
        # what an interruption left
        for agent in agents:
            ctx.remove(agent.seq, agent._start + len(agent.tokens))
        ctx.decode([token for agent in agents for token in agent.flush()])
    finally:
        for agent in agents:
            agent.close()
