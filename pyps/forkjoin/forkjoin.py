"""ForkJoin: branches in parallel, their caches joined, one answer."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import llama_cpp

from pyps.adapters.adapter import Adapter
from pyps.agents.agent import Agent, instruct, run_agents
from pyps.agents.tools import JoinedPart, Limits, Tool
from pyps.engine.context import MAX_SEQUENCES, Context, prefers_flash_attn, round_up, split_kv_type
from pyps.engine.find import AUTO, DEFAULT_MODEL, Progress, find_adapter, find_model
from pyps.engine.generate import Generation, complete
from pyps.engine.join import Span, join
from pyps.engine.model import Model
from pyps.engine.positions import check_joinable, rotated_layers, why_not_joinable
from pyps.engine.sampling import Sampling, draw_seed
from pyps.errors import InputError
from pyps.forkjoin.branches import Branches, Cached, as_list
from pyps.forkjoin.events import (
    AnswerToken,
    BranchDone,
    BranchResult,
    BranchToken,
    Completion,
    Done,
    Event,
    Joined,
    Mode,
    Result,
    Synthesis,
    Timing,
    Tokens,
    ToolCall,
    ToolCalled,
)
from pyps.forkjoin.long_prompts import read_prompt, reads_apart
from pyps.forkjoin.slots import check_writable, load_slots, read_slots, write_slots
from pyps.forkjoin.synthesis import ContextOptions
from pyps.prompts.layout import DEFAULT_SYNTHESIZE, Layout, Prompts, place


@dataclass(frozen=True)
class Branch:
    """One branch.

    Attributes:
        prompt: its instruction; empty for a plain sample of the task.
        name: None for branch-1, branch-2, …
        sampling: None for the run's.
        tools: what it may call before it answers; limits: how often and how long.
        joined: what of it the synthesizer receives: its answer ("final"), its calls too ("generated"), or these and the
            tools' results ("everything").
    """

    prompt: str = ""
    name: str | None = None
    sampling: Sampling | None = None
    tools: tuple[Tool, ...] = ()
    limits: Limits = field(default_factory=Limits)
    joined: JoinedPart = "final"


class ForkJoin:
    """Runs fork-joins on one model.

    Args:
        model: an open Model, which is closed with this object; see `from_pretrained` for names and paths.
        llama: instead, an existing `llama_cpp.Llama`, whose model is used and which is left alone.
        adapter: path of an adapter for the synthesizer; its mapper and LoRA are used.
        layout: "shared" or "paper"; None for the adapter's, or "shared".
        kv_type: type of K and V: "f16", "bf16", "f32"; "q8_0" or "q4_0", smaller and, on a CPU, slower; or one of each,
            "q8_0/f16".
        n_ctx: most cells any one sequence may need; None for what the model was trained on, and what a job needs.
        threads: None for the physical cores.

    Raises:
        InputError: any of these is wrong.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        llama: llama_cpp.Llama | None = None,
        adapter: str | Path | None = None,
        layout: str | None = None,
        kv_type: str = "f16",
        n_ctx: int | None = None,
        threads: int | None = None,
    ) -> None:
        if model is None and llama is not None:
            model = Model.borrow(llama)
        elif model is None or llama is not None:
            raise InputError("give ForkJoin a model or a llama, one of the two")
        if n_ctx is not None and n_ctx < 1:
            raise InputError(f"n_ctx must be positive, not {n_ctx}")
        self.model = model
        self.adapter = Adapter(adapter, self.model) if adapter is not None else None
        self.layout = layout or (self.adapter.layout if self.adapter else None) or "shared"
        if self.adapter and self.adapter.layout not in (None, self.layout):
            self.adapter.warnings.append(
                f"{self.adapter.path.name} was trained for the {self.adapter.layout} layout, not for {self.layout}: "
                f"answers may be poor"
            )
        self._kv_type = kv_type
        self._n_ctx = n_ctx
        self._threads = threads
        self._flash_attn = prefers_flash_attn(kv_type)

    @classmethod
    def from_pretrained(
        cls,
        name: str = DEFAULT_MODEL,
        *,
        progress: Progress | None = None,
        adapter: str | Path | None = AUTO,
        layout: str | None = None,
        kv_type: str = "f16",
        n_ctx: int | None = None,
        threads: int | None = None,
    ) -> "ForkJoin":
        """On a GGUF file, on "smollm2", or on "hf:OWNER/REPO:FILE-or-QUANT"; with the adapter that comes with pyps for
        this model, if there is one, unless another or None is given. Raises InputError as find_model does."""
        split_kv_type(kv_type)  # a mistake is said before a model is loaded
        model = Model.load(find_model(name, progress) if progress else find_model(name))
        try:
            return cls(
                model, adapter=find_adapter(adapter, name), layout=layout, kv_type=kv_type, n_ctx=n_ctx, threads=threads
            )
        except BaseException:
            model.close()
            raise

    def __enter__(self) -> "ForkJoin":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.adapter:
            self.adapter.close()
        self.model.close()

    def run(
        self,
        task: str,
        branches: Sequence[str | Branch] = (),
        *,
        join: Branches | Sequence[Branches] = (),
        system: str | None = None,
        synthesize: str = DEFAULT_SYNTHESIZE,
        mode: Mode = "cache",
        compare: bool = False,
        sampling: Sampling | None = None,
        answer: Sampling | None = None,
        save: Path | None = None,
        keep: bool = False,
        room: int = 0,
        tools: Sequence[Tool] = (),
        limits: Limits | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Result:
        """`stream` to its end: the result. Same arguments and exceptions."""
        events = self.stream(
            task,
            branches,
            join=join,
            system=system,
            synthesize=synthesize,
            mode=mode,
            compare=compare,
            sampling=sampling,
            answer=answer,
            save=save,
            keep=keep,
            room=room,
            tools=tools,
            limits=limits,
            stopped=stopped,
        )
        for event in events:
            if isinstance(event, Done):
                return event.result
        raise AssertionError("a stream ends with Done")

    def stream(
        self,
        task: str,
        branches: Sequence[str | Branch] = (),
        *,
        join: Branches | Sequence[Branches] = (),
        system: str | None = None,
        synthesize: str = DEFAULT_SYNTHESIZE,
        mode: Mode = "cache",
        compare: bool = False,
        sampling: Sampling | None = None,
        answer: Sampling | None = None,
        save: Path | None = None,
        keep: bool = False,
        room: int = 0,
        tools: Sequence[Tool] = (),
        limits: Limits | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Event]:
        """Run branches and synthesizer, reporting as it goes; the last event is Done.

        Args:
            task: what the job is about; every branch and the synthesizer see it.
            branches: up to 256 instructions, or Branch objects.
            join: finished branches, of earlier runs or from files, which come before these; they stay as they are, and
                open. There must be at least one branch of either kind.
            system: the system message; None for the model's own default.
            synthesize: the synthesizer's instruction.
            mode: "cache" joins the branches' caches, "text" pastes their texts and reads them again.
            compare: in cache mode, run text synthesis on the same branches afterwards.
            sampling, answer: for the branches and for the answer; None for the defaults. Branches get consecutive
                seeds, the answer the first of them.
            save: a file for the branches that this run generates, to be joined later (`load`).
            keep: in cache mode, keep the answer's cache: the result's `kept`, to be joined to others, or to go on from
                (Chat). Close it.
            room: tokens that there should be room for after the answer.
            tools, limits: what the synthesizer may call before it answers, and how often and how long.
            stopped: asked at every token; once true, the run ends early with what there is.

        Raises:
            InputError: something is wrong or does not fit; found before any work is done.
            EngineError: llama.cpp failed.
        """
        run = _Run(self, task, branches, as_list(join), system, synthesize, sampling, stopped, tools)
        run.plan_answer(mode, compare, answer, save, keep, room, limits or Limits())
        return run.events()

    def fork(
        self,
        task: str,
        branches: Sequence[str | Branch],
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Branches:
        """Run branches alone, and keep their caches: to be joined by `run(…, join=…)`, as often as one likes, or saved.
        Same arguments and exceptions as `stream`."""
        run = _Run(self, task, branches, [], system, "", sampling, stopped)
        check_joinable(self.model)
        return run.fork()

    def generate(
        self,
        prompts: Sequence[str],
        n: int = 1,
        *,
        chat: bool = False,
        sampling: Sampling | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[Completion]:
        """n completions of each prompt, many in one batch: far faster than one after the other. No adapter is used.

        Args:
            chat: the prompts are what a user says, and the completions are answers; otherwise texts to continue.
            sampling: of all; seeds count up from its own, prompt after prompt.
            stopped: asked at every token; once true, what there is is all.

        Returns:
            The n completions of the first prompt, then those of the second, …

        Raises:
            InputError: a prompt is empty, or does not fit.
            EngineError: llama.cpp failed.
        """
        self.model.check_generates()
        if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
            raise InputError("prompts must be a list of texts")
        if n < 1:
            raise InputError(f"n must be at least 1, not {n}")
        sampling = sampling or Sampling()
        tokens = []
        for prompt in prompts:
            if chat:
                prompt = self.model.render_chat([{"role": "user", "content": self.model.as_data(prompt)}])
            tokens.append(self.model.tokenize(prompt, start=True))
            if not tokens[-1]:
                raise InputError("a prompt is empty: there is nothing to continue")
            if (size := len(tokens[-1]) + sampling.max_tokens) > (most := self._n_ctx or self.model.n_ctx_train):
                raise InputError(f"a prompt and its completion may need {size:,} tokens; {most:,} are possible")
        generations = complete(
            self.model,
            [t for t in tokens for _ in range(n)],
            sampling,
            draw_seed() if sampling.seed is None else sampling.seed,
            kv_type=self._kv_type,
            flash_attn=self._flash_attn,
            threads=self._threads,
            stopped=stopped,
        )
        return [Completion(g.text, len(g.tokens), _finish_reason(g)) for g in generations]

    def save(self, path: str | Path, branches: Branches | Sequence[Branches]) -> None:
        """Write branches, with their caches, into one file, whole or not at all. Raises InputError."""
        write_slots(Path(path), as_list(branches))

    def load(self, path: str | Path) -> Branches:
        """Branches from a file, to be joined. Raises InputError: it is damaged, or was written with another model."""
        return load_slots(read_slots(Path(path)), self.model, self._threads)


@dataclass(frozen=True)
class _Branch:
    """A Branch with nothing left open."""

    prompt: str
    name: str
    sampling: Sampling
    tools: tuple[Tool, ...]
    limits: Limits
    joined: JoinedPart


_Pair = tuple[Context, Context]  # reader and decoder, see long_prompts.py


class _Run:
    """One fork-join from beginning to end. Its contexts live as long as it does."""

    least_cells = 1  # of any context

    def __init__(
        self,
        fj: ForkJoin,
        task: str,
        branches: Sequence[str | Branch],
        join: Sequence[Branches],
        system: str | None,
        synthesize: str,
        sampling: Sampling | None,
        stopped: Callable[[], bool],
        tools: Sequence[Tool] = (),
    ) -> None:
        n_branches = len(branches) + sum(map(len, join))
        if not n_branches:
            raise InputError("there are no branches: give at least one")
        if n_branches > MAX_SEQUENCES:
            raise InputError(f"{n_branches} branches are too many: llama.cpp takes up to {MAX_SEQUENCES}")
        for given in join:
            if given.ctx.model is not fj.model:
                raise InputError("branches to join are another model's: caches can only be joined within one")
        self.fj, self.task, self.stopped, self.joins = fj, task, stopped, join
        self.given = [r for given in join for r in given.results]
        fj.model.check_generates()

        self.sampling = sampling or Sampling()
        self.seed = draw_seed() if self.sampling.seed is None else self.sampling.seed
        self.branches: list[_Branch] = []
        for i, item in enumerate(branches):
            branch = Branch(item) if isinstance(item, str) else item
            chosen = branch.sampling or self.sampling
            if chosen.seed is None or branch.sampling is None:
                chosen = replace(chosen, seed=(self.seed + i) % 2**31)
            name = branch.name or f"branch-{len(self.given) + i + 1}"
            if branch.joined not in get_args(JoinedPart):
                raise InputError(f"joined must be one of {', '.join(get_args(JoinedPart))}, not {branch.joined!r}")
            self.branches.append(
                _Branch(branch.prompt, name, chosen, tuple(branch.tools), branch.limits, branch.joined)
            )

        self.synthesize, self.tools = synthesize, tools
        self.layout = Layout(fj.model, fj.layout, task, system, instruct(synthesize, tools))
        self.prompts: Prompts = self.layout.prompts([instruct(b.prompt, b.tools) for b in self.branches])
        needs = [Agent.cells(fj.model, b.prompt, b.sampling, b.tools, b.limits) for b in self.branches]
        longest = max((len(prompt) + n for prompt, n in zip(self.prompts.branches, needs, strict=True)), default=1)
        # of those, what the synthesizer may get
        self.spans = [
            b.sampling.max_tokens if b.joined == "final" else n for b, n in zip(self.branches, needs, strict=True)
        ]
        self.branch_cells = len(self.prompts.prefix) + longest
        self._check({"a branch": (self.branch_cells, self.branch_cells)} if branches else {})

    def plan_answer(
        self,
        mode: Mode,
        compare: bool,
        answer: Sampling | None,
        save: Path | None,
        keep: bool,
        room: int,
        limits: Limits,
    ) -> None:
        """What follows the branches. Raises InputError as `stream` does."""
        if mode not in ("cache", "text"):
            raise InputError(f"mode {mode!r} does not exist: choose 'cache' or 'text'")
        if mode == "text" and (compare or keep):
            raise InputError("compare and keep are for cache synthesis: use them with mode 'cache'")
        if save:
            check_writable(save)
        if mode == "cache" or save:
            check_joinable(self.fj.model)
        self.mode, self.compare, self.save, self.keep = mode, compare, save, keep
        self.limits = limits
        self.answer_sampling = answer or replace(self.sampling, stop=())
        if self.answer_sampling.seed is None:
            self.answer_sampling = replace(self.answer_sampling, seed=self.seed)
        # what each sequence may need at most
        p = self.prompts
        spans = [r.tokens for r in self.given] + self.spans
        if not 0 <= room < 2**20:
            raise InputError(f"room for {room} tokens is not possible")
        self.said_cells = Agent.cells(self.fj.model, self.synthesize, self.answer_sampling, self.tools, limits)
        self.room = room
        answer_cells = len(p.synthesizer) + self.said_cells + room
        self.synthesizer_cells = p.branch_point + sum(spans) + answer_cells
        names = [r.name for r in self.given] + [b.name for b in self.branches]
        texts = [r.text for r in self.given] + [""] * len(self.branches)
        pasted = len(p.prefix) + len(self.layout.pasted(names, texts))
        text_cells = pasted + sum(self.spans) + self.said_cells
        needs = {}
        if mode == "cache":
            # joined spans lie side by side: cells for all of them but positions for the longest
            needs["the synthesizer"] = (self.synthesizer_cells, p.branch_point + max(spans) + answer_cells - room)
        if mode == "text" or compare:
            needs["text synthesis"] = (text_cells, text_cells)
        self._check(needs)

        # keys move between contexts that encode positions alike
        limit = self.fj.model.long_context
        sizes = [self.branch_cells, self.synthesizer_cells, text_cells, *(given.ctx.n_ctx for given in self.joins)]
        if limit and round_up(max(sizes)) > limit:
            if any(given.ctx.n_ctx <= limit for given in self.joins):
                raise InputError(
                    f"branches to join have positions for a context of up to {limit:,} cells; this run needs more"
                )
            self.least_cells = limit + 1

    def _check(self, needs: dict[str, tuple[int, int]]) -> None:
        """Cells and positions that each may need, against what it may have."""
        for who, (cells, reach) in needs.items():
            if self.fj._n_ctx is not None and cells > self.fj._n_ctx:
                raise InputError(f"{who} may need {cells:,} cells; the limit given is {self.fj._n_ctx:,} (n_ctx)")
            if reach > (trained := self.fj.model.n_ctx_train):
                raise InputError(
                    f"{who} may need {reach:,} positions, but {self.fj.model.name} was trained on {trained:,}: use "
                    f"fewer or shorter branches (max_tokens), or a shorter task"
                )

    def _context(self, n_ctx: int, n_seq: int = 1, *, flash_attn: bool = False, adapter: bool = False) -> Context:
        fj = self.fj
        options = ContextOptions(kv_type=fj._kv_type, threads=fj._threads, min_cells=self.least_cells)
        return options.open(fj.model, n_ctx, n_seq, flash_attn=flash_attn, adapter=fj.adapter if adapter else None)

    def _pair(self, contexts: ExitStack, prompt: Sequence[int], cells: int, more: int, adapter: bool) -> _Pair:
        """Where a prompt is read, and where its answer is decoded: often the same context.

        Args:
            cells: needed up to the prompt's end; more: after it.
        """
        decoder = contexts.enter_context(self._context(cells + more, adapter=adapter))
        if why_not_joinable(self.fj.model) or not reads_apart(len(prompt), self.fj._kv_type):
            return decoder, decoder
        return contexts.enter_context(self._context(cells, flash_attn=True, adapter=adapter)), decoder

    def fork(self) -> Branches:
        """The branches alone."""
        ctx = self._context(self.branch_cells, len(self.branches))
        try:
            self._prefix(ctx, None)
            events = self._run_branches(ctx)
            while True:
                next(events)
        except StopIteration as end:
            return Branches(ctx, end.value[0])
        except BaseException:
            ctx.close()
            raise

    def events(self) -> Iterator[Event]:
        start = time.perf_counter()
        with ExitStack() as contexts:
            ctx = contexts.enter_context(self._context(self.branch_cells, max(len(self.branches), 1)))
            synthesizer: _Pair | None = None
            if self.mode == "cache":
                more = self.said_cells + self.room
                prompt = self.prompts.synthesizer
                synthesizer = self._pair(contexts, prompt, self.synthesizer_cells - more, more, adapter=True)
                for context in set(synthesizer):
                    context.warm_up()
            self._prefix(ctx, synthesizer[0] if synthesizer else None)
            for i, result in enumerate(self.given):
                yield BranchDone(i, result)
            cached, last_token, flush_ms = yield from self._run_branches(ctx)
            branches_ms = (last_token - start) * 1e3
            results = (*self.given, *(c.result for c in cached))

            answer, compare, kept = _NOTHING, None, None
            if synthesizer and not self.stopped():
                joins = [*self.joins, *([Branches(ctx, cached)] if cached else [])]
                answer, said = yield from self._from_caches(joins, synthesizer, flush_ms)
                for context in synthesizer:
                    if self.keep and context is synthesizer[1]:
                        kept = Branches(context, [said])
                    else:
                        context.close()
            elif not self.stopped():
                answer = yield from self._from_texts(ctx, results)
            total = (time.perf_counter() - start) * 1e3
            if self.save and cached:
                write_slots(self.save, [Branches(ctx, cached)])
            if self.compare and not self.stopped():
                compare = yield from self._from_texts(ctx, results)
                timing = compare.timing_ms
                timing = replace(timing, branches=branches_ms, total=branches_ms + timing.total)
                compare = replace(compare, timing_ms=timing)
            if kept:
                contexts.pop_all()
                ctx.close()
        fj = self.fj
        yield Done(
            Result(
                model=fj.model.name,
                adapter=str(fj.adapter.path) if fj.adapter else None,
                mode=self.mode,
                layout=fj.layout,
                seed=self.seed,
                answer=answer.answer,
                branches=results,
                tokens=answer.tokens,
                timing_ms=replace(answer.timing_ms, branches=branches_ms, total=total),
                compare=compare,
                interrupted=self.stopped(),
                calls=answer.calls,
                kept=kept,
            )
        )

    def _run_branches(self, ctx: Context) -> Generator[Event, None, tuple[list[Cached], float, float]]:
        """All branches to their ends. Returns them, when the last token was chosen (time.perf_counter), and the
        milliseconds that its K and V took, which are part of the time to first token."""
        first, last_token = len(self.given), time.perf_counter()
        branches = zip(self.branches, self.prompts.branches, strict=True)
        agents = [
            Agent(ctx, i, b.prompt, prompt, b.sampling, b.tools, b.limits) for i, (b, prompt) in enumerate(branches)
        ]
        began = last_token
        for found, said in run_agents(ctx, agents, self.stopped):
            last_token = time.perf_counter()
            if isinstance(said, ToolCall):
                yield ToolCalled(first + found.seq, said)
            else:
                yield BranchToken(first + found.seq, said)
                if found.done:
                    yield BranchDone(first + found.seq, self._cached(found).result)
            began = time.perf_counter()
        # the last tokens' K and V were still to be computed
        flush_ms = (time.perf_counter() - began) * 1e3
        return [self._cached(x) for x in agents], last_token, flush_ms

    def _cached(self, found: Agent) -> Cached:
        branch = self.branches[found.seq]
        spans = found.spans(branch.joined)
        tokens = found.tokens_of(spans)
        text = found.answer if branch.joined == "final" else self._text(tokens)
        result = BranchResult(
            branch.name,
            branch.prompt,
            text,
            len(tokens),
            _finish_reason(found.turn),
            tuple(found.calls),
        )
        return Cached(result, found.seq, spans, tokens)

    def _text(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.fj.model.piece, tokens)).decode(errors="replace")

    def _prefix(self, ctx: Context, synthesizer: Context | None) -> None:
        """The prefix, computed once: to every branch, and to a synthesizer that keeps it. The synthesizer's copy comes
        from here even if it has a LoRA: what it reads was written without."""
        n = len(self.prompts.prefix)
        if n == 0:
            return
        ctx.prefill(0, self.prompts.prefix)
        for seq in range(1, ctx.n_seq):
            ctx.copy(0, seq)
        if synthesizer and self.prompts.branch_point:
            join(ctx, synthesizer, [Span(0, 0, n, 0)])

    def _from_caches(
        self, joins: Sequence[Branches], synthesizer: _Pair, flush_ms: float
    ) -> Generator[Event, None, tuple[Synthesis, Cached]]:
        """Join, then answer. Returns a Synthesis whose branches and total are not filled in, and where it lies."""
        began = time.perf_counter()
        said = [[c for c in given.cached if c.tokens] for given in joins]  # a branch may have been empty
        lengths = [len(c.tokens) for cached in said for c in cached]
        starts = iter(place(self.prompts.branch_point, lengths, self._in_order(sum(lengths))))
        mapper = self.fj.adapter.mapper if self.fj.adapter else None
        affine = mapper.coefficients(lengths, len(rotated_layers(self.fj.model))) if mapper and lengths else None
        joined = i = 0  # cells; and branches
        for given, cached in zip(joins, said, strict=True):
            spans, of = [], []  # and which branch each is of
            for c in cached:
                to = next(starts)
                for start, end in c.spans:  # without gaps
                    spans.append(Span(c.seq, start, end, to))
                    of.append(i)
                    to += end - start
                i += 1
            if spans:
                joined += join(given.ctx, synthesizer[0], spans, 0, None if affine is None else affine[of])
        join_ms = (time.perf_counter() - began) * 1e3
        yield Joined(joined, join_ms)
        answer, agent = yield from self._answer(synthesizer, self.prompts.synthesizer, "cache")
        timing = answer.timing_ms
        answer = replace(
            answer,
            tokens=replace(answer.tokens, joined=joined, prefilled=len(self.prompts.synthesizer)),
            timing_ms=replace(timing, join=join_ms, ttft=flush_ms + join_ms + timing.prefill),
        )
        lies = agent.spans("final")
        tokens = agent.tokens_of(lies)
        result = BranchResult("answer", self.task, answer.answer, len(tokens), _finish_reason(agent.turn), answer.calls)
        return answer, Cached(result, 0, lies, tokens)

    def _in_order(self, n: int) -> bool:
        """Whether spans of n tokens are placed one after the other: if the adapter wants it and the model has positions
        for them. At the branch point there is room for more."""
        answer = len(self.prompts.synthesizer) + self.said_cells
        fits = self.prompts.branch_point + n + answer <= self.fj.model.n_ctx_train
        return bool(self.fj.adapter and self.fj.adapter.in_order and fits)

    def _from_texts(self, branches: Context, results: Sequence[BranchResult]) -> Generator[Event, None, Synthesis]:
        """Paste and read again, as well as llama.cpp can: the prefix is kept, a long prompt is read with flash
        attention. Making the contexts is not counted: whoever does this for a living has them ready."""
        prefix = self.prompts.prefix
        tail = self.layout.pasted([r.name for r in results], [r.text for r in results])
        with ExitStack() as contexts:
            pair = self._pair(contexts, tail, len(prefix) + len(tail), self.said_cells, adapter=False)
            if prefix and not why_not_joinable(self.fj.model):
                join(branches, pair[0], [Span(0, 0, len(prefix), 0)])
            elif prefix:
                pair[0].prefill(0, prefix)
            answer, _ = yield from self._answer(pair, tail, "text")
            return replace(
                answer,
                tokens=replace(answer.tokens, prefilled=len(tail)),
                timing_ms=replace(answer.timing_ms, ttft=answer.timing_ms.prefill),
            )

    def _answer(self, pair: _Pair, prompt: list[int], mode: Mode) -> Generator[Event, None, tuple[Synthesis, Agent]]:
        """Prefill the prompt and generate. Of the Synthesis, prefill and total count from here."""
        reader, decoder = pair
        began = time.perf_counter()
        left = read_prompt(reader, decoder, prompt)
        agent = Agent(decoder, 0, self.synthesize, left, self.answer_sampling, self.tools, self.limits)
        first = None
        for _, said in run_agents(decoder, [agent], self.stopped):
            first = first or time.perf_counter()
            yield ToolCalled(None, said, mode) if isinstance(said, ToolCall) else AnswerToken(said, mode)
        ended = time.perf_counter()
        answer = replace(
            _NOTHING,
            answer=agent.answer,
            tokens=replace(_NOTHING.tokens, generated=len(agent.tokens_of(agent.spans("final")))),
            timing_ms=replace(
                _NOTHING.timing_ms, prefill=((first or ended) - began) * 1e3, total=(ended - began) * 1e3
            ),
            calls=tuple(agent.calls),
        )
        return answer, agent


def _finish_reason(g: Generation) -> Literal["stop", "length"]:
    """What an interruption cut off has simply become as long as it will be."""
    return "stop" if g.finish_reason == "stop" else "length"


_NOTHING = Synthesis("", Tokens(joined=0, prefilled=0, generated=0), Timing(0.0, 0.0, 0.0, 0.0, 0.0))
