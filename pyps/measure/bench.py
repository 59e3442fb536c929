"""Speed: the time from the branches' last token to the answer's first, from their caches and from their texts.

Everything is done in one process, one side after the other, in rounds; what is reported are medians, their spread, and
what bounds them:

    text     the pasted texts and the synthesizer's prompt are read, at the best of llama.cpp's settings; the prefix is
             in the cache already, as a good server has it
    cache    join (export, re-encode, map, place) and the synthesizer's prompt
    floor    the synthesizer's prompt alone, on a cache that holds the same cells already
    bound    what the floor cannot be below on this hardware (bounds.py)
    kshift   llama.cpp's own pieces: all in one unified cache, positions moved by its K-shift of the whole

Branches are made of the model's tokens for a text, of exactly the length that the case names. They have ended by
themselves, as branches do: one that is cut off by max_tokens still has its last token to compute.
"""

import concurrent.futures
import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from pyps.adapters.adapter import Adapter
from pyps.engine import kernels
from pyps.engine.context import Context, Token, cell_bytes, prefers_flash_attn
from pyps.engine.find import Progress, no_progress
from pyps.engine.join import Span, join
from pyps.engine.model import Model
from pyps.engine.positions import check_joinable
from pyps.engine.sampling import Sampler, Sampling
from pyps.engine.tuned import cpu_name, tuned
from pyps.errors import InputError, PypsError
from pyps.forkjoin import ForkJoin
from pyps.forkjoin.reading import HEAD, JOIN_ONLY, Again, Reading
from pyps.forkjoin.synthesis import ContextOptions, Output, Synthesizer, placement
from pyps.measure.bounds import Rates, least_ms, measure_rates
from pyps.measure.reports import BenchReport, BenchRow, Machine, Median

_LABEL = 6  # tokens of the line before an output, as "[branch-1]" has
_INSTRUCTION = 16  # tokens that a branch is told before it writes
_DECODED = 16  # tokens of each branch over which the decoding rate is taken
_TEXT_SETTINGS = tuple(product((False, True), (256, 512, 2048)))  # flash attention, tokens computed at once

_TEXT = (
    "The harbour wakes before the town does. Crates are counted, ropes are coiled, and somebody always asks where the "
    "second boat has gone. By seven the market has its fish, by eight the cafes have their bread, and the ferry leaves "
    "whether or not the mail is on it. In winter there are fewer people and the same number of gulls. "
)


@dataclass(frozen=True)
class Case:
    """What one row measures.

    Attributes:
        branches: Number of branches.
        tokens: Tokens of each branch's output.
        prompt: Tokens of the synthesizer's prompt; in the paper layout the task comes on top.
        task: Tokens of the prefix, which text synthesis has in its cache, and in the shared layout the synthesizer too.
    """

    branches: int
    tokens: int
    prompt: int
    task: int

    def check(self) -> None:
        """Raise InputError if a size is out of range."""
        for name, least, most in (("branches", 1, 128), ("tokens", 1, 2**20), ("prompt", 1, 2**20), ("task", 1, 2**20)):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name} must be {least:,} to {most:,}, not {getattr(self, name):,}")


def run_bench(
    fj: ForkJoin,
    cases: Sequence[Case],
    *,
    path: Path,
    repeat: int,
    name: str | None = None,
    reading: Reading = JOIN_ONLY,
    kv_type: str = "f16",
    threads: int | None = None,
    report: Progress = no_progress,
    stopped: Callable[[], bool] = lambda: False,
) -> BenchReport:
    """Measure all cases with the model, the adapter and the layout of `fj`. The peak of memory is left out.

    Args:
        fj: What is measured.
        cases: At least one; all have the same task.
        path: The model's file.
        repeat: Rounds for the medians.
        name: What the report calls the model; None for its file's name.
        reading: What the synthesizer reads again.
        kv_type: Type of K and V in the caches.
        threads: Threads of each context; None for what suits the model on this machine.
        report: Called with what is being measured and the fraction that is done.
        stopped: Asked before each round; once true, the report has the rows that are done.

    Raises:
        RefusedError: The model's caches cannot be joined.
        InputError: A case does not fit into this machine.
    """
    model, adapter = fj.model, fj.adapter
    check_joinable(model)
    for case in cases:
        case.check()
    report("what this machine can do", None)
    rates = measure_rates(model, kv_type, threads)
    rows = measure(
        model,
        adapter,
        fj.layout,
        cases,
        repeat=repeat,
        rates=rates,
        reading=reading,
        kv_type=kv_type,
        threads=threads,
        report=report,
        stopped=stopped,
    )
    return BenchReport(
        kernels=kernels.in_use(),
        reading=reading.describe(),
        model=name or model.name,
        adapter=str(adapter.path) if adapter else None,
        layout=fj.layout,
        kv_type=kv_type,
        task=cases[0].task,
        repeat=repeat,
        machine=describe_machine(model, threads, rates),
        cell_bytes=cell_bytes(model, kv_type),
        model_mb=path.stat().st_size / 1e6,
        rows=tuple(rows),
    )


def measure(
    model: Model,
    adapter: Adapter | None,
    layout: str,
    cases: Sequence[Case],
    *,
    repeat: int,
    rates: Rates | None = None,
    reading: Reading = JOIN_ONLY,
    kv_type: str = "f16",
    threads: int | None = None,
    report: Progress = no_progress,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[BenchRow]:
    """Yield the row of each case when it is done.

    Args:
        model: The model.
        adapter: Used by the synthesizer; None for none.
        layout: The prompt layout.
        cases: What to measure.
        repeat: Rounds for the medians; one more, before them, warms up.
        rates: What the machine can do, for the bounds; None leaves them out.
        reading: What the synthesizer reads again: as many tokens, at places of their usual length.
        kv_type: Type of K and V in the caches.
        threads: Threads of each context; None for what suits the model on this machine.
        report: Called with the case and the fraction that is done.
        stopped: Asked before each round; once true, there are no more rows.

    Raises:
        RefusedError: The model's caches cannot be joined.
        InputError: A case does not fit into this machine.
    """
    check_joinable(model)
    for case in cases:
        case.check()
    options = ContextOptions(kv_type=kv_type, threads=threads)
    total = len(cases) * (repeat + 1)
    for i, case in enumerate(cases):
        what = f"{case.branches} x {case.tokens} tokens, prompt {case.prompt}"
        report(what, i / len(cases))
        with _Sides(model, adapter, layout, case, options, reading) as sides:
            for n in range(repeat + 1):  # the first warms up
                if stopped():
                    return
                sides.step(keep=n > 0)
                report(what, (i * (repeat + 1) + n + 1) / total)
            yield sides.row(rates)
    report("done", 1.0)


def _places(n: int, share: float) -> NDArray[np.bool_]:
    """Return a share of n tokens: the first ones, and places of nine tokens at even distances.

    A word of one token with four on either side takes nine.
    """
    places = np.zeros(n, np.bool_)
    places[:HEAD] = share > 0
    budget = int(share * n)
    for start in np.linspace(HEAD, n, max((budget - HEAD) // 9, 0) + 1, dtype=int)[:-1]:
        places[start : start + 9] = True
    return places


class _Sides:
    """The contexts of one case, filled once."""

    def __init__(
        self,
        model: Model,
        adapter: Adapter | None,
        layout: str,
        case: Case,
        options: ContextOptions,
        reading: Reading,
    ) -> None:
        self._model, self._adapter, self._layout, self._case, self._options = model, adapter, layout, case, options
        self._times: dict[str, list[float]] = {}
        self._contexts: list[Context] = []
        self._best: Context | None = None
        self._synthesizer: Synthesizer | None = None
        self._prefix = _tokens(model, case.task, 0)
        self._outputs = [_tokens(model, case.tokens, 7 * i + 1) for i in range(case.branches)]
        self._prompt = _tokens(model, case.prompt, 3)  # behind pasted texts
        shared = layout == "shared"
        self._branch_point = case.task if shared else 0
        self._synthesizer_prompt = self._prompt if shared else self._prefix + self._prompt
        self._start = case.task + _INSTRUCTION  # where outputs stand in their branches
        labels = [_tokens(model, _LABEL, 5 * i + 2) for i in range(case.branches)] if reading.labels else []
        self._again = None
        if not reading.joins_only:
            choice = [_places(case.tokens, reading.share)] * case.branches
            self._again = Again(labels=labels, choice=choice, correction=reading.correction)
        self._pasted = [*(labels or [[]] * case.branches)]  # in front of each output in text synthesis
        self._starts = placement(
            self._branch_point,
            [case.tokens] * case.branches,
            in_order=bool(adapter and adapter.in_order),
            labels=[len(label) for label in labels],
            after=len(self._synthesizer_prompt) + 1,
            n_positions=model.n_ctx_train,
        )
        self._sampler = Sampler(model, Sampling(temperature=0, repeat_penalty=1))
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "_Sides":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sampler.close()
        if self._synthesizer:
            self._synthesizer.close()
        for ctx in self._contexts:
            ctx.close()

    @property
    def synthesizer(self) -> Synthesizer:
        assert self._synthesizer is not None
        return self._synthesizer

    def _context(self, n_ctx: int, n_seq: int = 1, *, flash_attn: bool | None = None, **options: Any) -> Context:
        ctx = self._options.open(self._model, n_ctx, n_seq, flash_attn=flash_attn, **options)
        self._contexts.append(ctx)
        return ctx

    def _fill(self) -> None:
        c = self._case
        cells = self._branch_point + c.branches * c.tokens + len(self._synthesizer_prompt)
        self._branches = self._context(self._start + c.tokens + _DECODED, c.branches)
        self._synthesizer = Synthesizer(
            self._model,
            prompt=len(self._synthesizer_prompt),
            cells=cells,
            after=0,
            options=self._options,
            adapter=self._adapter,
        )
        self._branches.prefill(0, self._prefix)
        for seq in range(1, c.branches):
            self._branches.copy(0, seq)
        for seq, output in enumerate(self._outputs):
            self._branches.prefill(seq, _tokens(self._model, _INSTRUCTION, seq) + output)
        self._synthesizer.warm_up()
        self._unified: Context | None = None
        if llama_cpp.llama_memory_can_shift(llama_cpp.llama_get_memory(self._branches.pointer)):
            self._unified = self._context(cells, c.branches + 1, unified=True)
            for i in range(c.branches):
                join(self._branches, self._unified, [Span(i, self._start, self._start + c.tokens, self._start)], i + 1)
            if self._branch_point:
                join(self._branches, self._unified, [Span(0, 0, c.task, 0)])
        self._synthesizer.keep_prefix(self._branches, self._branch_point)

    def step(self, keep: bool) -> None:
        """Do every side once. The first time, text synthesis is tried in every setting: the best one stays."""
        times = self._cache() | {"text_ms": self._text(self._best_text())} | self._decode()
        if self._unified:
            times["kshift_ms"] = self._kshift(self._unified)
        if keep:
            times["ratio"] = times["text_ms"] / times["cache_ms"]
            times["join_share"] = times["join_ms"] / times["cache_ms"]
            times["floor_ratio"] = times["cache_ms"] / times["floor_ms"]
            times["batch_gain"] = times["batch_tokens_s"] / times["single_tokens_s"]
            for name, value in times.items():
                self._times.setdefault(name, []).append(value)

    def _first_token(self, ctx: Context, prompt: Sequence[int]) -> None:
        ctx.prefill(0, prompt)
        self._sampler.sample(ctx, -1)

    def _cache(self) -> dict[str, float]:
        c, synthesizer = self._case, self.synthesizer
        stretch = (self._start, self._start + c.tokens)
        outputs = [Output(self._branches, seq, (stretch,), self._outputs[seq]) for seq in range(c.branches)]
        synthesizer.forget(self._branch_point)
        began = time.perf_counter()
        synthesizer.join(outputs, self._starts, self._adapter.mapper if self._adapter else None, self._again)
        joined = time.perf_counter()
        if self._again:
            synthesizer.read_again(outputs, self._starts, self._again)
        self._first_token(synthesizer.decoder, synthesizer.read(self._synthesizer_prompt))
        ended = time.perf_counter()

        # the cells are there already: the same prompt on them is the floor
        synthesizer.reader.remove(0, self._starts[-1] + c.tokens)
        again = time.perf_counter()
        self._first_token(synthesizer.reader, self._synthesizer_prompt)
        floor = time.perf_counter() - again
        return {"cache_ms": (ended - began) * 1e3, "join_ms": (joined - began) * 1e3, "floor_ms": floor * 1e3}

    def _best_text(self) -> Context:
        """Return the context in which text synthesis is fastest.

        The first call tries all settings, one after the other: all at once may not fit into memory.
        """
        if self._best is None:
            c = self._case
            least = math.inf
            for flash, batch in _TEXT_SETTINGS:
                if not flash and prefers_flash_attn(self._model, self._options.kv_type):
                    continue
                ctx = self._context(c.task + c.branches * c.tokens + c.prompt, flash_attn=flash, n_batch=batch)
                ctx.warm_up()
                join(self._branches, ctx, [Span(0, 0, c.task, 0)])
                worse: Context | None = ctx
                if (took := self._text(ctx)) < least:
                    least, worse, self._best = took, self._best, ctx
                    self._setting = f"flash attention {'on' if flash else 'off'}, batches of {batch}"
                if worse:
                    worse.close()
        assert self._best is not None
        return self._best

    def _text(self, ctx: Context) -> float:
        notes = [label + output for label, output in zip(self._pasted, self._outputs, strict=True)]
        tail = [token for note in notes for token in note] + self._prompt
        ctx.remove(0, self._case.task)
        began = time.perf_counter()
        self._first_token(ctx, tail)
        return (time.perf_counter() - began) * 1e3

    def _kshift(self, ctx: Context) -> float:
        c, memory = self._case, llama_cpp.llama_get_memory(ctx.pointer)
        began = time.perf_counter()
        for i, to in enumerate(self._starts):
            start, end = self._start, self._start + c.tokens
            llama_cpp.llama_memory_seq_add(memory, i + 1, start, end, to - start)
            llama_cpp.llama_memory_seq_cp(memory, i + 1, 0, to, to + c.tokens)
        self._first_token(ctx, self._synthesizer_prompt)  # the shift is part of the next decode
        took = (time.perf_counter() - began) * 1e3
        ctx.remove(0, self._branch_point)
        for i, to in enumerate(self._starts):
            llama_cpp.llama_memory_seq_add(memory, i + 1, to, to + c.tokens, self._start - to)
        ctx.prefill(0, self._prompt[:1])
        ctx.remove(0, self._branch_point)
        return took

    def _decode(self) -> dict[str, float]:
        """Return tokens per second of all branches, in one batch and one after another."""
        c, ctx = self._case, self._branches
        end = self._start + c.tokens
        rates = {}
        for name, groups in (
            ("batch_tokens_s", [range(c.branches)]),
            ("single_tokens_s", [[seq] for seq in range(c.branches)]),
        ):
            began = time.perf_counter()
            for group in groups:
                for i in range(_DECODED):
                    ctx.decode([Token(self._prefix[0], end + i, seq, logits=True) for seq in group])
            ctx.synchronize()
            rates[name] = c.branches * _DECODED / (time.perf_counter() - began)
            for seq in range(c.branches):
                ctx.remove(seq, end)
        return rates

    def row(self, rates: Rates | None) -> BenchRow:
        """Return the medians of all rounds."""
        c, kv_type = self._case, self._options.kv_type
        medians: dict[str, Any] = {"kshift_ms": None}
        for name, values in self._times.items():
            medians[name] = Median(statistics.median(values), min(values), max(values))
        floor_bound = batch_bound = None
        if rates:
            cells, prompt = self._branch_point + c.branches * c.tokens, len(self._synthesizer_prompt)
            floor_bound = least_ms(self._model, rates, kv_type, prompt, cells)
            step = least_ms(self._model, rates, kv_type, 1, self._start + c.tokens, c.branches)
            batch_bound = c.branches / step * 1e3
        return BenchRow(
            **asdict(c),
            layout=self._layout,
            text_setting=self._setting,
            floor_bound_ms=floor_bound,
            batch_bound_tokens_s=batch_bound,
            **medians,
        )


def _tokens(model: Model, n: int, skip: int) -> list[int]:
    """Return n tokens of the text, which is repeated as often as it takes, from its skip-th on."""
    tokens = model.tokenize(_TEXT)
    return (tokens * ((skip + n) // len(tokens) + 1))[skip : skip + n]


def peak_memory(path: Path, adapter: Path | None, layout: str, kv_type: str, case: Case) -> float | None:
    """Return the most megabytes resident in a process that does the branches and the cache side of a case alone.

    None stands for a process that failed.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit what this process holds
    with concurrent.futures.ProcessPoolExecutor(1, spawn, _ignore_ctrl_c) as pool:
        try:
            return pool.submit(_peak_memory, path, adapter, layout, kv_type, case).result()
        except (concurrent.futures.BrokenExecutor, PypsError):
            return None  # killed; or the case needs more positions than the model has, which only real runs refuse


def _ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # this process decides


def _peak_memory(path: Path, adapter: Path | None, layout: str, kv_type: str, case: Case) -> float:
    sampling = Sampling(max_tokens=case.tokens, seed=1, ignore_eos=True)
    with ForkJoin.from_pretrained(str(path), adapter=adapter, layout=layout, kv_type=kv_type) as fj:
        fj.run(_TEXT, [""] * case.branches, sampling=sampling, answer=Sampling(max_tokens=1))
    try:
        # not getrusage: on Linux a new process begins with its parent's peak there
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS: bytes


def describe_machine(model: Model, threads: int | None, rates: Rates | None) -> Machine:
    """Return what the numbers depend on beside the model."""
    return Machine(
        cpu=cpu_name(),
        threads=threads or tuned(model).threads,
        llama_cpp_python=llama_cpp.__version__,
        **asdict(rates) if rates else {},
    )
