"""Speed: the time from the branches' last token to the answer's first, from their caches and from their texts, beside
what bounds it. Everything in one process, one after the other, again and again; medians and spread.

    text     the pasted texts and the synthesizer's prompt are read, at the best of llama.cpp's settings; the prefix is
             in the cache already, as a good server has it
    cache    join (export, re-encode, map, place) and the synthesizer's prompt
    floor    the synthesizer's prompt alone, on a cache that holds the same cells already
    bound    what the floor cannot be below on this hardware (bounds.py)
    kshift   llama.cpp's own pieces: all in one unified cache, positions moved by its K-shift of the whole

Branches are made of the model's tokens for a text, as long as asked for. They have ended by themselves, as branches do:
one that is cut off by max_tokens still has its last token to compute.
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

from pyps.adapters.adapter import Adapter
from pyps.engine.context import Context, Token, prefers_flash_attn
from pyps.engine.join import Span, join
from pyps.engine.model import Model
from pyps.engine.positions import check_joinable, rotated_layers
from pyps.engine.sampling import Sampler, Sampling
from pyps.engine.tuned import cpu_name, tuned
from pyps.errors import InputError, PypsError
from pyps.forkjoin import ForkJoin
from pyps.forkjoin.long_prompts import read_prompt, reads_apart
from pyps.forkjoin.synthesis import ContextOptions
from pyps.measure.bounds import Rates, least_ms
from pyps.prompts.layout import place

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
        branches, tokens: how many, and how long each one's output is.
        prompt: tokens of the synthesizer's prompt; in the paper layout the task comes on top.
        task: tokens of the prefix, which text synthesis has in its cache, and in the shared layout the synthesizer too.
    """

    branches: int
    tokens: int
    prompt: int
    task: int

    def check(self) -> None:
        """Raises InputError for sizes that cannot be."""
        for name, least, most in (("branches", 1, 128), ("tokens", 1, 2**20), ("prompt", 1, 2**20), ("task", 1, 2**20)):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name} must be {least:,} to {most:,}, not {getattr(self, name):,}")


def measure(
    model: Model,
    adapter: Adapter | None,
    layout: str,
    cases: Sequence[Case],
    *,
    repeat: int,
    rates: Rates | None = None,
    kv_type: str = "f16",
    threads: int | None = None,
    report: Callable[[str, float | None], None] = lambda what, fraction: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """One row for each case, as they are done: milliseconds as medians, and beside each its smallest and largest value
    (`…_spread`).

    Keys: branches, tokens, prompt, layout, task; text_ms, cache_ms, join_ms, floor_ms, kshift_ms (None where llama.cpp
    cannot); ratio (text / cache), join_share (of cache), floor_ratio (cache / floor); text_setting; of the branches
    decoding: batch_tokens_s, single_tokens_s, batch_gain; and, without a spread, floor_bound_ms and
    batch_bound_tokens_s (None without rates).

    Raises:
        RefusedError: the model's caches cannot be joined.
        InputError: a case that does not fit into this machine.
    """
    check_joinable(model)
    for case in cases:
        case.check()
    total = len(cases) * (repeat + 1)
    for i, case in enumerate(cases):
        what = f"{case.branches} x {case.tokens} tokens, prompt {case.prompt}"
        report(what, i / len(cases))
        with _Sides(model, adapter, layout, case, kv_type, threads) as sides:
            for n in range(repeat + 1):  # the first warms up
                if stopped():
                    return
                sides.step(keep=n > 0)
                report(what, (i * (repeat + 1) + n + 1) / total)
            yield sides.row(layout, rates)
    report("done", 1.0)


class _Sides:
    """The contexts of one case, filled once."""

    def __init__(
        self, model: Model, adapter: Adapter | None, layout: str, case: Case, kv_type: str, threads: int | None
    ) -> None:
        self._model, self._adapter, self._case = model, adapter, case
        self._kv_type, self._threads = kv_type, threads
        self._times: dict[str, list[float]] = {}
        self._contexts: list[Context] = []
        self._best: Context | None = None
        self._prefix = _tokens(model, case.task, 0)
        self._outputs = [_tokens(model, case.tokens, 7 * i + 1) for i in range(case.branches)]
        self._prompt = _tokens(model, case.prompt, 3)  # behind pasted texts
        shared = layout == "shared"
        self._point = case.task if shared else 0
        self._synthesizer_prompt = self._prompt if shared else self._prefix + self._prompt
        self._start = case.task + _INSTRUCTION  # where outputs stand in their branches
        self._to = place(self._point, [case.tokens] * case.branches, bool(adapter and adapter.in_order))
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
        for ctx in self._contexts:
            ctx.close()

    def _context(self, n_ctx: int, n_seq: int = 1, *, flash_attn: bool = False, **options: Any) -> Context:
        ctx = ContextOptions(kv_type=self._kv_type, threads=self._threads).open(
            self._model, n_ctx, n_seq, flash_attn=flash_attn, **options
        )
        self._contexts.append(ctx)
        return ctx

    def _fill(self) -> None:
        c = self._case
        joined = self._point + c.branches * c.tokens + len(self._synthesizer_prompt)
        self._branches = self._context(self._start + c.tokens + _DECODED, c.branches)
        self._decoder = self._reader = self._context(joined, adapter=self._adapter)
        if reads_apart(len(self._synthesizer_prompt), self._kv_type):
            self._reader = self._context(joined, adapter=self._adapter, flash_attn=True)
        self._branches.prefill(0, self._prefix)
        for seq in range(1, c.branches):
            self._branches.copy(0, seq)
        for seq, output in enumerate(self._outputs):
            self._branches.prefill(seq, _tokens(self._model, _INSTRUCTION, seq) + output)
        for ctx in {self._reader, self._decoder}:
            ctx.warm_up()
        self._unified: Context | None = None
        if llama_cpp.llama_memory_can_shift(llama_cpp.llama_get_memory(self._branches.pointer)):
            self._unified = self._context(joined, c.branches + 1, unified=True)
            for i in range(c.branches):
                join(self._branches, self._unified, [Span(i, self._start, self._start + c.tokens, self._start)], i + 1)
        if self._point:
            join(self._branches, self._reader, [Span(0, 0, c.task, 0)])
            if self._unified:
                join(self._branches, self._unified, [Span(0, 0, c.task, 0)])

    def step(self, keep: bool) -> None:
        """Every side once. The first time, text synthesis is tried in every setting: the best one stays."""
        found = self._cache() | {"text": self._text(self._best_text())} | self._decode()
        if self._unified:
            found["kshift"] = self._kshift(self._unified)
        if keep:
            found["ratio"] = found["text"] / found["cache"]
            found["join_share"] = found["join"] / found["cache"]
            found["floor_ratio"] = found["cache"] / found["floor"]
            found["batch_gain"] = found["batch"] / found["single"]
            for name, value in found.items():
                self._times.setdefault(name, []).append(value)

    def _first_token(self, ctx: Context, prompt: Sequence[int]) -> None:
        ctx.prefill(0, prompt)
        self._sampler.sample(ctx, -1)

    def _cache(self) -> dict[str, float]:
        c, ctx = self._case, self._reader
        if self._decoder is not ctx:
            self._decoder.remove(0)
        ctx.remove(0, self._point)
        mapper = self._adapter.mapper if self._adapter else None
        spans = [Span(i, self._start, self._start + c.tokens, to) for i, to in enumerate(self._to)]
        began = time.perf_counter()
        affine = mapper.coefficients([c.tokens] * c.branches, len(rotated_layers(self._model))) if mapper else None
        join(self._branches, ctx, spans, 0, affine)
        joined = time.perf_counter()
        self._first_token(self._decoder, read_prompt(ctx, self._decoder, self._synthesizer_prompt))
        ended = time.perf_counter()

        ctx.remove(0, self._to[-1] + c.tokens)  # the cells are there now: the same prompt on them is the floor
        again = time.perf_counter()
        self._first_token(ctx, self._synthesizer_prompt)
        floor = time.perf_counter() - again
        return {"cache": (ended - began) * 1e3, "join": (joined - began) * 1e3, "floor": floor * 1e3}

    def _best_text(self) -> Context:
        """The context in which text synthesis is fastest; found on the first call. One after the other: all at once may
        not fit into memory."""
        if self._best is None:
            c = self._case
            least = math.inf
            for flash, batch in _TEXT_SETTINGS:
                if not flash and prefers_flash_attn(self._kv_type):
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
        tail = [token for output in self._outputs for token in output] + self._prompt
        ctx.remove(0, self._case.task)
        began = time.perf_counter()
        self._first_token(ctx, tail)
        return (time.perf_counter() - began) * 1e3

    def _kshift(self, ctx: Context) -> float:
        c, memory = self._case, llama_cpp.llama_get_memory(ctx.pointer)
        began = time.perf_counter()
        for i, to in enumerate(self._to):
            start, end = self._start, self._start + c.tokens
            llama_cpp.llama_memory_seq_add(memory, i + 1, start, end, to - start)
            llama_cpp.llama_memory_seq_cp(memory, i + 1, 0, to, to + c.tokens)
        self._first_token(ctx, self._synthesizer_prompt)  # the shift is part of the next decode
        took = (time.perf_counter() - began) * 1e3
        ctx.remove(0, self._point)
        for i, to in enumerate(self._to):
            llama_cpp.llama_memory_seq_add(memory, i + 1, to, to + c.tokens, self._start - to)
        ctx.prefill(0, self._prompt[:1])
        ctx.remove(0, self._point)
        return took

    def _decode(self) -> dict[str, float]:
        """Tokens per second of all branches, in one batch and one after another."""
        c, ctx = self._case, self._branches
        end = self._start + c.tokens
        rates = {}
        for name, groups in (("batch", [range(c.branches)]), ("single", [[seq] for seq in range(c.branches)])):
            began = time.perf_counter()
            for group in groups:
                for i in range(_DECODED):
                    ctx.decode([Token(self._prefix[0], end + i, seq, logits=True) for seq in group])
            ctx.synchronize()
            rates[name] = c.branches * _DECODED / (time.perf_counter() - began)
            for seq in range(c.branches):
                ctx.remove(seq, end)
        return rates

    def row(self, layout: str, rates: Rates | None) -> dict[str, Any]:
        c = self._case
        found: dict[str, Any] = {"branches": c.branches, "tokens": c.tokens, "prompt": c.prompt, "layout": layout}
        found |= {"task": c.task, "text_setting": self._setting, "kshift_ms": None}
        units = {"batch": "_tokens_s", "single": "_tokens_s", "ratio": "", "join_share": "", "floor_ratio": ""}
        units["batch_gain"] = ""
        for name, values in self._times.items():
            key = name + units.get(name, "_ms")
            found[key] = statistics.median(values)
            found[f"{key}_spread"] = [min(values), max(values)]
        found |= {"floor_bound_ms": None, "batch_bound_tokens_s": None}
        if rates:
            cells, prompt = self._point + c.branches * c.tokens, len(self._synthesizer_prompt)
            found["floor_bound_ms"] = least_ms(self._model, rates, self._kv_type, prompt, cells)
            step = least_ms(self._model, rates, self._kv_type, 1, self._start + c.tokens, c.branches)
            found["batch_bound_tokens_s"] = c.branches / step * 1e3
        return found


def _tokens(model: Model, n: int, skip: int) -> list[int]:
    """n tokens of the text, told again and again, from its skip-th on."""
    tokens = model.tokenize(_TEXT)
    return (tokens * ((skip + n) // len(tokens) + 1))[skip : skip + n]


def peak_memory(path: Path, adapter: Path | None, layout: str, kv_type: str, case: Case) -> float | None:
    """Most megabytes that a process which does the branches and the cache side of a case, and nothing else, has
    resident. None if that process did not end well."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit what this process holds
    with concurrent.futures.ProcessPoolExecutor(1, spawn, _ignore_ctrl_c) as pool:
        try:
            return pool.submit(_peak_memory, path, adapter, layout, kv_type, case).result()
        except (concurrent.futures.BrokenExecutor, PypsError):
            return None  # killed; or more positions than the model has, which tokens without a meaning do not need


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


def describe_machine(model: Model, threads: int | None, rates: Rates | None) -> dict[str, Any]:
    """Without which numbers mean nothing."""
    found = {"cpu": cpu_name(), "threads": threads or tuned(model).threads, "llama_cpp_python": llama_cpp.__version__}
    return found | (asdict(rates) if rates else {})
