"""ForkJoin: branches in parallel, their caches joined, one answer."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import llama_cpp

from pyps.adapter import Adapter
from pyps.context import MAX_SEQUENCES, Context, Span, join, prefers_flash_attn, round_up, split_kv_type
from pyps.errors import InputError
from pyps.events import (
    AnswerToken,
    BranchDone,
    BranchResult,
    BranchToken,
    Done,
    Event,
    Joined,
    Mode,
    Result,
    Synthesis,
    Timing,
    Tokens,
)
from pyps.generate import Generation, generate
from pyps.layout import DEFAULT_SYNTHESIZE, Layout, Prompts, place
from pyps.model import Model
from pyps.models import AUTO, DEFAULT_MODEL, Progress, find_adapter, find_model
from pyps.sampling import Sampling, draw_seed

# From this many tokens on, flash attention has its tiled kernel on a CPU; with fewer it is far slower than without.
_FLASH_ATTN_MIN = 64


@dataclass(frozen=True)
class Branch:
    """One branch: its instruction (may be empty: a plain sample of the task), its name, its sampling (None: the
    run's)."""

    prompt: str = ""
    name: str | None = None
    sampling: Sampling | None = None


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
        branches: Sequence[str | Branch],
        *,
        system: str | None = None,
        synthesize: str = DEFAULT_SYNTHESIZE,
        mode: Mode = "cache",
        compare: bool = False,
        sampling: Sampling | None = None,
        answer: Sampling | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Result:
        """`stream` to its end: the result. Same arguments and exceptions."""
        events = self.stream(
            task,
            branches,
            system=system,
            synthesize=synthesize,
            mode=mode,
            compare=compare,
            sampling=sampling,
            answer=answer,
            stopped=stopped,
        )
        for event in events:
            if isinstance(event, Done):
                return event.result
        raise AssertionError("a stream ends with Done")

    def stream(
        self,
        task: str,
        branches: Sequence[str | Branch],
        *,
        system: str | None = None,
        synthesize: str = DEFAULT_SYNTHESIZE,
        mode: Mode = "cache",
        compare: bool = False,
        sampling: Sampling | None = None,
        answer: Sampling | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Event]:
        """Run branches and synthesizer, reporting as it goes; the last event is Done.

        Args:
            task: what the job is about; every branch and the synthesizer see it.
            branches: 1 to 256 instructions, or Branch objects.
            system: the system message; None for the model's own default.
            synthesize: the synthesizer's instruction.
            mode: "cache" joins the branches' caches, "text" pastes their texts and reads them again.
            compare: in cache mode, run text synthesis on the same branches afterwards.
            sampling, answer: for the branches and for the answer; None for the defaults. Branches get consecutive
                seeds, the answer the first of them.
            stopped: asked at every token; once true, the run ends early with what there is.

        Raises:
            InputError: something is wrong or does not fit; found before any work is done.
            EngineError: llama.cpp failed.
        """
        run = _Run(self, task, branches, system, synthesize, mode, compare, sampling, answer, stopped)
        return run.events()


@dataclass(frozen=True)
class _Branch:
    """A Branch with nothing left open."""

    prompt: str
    name: str
    sampling: Sampling


class _Run:
    """One fork-join from beginning to end. Its contexts live as long as it does."""

    def __init__(
        self,
        fj: ForkJoin,
        task: str,
        branches: Sequence[str | Branch],
        system: str | None,
        synthesize: str,
        mode: Mode,
        compare: bool,
        sampling: Sampling | None,
        answer: Sampling | None,
        stopped: Callable[[], bool],
    ) -> None:
        if mode not in ("cache", "text"):
            raise InputError(f"mode {mode!r} does not exist: choose 'cache' or 'text'")
        if compare and mode == "text":
            raise InputError("compare runs text synthesis beside cache synthesis: use it with mode 'cache'")
        if not branches:
            raise InputError("there are no branches: give at least one")
        if len(branches) > MAX_SEQUENCES:
            raise InputError(f"{len(branches)} branches are too many: llama.cpp takes up to {MAX_SEQUENCES}")
        self.fj, self.mode, self.compare, self.stopped = fj, mode, compare, stopped
        fj.model.check_generates()
        if mode == "cache":
            fj.model.check_joinable()

        sampling = sampling or Sampling()
        self.seed = draw_seed() if sampling.seed is None else sampling.seed
        self.answer_sampling = answer or replace(sampling, stop=())
        if self.answer_sampling.seed is None:
            self.answer_sampling = replace(self.answer_sampling, seed=self.seed)
        self.branches: list[_Branch] = []
        for i, item in enumerate(branches):
            branch = Branch(item) if isinstance(item, str) else item
            chosen = branch.sampling or sampling
            if chosen.seed is None or branch.sampling is None:
                chosen = replace(chosen, seed=(self.seed + i) % 2**31)
            self.branches.append(_Branch(branch.prompt, branch.name or f"branch-{i + 1}", chosen))

        self.layout = Layout(fj.model, fj.layout, task, system, synthesize)
        self.prompts: Prompts = self.layout.prompts([b.prompt for b in self.branches])
        self._check_sizes()

    def _check_sizes(self) -> None:
        """What each sequence may need at most, against what it may have."""
        p = self.prompts
        spans = [b.sampling.max_tokens for b in self.branches]
        longest = max(len(prompt) + n for prompt, n in zip(p.branches, spans, strict=True))
        answer = len(p.synthesizer) + self.answer_sampling.max_tokens
        self.branch_cells = len(p.prefix) + longest
        self.synthesizer_cells = p.branch_point + sum(spans) + answer
        pasted = len(p.prefix) + len(self.layout.pasted([b.name for b in self.branches], [""] * len(spans)))
        text_cells = pasted + sum(spans) + self.answer_sampling.max_tokens

        # keys move between contexts that encode positions alike
        limit = self.fj.model.long_context
        most = round_up(max(self.branch_cells, self.synthesizer_cells, text_cells))
        self.least_cells = limit + 1 if limit and most > limit else 1

        trained = self.fj.model.n_ctx_train
        # joined spans lie side by side, so the synthesizer needs cells for all of them but positions for the longest
        needs = {"a branch": (self.branch_cells, self.branch_cells)}
        if self.mode == "cache":
            needs["the synthesizer"] = (self.synthesizer_cells, p.branch_point + max(spans) + answer)
        if self.mode == "text" or self.compare:
            needs["text synthesis"] = (text_cells, text_cells)
        for who, (cells, reach) in needs.items():
            if self.fj._n_ctx is not None and cells > self.fj._n_ctx:
                raise InputError(f"{who} may need {cells:,} cells; the limit given is {self.fj._n_ctx:,} (n_ctx)")
            if reach > trained:
                raise InputError(
                    f"{who} may need {reach:,} positions, but {self.fj.model.name} was trained on {trained:,}: use "
                    f"fewer or shorter branches (max_tokens), or a shorter task"
                )

    def _context(self, n_ctx: int, n_seq: int = 1, *, flash_attn: bool = False, adapter: bool = False) -> Context:
        fj = self.fj
        return Context(
            fj.model,
            max(n_ctx, self.least_cells),
            n_seq,
            kv_type=fj._kv_type,
            flash_attn=flash_attn or fj._flash_attn,
            threads=fj._threads,
            adapter=fj.adapter if adapter else None,
        )

    def events(self) -> Iterator[Event]:
        start = time.perf_counter()
        with self._context(self.branch_cells, len(self.branches)) as ctx:
            synthesizer = self._context(self.synthesizer_cells, adapter=True) if self.mode == "cache" else None
            try:
                if synthesizer:
                    synthesizer.warm_up()
                self._fork(ctx, synthesizer)
                generations = [
                    Generation(ctx, i, prompt, b.sampling)
                    for i, (b, prompt) in enumerate(zip(self.branches, self.prompts.branches, strict=True))
                ]
                stepper = generate(ctx, generations, self.stopped)
                done: dict[int, BranchResult] = {}
                last_token = time.perf_counter()
                for g, text in stepper:
                    last_token = time.perf_counter()
                    yield BranchToken(g.seq, text)
                    if g.finish_reason:
                        done[g.seq] = self._branch_result(g)
                        yield BranchDone(g.seq, done[g.seq])
                        if len(done) == len(generations):
                            break
                branches_ms = (last_token - start) * 1e3
                began = time.perf_counter()
                for _ in stepper:
                    pass  # the last tokens' K and V are still to be computed: part of the time to first token
                flush_ms = (time.perf_counter() - began) * 1e3
                results = tuple(done.get(g.seq) or self._branch_result(g) for g in generations)

                answer, compare = _NOTHING, None
                if synthesizer and not self.stopped():
                    answer = yield from self._from_caches(ctx, generations, synthesizer, flush_ms)
                    synthesizer.close()
                elif not self.stopped():
                    answer = yield from self._from_texts(ctx, results)
                total = (time.perf_counter() - start) * 1e3
                if self.compare and not self.stopped():
                    compare = yield from self._from_texts(ctx, results)
                    timing = compare.timing_ms
                    timing = replace(timing, branches=branches_ms, total=branches_ms + timing.total)
                    compare = replace(compare, timing_ms=timing)
            finally:
                if synthesizer:
                    synthesizer.close()
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
            )
        )

    def _branch_result(self, g: Generation) -> BranchResult:
        branch = self.branches[g.seq]
        # a branch that an interruption cut off has simply become as long as it will be
        return BranchResult(
            branch.name, branch.prompt, g.text, len(g.tokens), "stop" if g.finish_reason == "stop" else "length"
        )

    def _fork(self, ctx: Context, synthesizer: Context | None) -> None:
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
        self, ctx: Context, generations: Sequence[Generation], synthesizer: Context, flush_ms: float
    ) -> Generator[Event, None, Synthesis]:
        """Join, then answer. Returns a Synthesis whose branches and total are not filled in."""
        began = time.perf_counter()
        said = [g for g in generations if g.tokens]
        joined = 0
        if said:  # branches may all have been empty
            mapper = self.fj.adapter.mapper if self.fj.adapter else None
            lengths = [len(g.tokens) for g in said]
            starts = place(self.prompts.branch_point, lengths, self._in_order(sum(lengths)))
            spans = [Span(g.seq, g.start, g.end, to) for g, to in zip(said, starts, strict=True)]
            affine = mapper.coefficients(lengths, len(self.fj.model.rotated_layers)) if mapper else None
            joined = join(ctx, synthesizer, spans, 0, affine)
        join_ms = (time.perf_counter() - began) * 1e3
        yield Joined(joined, join_ms)
        answer = yield from self._answer(synthesizer, self.prompts.synthesizer, "cache")
        timing = answer.timing_ms
        return replace(
            answer,
            tokens=replace(answer.tokens, joined=joined, prefilled=len(self.prompts.synthesizer)),
            timing_ms=replace(timing, join=join_ms, ttft=flush_ms + join_ms + timing.prefill),
        )

    def _in_order(self, n: int) -> bool:
        """Whether spans of n tokens are placed one after the other: if the adapter wants it and the model has positions
        for them. At the branch point there is room for more."""
        answer = len(self.prompts.synthesizer) + self.answer_sampling.max_tokens
        fits = self.prompts.branch_point + n + answer <= self.fj.model.n_ctx_train
        return bool(self.fj.adapter and self.fj.adapter.in_order and fits)

    def _from_texts(self, branches: Context, results: Sequence[BranchResult]) -> Generator[Event, None, Synthesis]:
        """Paste and read again, as well as llama.cpp can: the prefix is kept, a long prompt is read with flash
        attention and moved to a context without it, which decodes faster (on a CPU). Making the contexts is not
        counted: whoever does this for a living has them ready."""
        prefix = self.prompts.prefix
        tail = self.layout.pasted([r.name for r in results], [r.text for r in results])
        joinable = not self.fj.model.why_not_joinable
        size = len(prefix) + len(tail)
        contexts = [self._context(size + self.answer_sampling.max_tokens)]
        try:
            reads_long = joinable and len(tail) > _FLASH_ATTN_MIN and not self.fj._flash_attn
            if reads_long:
                contexts.append(self._context(size, flash_attn=True))
            decoder, reader = contexts[0], contexts[-1]
            if prefix and joinable:
                join(branches, reader, [Span(0, 0, len(prefix), 0)])
            elif prefix:
                reader.prefill(0, prefix)
            began = time.perf_counter()
            if reads_long:
                reader.prefill(0, tail[:-1])
                join(reader, decoder, [Span(0, 0, reader.end(0), 0)])
            read_ms = (time.perf_counter() - began) * 1e3
            answer = yield from self._answer(decoder, tail[-1:] if reads_long else tail, "text")
            timing = answer.timing_ms
            prefill = read_ms + timing.prefill
            return replace(
                answer,
                tokens=replace(answer.tokens, prefilled=len(tail)),
                timing_ms=replace(timing, prefill=prefill, ttft=prefill, total=read_ms + timing.total),
            )
        finally:
            for ctx in contexts:
                ctx.close()

    def _answer(self, ctx: Context, prompt: list[int], mode: Mode) -> Generator[Event, None, Synthesis]:
        """Prefill the prompt and generate. Of the Synthesis, prefill and total count from here."""
        generation = Generation(ctx, 0, prompt, self.answer_sampling)
        began = time.perf_counter()
        first = None
        for _, text in generate(ctx, [generation], self.stopped):
            first = first or time.perf_counter()
            yield AnswerToken(text, mode)
        ended = time.perf_counter()
        return replace(
            _NOTHING,
            answer=generation.text,
            tokens=replace(_NOTHING.tokens, generated=len(generation.tokens)),
            timing_ms=replace(
                _NOTHING.timing_ms, prefill=((first or ended) - began) * 1e3, total=(ended - began) * 1e3
            ),
        )


_NOTHING = Synthesis("", Tokens(joined=0, prefilled=0, generated=0), Timing(0.0, 0.0, 0.0, 0.0, 0.0))
