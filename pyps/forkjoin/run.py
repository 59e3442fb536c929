"""A plan carried out: the prefix, the branches, the join, the answer."""

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from pyps.agents.agent import Agent, run_agents
from pyps.agents.tools import ToolCall
from pyps.engine.context import Context
from pyps.engine.generate import FinishReason, Stopped
from pyps.errors import InputError
from pyps.forkjoin.branches import Branches, BranchResult, Cached
from pyps.forkjoin.events import (
    AnswerToken,
    BranchDone,
    BranchToken,
    Done,
    Event,
    Joined,
    Mode,
    Result,
    Synthesis,
    Timing,
    Tokens,
    ToolCalled,
)
from pyps.forkjoin.plan import Plan, PlannedAnswer
from pyps.forkjoin.reading import Again, again_of
from pyps.forkjoin.slots import write_slots
from pyps.forkjoin.synthesis import Output, Synthesizer, placement


def finish_reason(reason: FinishReason | None) -> FinishReason:
    """Return why a generation ended; one that an interruption cut off has simply become as long as it will be."""
    return reason or "length"


def _ms_since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3


@dataclass(frozen=True)
class _Forked:
    """The branches at their ends.

    Attributes:
        branches: All that this run generated.
        last_token: When the last token was chosen (time.perf_counter).
        flush_ms: Milliseconds that its K and V took: they are part of the time to first token.
    """

    branches: Branches
    last_token: float
    flush_ms: float


@dataclass(frozen=True)
class _SpokenAnswer:
    """What a synthesizer has said, and when.

    Attributes:
        agent: The synthesizer's sequence.
        prefill_ms: From the beginning of its prompt to the answer's first token.
        total_ms: From the beginning of its prompt to the answer's end.
    """

    agent: Agent
    prefill_ms: float
    total_ms: float

    def synthesis(self, tokens: Tokens, timing: Timing, reading: str = "") -> Synthesis:
        return Synthesis(
            answer=self.agent.answer,
            finish_reason=finish_reason(self.agent.turn.finish_reason),
            tokens=replace(tokens, generated=len(self.agent.tokens_of(self.agent.stretches("final")))),
            timing_ms=timing,
            calls=tuple(self.agent.calls),
            reading=reading,
        )


class Run:
    """One fork-join from beginning to end. Its contexts live as long as it does.

    Args:
        plan: What is done.
        stopped: Asked at every token; once true, the run ends early with what there is.
    """

    def __init__(self, plan: Plan, stopped: Stopped) -> None:
        self._plan, self._stopped = plan, stopped
        self._model = plan.setting.model

    def fork(self) -> Branches:
        """Run the branches alone, and return them. Raises InputError and EngineError."""
        ctx = self._open_branches()
        try:
            self._read_prefix(ctx, None)
            events = self._run_branches(ctx)
            while True:
                next(events)
        except StopIteration as end:
            forked: _Forked = end.value
            return forked.branches
        except BaseException:
            ctx.close()
            raise

    def events(self) -> Generator[Event, None, None]:
        """Run everything, reporting as it goes; the last event is Done. Raises InputError and EngineError."""
        plan, answer = self._plan, self._plan.answer
        assert answer is not None
        began = time.perf_counter()
        with ExitStack() as contexts:
            ctx = contexts.enter_context(self._open_branches())
            synthesizer = None
            if answer.mode == "cache":
                synthesizer = contexts.enter_context(self._open_synthesizer(answer))
                synthesizer.warm_up()
            self._read_prefix(ctx, synthesizer)
            joined_results = plan.joined_results
            for i, result in enumerate(joined_results):
                yield BranchDone(i, result)
            forked = yield from self._run_branches(ctx)
            branches_ms = (forked.last_token - began) * 1e3
            results = (*joined_results, *forked.branches.results)
            self._check_some_succeeded(results)

            synthesis, compare, kept_answer = _nothing(branches_ms), None, None
            if self._stopped():
                pass
            elif synthesizer:
                synthesis, cached = yield from self._answer_from_caches(synthesizer, answer, forked)
                if answer.keep:
                    kept_answer = Branches(synthesizer.decoder, [cached])
                if answer.keep and synthesizer.reader is not synthesizer.decoder:
                    synthesizer.reader.close()
                if not answer.keep:
                    synthesizer.close()
            else:
                synthesis = yield from self._answer_from_texts(ctx, answer, results)
            total_ms = _ms_since(began)
            if answer.save and len(forked.branches):
                write_slots(answer.save, [forked.branches])
            if answer.compare and not self._stopped():
                compare = yield from self._answer_from_texts(ctx, answer, results)
                timing = replace(compare.timing_ms, branches=branches_ms, total=branches_ms + compare.timing_ms.total)
                compare = replace(compare, timing_ms=timing)
            if kept_answer:
                contexts.pop_all()
                ctx.close()
        setting = plan.setting
        yield Done(
            Result(
                model=self._model.name,
                adapter=str(setting.adapter.path) if setting.adapter else None,
                mode=answer.mode,
                layout=setting.layout,
                seed=plan.seed,
                answer=synthesis.answer,
                finish_reason=synthesis.finish_reason,
                branches=results,
                tokens=synthesis.tokens,
                timing_ms=replace(synthesis.timing_ms, branches=branches_ms, total=total_ms),
                compare=compare,
                interrupted=self._stopped(),
                calls=synthesis.calls,
                reading=synthesis.reading,
                kept=kept_answer,
            )
        )

    def _open_branches(self) -> Context:
        plan = self._plan
        return plan.setting.options.open(self._model, plan.branch_cells, max(len(plan.branches), 1))

    def _open_synthesizer(self, answer: PlannedAnswer) -> Synthesizer:
        setting = self._plan.setting
        most_again = int(setting.reading.share * answer.cells)
        return Synthesizer(
            self._model,
            prompt=max(len(answer.prompt), most_again),
            cells=answer.cells,
            after=answer.after,
            options=setting.options,
            adapter=setting.adapter,
        )

    def _read_prefix(self, ctx: Context, synthesizer: Synthesizer | None) -> None:
        """Compute the prefix once, for every branch, and for a synthesizer that keeps it.

        A branch with a task or system message of its own goes on from what it has in common with the prefix.
        """
        plan = self._plan
        if not plan.prefix:
            return
        ctx.prefill(0, plan.prefix)
        if synthesizer:
            synthesizer.keep_prefix(ctx, plan.branch_point)
        for seq in range(1, ctx.n_seq):
            ctx.copy(0, seq)
        for seq, branch in enumerate(plan.branches):
            if branch.fork_point < len(plan.prefix):
                ctx.remove(seq, branch.fork_point)

    def _run_branches(self, ctx: Context) -> Generator[Event, None, _Forked]:
        """Run all branches to their ends."""
        first, last_token = len(self._plan.joined_results), time.perf_counter()
        agents = [Agent(ctx, seq, b.prompt, b.assignment) for seq, b in enumerate(self._plan.branches)]
        flushing = last_token
        for agent, update in run_agents(ctx, agents, self._stopped):
            last_token = time.perf_counter()
            if isinstance(update, ToolCall):
                yield ToolCalled(first + agent.seq, update)
            else:
                yield BranchToken(first + agent.seq, update)
                if agent.done:
                    yield BranchDone(first + agent.seq, self._cached(agent).result)
            flushing = time.perf_counter()
        # what run_agents does after the last token: its K and V were still to be computed
        flush_ms = _ms_since(flushing)
        return _Forked(Branches(ctx, [self._cached(agent) for agent in agents]), last_token, flush_ms)

    def _cached(self, agent: Agent) -> Cached:
        branch = self._plan.branches[agent.seq]
        spans = agent.stretches(branch.joined)
        tokens = agent.tokens_of(spans)
        result = BranchResult(
            name=branch.name,
            prompt=branch.assignment.instruction,
            text=agent.answer if branch.joined == "final" else self._model.text(tokens),
            tokens=len(tokens),
            finish_reason=finish_reason(agent.turn.finish_reason),
            calls=tuple(agent.calls),
            error=str(agent.error) if agent.error else None,
        )
        return Cached(result, agent.seq, spans, tokens)

    def _check_some_succeeded(self, results: Sequence[BranchResult]) -> None:
        """Raise InputError if every branch has failed: there is nothing to answer from."""
        if all(result.finish_reason == "error" for result in results):
            raise InputError(f"every branch has failed; the first one: {results[0].error}")

    def _answer_from_caches(
        self, synthesizer: Synthesizer, answer: PlannedAnswer, forked: _Forked
    ) -> Generator[Event, None, tuple[Synthesis, Cached]]:
        """Join, then answer. Returns a Synthesis without the time of branches and total, and where the answer lies."""
        plan, adapter = self._plan, self._plan.setting.adapter
        began = time.perf_counter()
        outputs = [output for branches in (*plan.joins, forked.branches) for output in branches.outputs]
        again = self._choose_again(outputs, answer)
        prompt = answer.labelled if again and again.labels else answer.prompt
        starts = placement(
            plan.branch_point,
            [len(output) for output in outputs],
            in_order=bool(adapter and adapter.in_order),
            labels=[len(label) for label in again.labels] if again else (),
            after=len(prompt) + answer.assignment.max_cells(self._model),
            n_positions=self._model.n_ctx_train,
        )
        n_cells = synthesizer.join(outputs, starts, adapter.mapper if adapter else None, again)
        join_ms = _ms_since(began)
        n_again, n_labels, again_ms = 0, 0, 0.0
        if again:
            n_again, n_labels, reading = again.n_again, again.n_labels, time.perf_counter()
            synthesizer.read_again(outputs, starts, again)
            synthesizer.reader.synchronize()
            again_ms = _ms_since(reading)
        yield Joined(n_cells, join_ms, n_again, again_ms)
        spoken = yield from self._speak(synthesizer, answer, prompt, "cache")
        ttft = forked.flush_ms + join_ms + again_ms + spoken.prefill_ms
        synthesis = spoken.synthesis(
            Tokens(joined=n_cells, prefilled=n_labels + len(prompt), generated=0, again=n_again),
            Timing(join=join_ms, again=again_ms, prefill=spoken.prefill_ms, ttft=ttft),
            reading=again.why if again else plan.setting.reading.why,
        )
        spans = spoken.agent.stretches("final")
        tokens = spoken.agent.tokens_of(spans)
        result = BranchResult(
            name="answer",
            prompt=plan.task,
            text=synthesis.answer,
            tokens=len(tokens),
            finish_reason=synthesis.finish_reason,
            calls=synthesis.calls,
        )
        return synthesis, Cached(result, 0, spans, tokens)

    def _choose_again(self, outputs: Sequence[Output], answer: PlannedAnswer) -> Again | None:
        """Return what the synthesizer reads again, now that the branches' texts are there; None for nothing at all."""
        plan, reading = self._plan, self._plan.setting.reading
        labels = plan.layout.labelled([output.name for output in outputs])[0] if reading.labels else []
        question = f"{plan.task}\n{answer.assignment.instruction}"
        tokens = [output.tokens for output in outputs]
        return again_of(self._model, reading, question, tokens, labels, len(answer.labelled))

    def _answer_from_texts(
        self, ctx: Context, answer: PlannedAnswer, results: Sequence[BranchResult]
    ) -> Generator[Event, None, Synthesis]:
        """Paste the texts and read them again, as well as llama.cpp can.

        The prefix is kept, and a long prompt is read with flash attention. Making the contexts is not counted: whoever
        does this for a living has them ready.
        """
        plan = self._plan
        n_prefix = len(plan.prefix)
        tail = plan.layout.pasted([r.name for r in results], [r.text for r in results])
        with Synthesizer(
            self._model,
            prompt=len(tail),
            cells=n_prefix + len(tail),
            after=answer.assignment.max_cells(self._model),
            options=plan.setting.options,
        ) as synthesizer:
            self._copy_prefix(ctx, synthesizer)
            spoken = yield from self._speak(synthesizer, answer, tail, "text")
        return spoken.synthesis(
            Tokens(joined=0, prefilled=len(tail), generated=0),
            Timing(prefill=spoken.prefill_ms, ttft=spoken.prefill_ms, total=spoken.total_ms),
        )

    def _copy_prefix(self, ctx: Context, synthesizer: Synthesizer) -> None:
        """Give text synthesis the prefix: from a branch that still begins with all of it, or by reading it again."""
        prefix, branches = self._plan.prefix, self._plan.branches
        seq = next((i for i, b in enumerate(branches) if b.fork_point == len(prefix)), None if branches else 0)
        if seq is not None and not self._plan.setting.why_not_joinable:
            synthesizer.keep_prefix(ctx, len(prefix), seq)
        elif prefix:
            synthesizer.reader.prefill(0, prefix)

    def _speak(
        self, synthesizer: Synthesizer, answer: PlannedAnswer, prompt: list[int], mode: Mode
    ) -> Generator[Event, None, _SpokenAnswer]:
        """Read the prompt and generate the answer. Raises what went wrong with it."""
        began = time.perf_counter()
        agent = Agent(synthesizer.decoder, 0, synthesizer.read(prompt), answer.assignment)
        first_token = None
        for _, update in run_agents(synthesizer.decoder, [agent], self._stopped):
            first_token = first_token or time.perf_counter()
            yield ToolCalled(None, update, mode) if isinstance(update, ToolCall) else AnswerToken(update, mode)
        if agent.error:
            raise agent.error
        ended = time.perf_counter()
        return _SpokenAnswer(agent, ((first_token or ended) - began) * 1e3, (ended - began) * 1e3)


def _nothing(branches_ms: float) -> Synthesis:
    """Return the synthesis of a run that was interrupted before it."""
    return Synthesis(answer="", finish_reason="length", tokens=Tokens(0, 0, 0), timing_ms=Timing(branches=branches_ms))
