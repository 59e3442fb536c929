"""The whole job: branches and their answer, from the task to the answer's last token, and the steps that it is made of.

Three ways are measured in one process, in turn:

    ours     pyps, with the kernels in use
    off      pyps, with llama.cpp's own kernels (as with PYPS_KERNELS=off)
    calls    one `llama_cpp.Llama` with llama.cpp's own kernels, which is called for one branch after the other, and at
             last with all their texts: what most people's agents do. It keeps what two prompts have in common.

Every branch and every answer has the same number of tokens in all of them, whatever is said.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from pyps.engine import kernels, log
from pyps.engine.context import Context, Token, needs_flash_attn
from pyps.engine.find import Progress, no_progress
from pyps.engine.model import Model
from pyps.engine.positions import why_not_joinable
from pyps.engine.sampling import Sampling
from pyps.engine.tuned import tuned
from pyps.errors import InputError
from pyps.forkjoin import ForkJoin
from pyps.forkjoin.plan import Plan, Setting, make_plan
from pyps.forkjoin.reading import Read
from pyps.forkjoin.request import Request
from pyps.forkjoin.synthesis import ContextOptions
from pyps.measure.reports import JobRow, Median, StepRow

# the job, which benchmarks/server.py does as well
TASK = "A small town by the sea wants to use its old harbour for something new. What should it do?"
BRANCHES = ("Think of the people who live there.", "Think of the money.", "Think of the sea.", "Think of the winter.")
_SEQUENCES = (1, 2, 4, 8, 16)
_CELLS = 256  # of each sequence
_STEPS = 4  # that are timed together


def measure_jobs(
    fj: ForkJoin,
    path: Path,
    sizes: Sequence[tuple[int, int]],
    *,
    answer: int,
    repeat: int,
    read: Read | None = None,
    kv_type: str = "f16",
    threads: int | None = None,
    report: Progress = no_progress,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[JobRow]:
    """Yield the whole job of each size, when it is done.

    Args:
        fj: Does the job.
        path: The model's file, which a `llama_cpp.Llama` loads, too.
        sizes: Number of branches and tokens of each.
        answer: Tokens of the answer.
        repeat: Rounds for the medians; one more, before them, warms up.
        read: What the synthesizer reads again (Request.read).
        kv_type: Type of K and V in pyps's caches; the Llama's are f16, as they are by default.
        threads: Threads of each context; None for what suits the model on this machine.
        report: Called with what is being measured and the fraction that is done.
        stopped: Asked before each round; once true, there are no more rows.

    Raises:
        EngineError: As ForkJoin.run. A job that does not fit the model is left out.
    """
    in_use = kernels.in_use()
    setting = Setting(
        model=fj.model,
        adapter=fj.adapter,
        layout=fj.layout,
        options=ContextOptions(kv_type=kv_type, threads=threads),
        n_ctx=None,
        why_not_joinable=why_not_joinable(fj.model),
    )
    for i, (branches, tokens) in enumerate(sizes):
        what = f"the whole job: {branches} x {tokens} tokens, an answer of {answer}"
        request = Request(
            task=TASK,
            branches=[BRANCHES[n % len(BRANCHES)] for n in range(branches)],
            read=read,
            sampling=Sampling(max_tokens=tokens, seed=1, ignore_eos=True),
            answer=Sampling(max_tokens=answer, seed=1, ignore_eos=True),
        )
        try:
            plan = make_plan(request, setting, 1)
        except InputError:
            continue  # more positions than the model has, which rows do without
        times: dict[str, list[float]] = {}
        with _Caller(path, plan, threads or tuned(fj.model).threads) as caller:
            for n in range(repeat + 1):
                if stopped():
                    return
                report(what, (i + n / (repeat + 1)) / len(sizes))
                round_ms: dict[str, float] = {}
                try:
                    for name, chosen in (("ours", in_use), ("off", kernels.OFF)):
                        kernels.use(chosen)
                        timing = fj.run(**_words(request)).timing_ms
                        round_ms |= {f"{name}_ms": timing.total, f"{name}_first_ms": timing.ttft}
                    round_ms["calls_ms"] = caller.job_ms()
                finally:
                    kernels.use(in_use)
                round_ms["off_ratio"] = round_ms["off_ms"] / round_ms["ours_ms"]
                round_ms["calls_ratio"] = round_ms["calls_ms"] / round_ms["ours_ms"]
                round_ms["first_ratio"] = round_ms["off_first_ms"] / round_ms["ours_first_ms"]
                for name, value in round_ms.items() if n else ():  # the first warms up
                    times.setdefault(name, []).append(value)
        medians = {name: _median(values) for name, values in times.items()}
        yield JobRow(branches=branches, tokens=tokens, answer=answer, **medians)


def _words(request: Request) -> dict[str, Any]:
    return {
        "task": request.task,
        "branches": list(request.branches),
        "read": request.read,
        "sampling": request.sampling,
        "answer": request.answer,
    }


class _Caller:
    """A `llama_cpp.Llama` that does the job of a plan, call after call. Use it with `with`."""

    def __init__(self, path: Path, plan: Plan, threads: int) -> None:
        assert plan.answer is not None
        self._plan, self._answer = plan, plan.answer
        cells = plan.branch_cells + sum(b.max_output for b in plan.branches) + plan.answer.cells + plan.answer.after
        with log.captured():
            # its own default is half of the CPUs
            self._llama = llama_cpp.Llama(
                str(path), n_ctx=cells, n_threads=threads, n_threads_batch=threads, verbose=False, seed=1
            )

    def __enter__(self) -> "_Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.close()

    def job_ms(self) -> float:
        """Return the milliseconds of all calls, one after the other."""
        plan = self._plan
        self._llama.reset()  # type: ignore[no-untyped-call]
        self._llama._ctx.kv_cache_clear()  # type: ignore[no-untyped-call]  # what the last job has left
        began = time.perf_counter()
        texts = [
            self._call(plan.prefix + branch.prompt, branch.assignment.sampling.max_tokens) for branch in plan.branches
        ]
        pasted = plan.layout.pasted([branch.name for branch in plan.branches], texts)
        self._call(plan.prefix + pasted, self._answer.assignment.sampling.max_tokens)
        return (time.perf_counter() - began) * 1e3

    def _call(self, prompt: Sequence[int], n: int) -> str:
        """Return what it continues a prompt with: n tokens, where it would stop at the text's end."""
        tokens: list[int] = []
        for token in self._llama.generate(prompt):
            tokens.append(token)
            if len(tokens) == n:
                break
        return self._llama.detokenize(tokens).decode("utf-8", "replace")


def measure_steps(
    model: Model,
    *,
    repeat: int,
    kv_type: str = "f16",
    threads: int | None = None,
    report: Progress = no_progress,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[StepRow]:
    """Yield for 1 to 16 sequences what it takes to decode a token of each, logits included, in one batch.

    Both sides have the better of flash attention on and off.

    Args:
        model: The model.
        repeat: Rounds for the medians.
        kv_type: Type of K and V in the caches.
        threads: Threads of each context; None for what suits the model on this machine.
        report: Called with what is being measured and the fraction that is done.
        stopped: Asked before each round; once true, there are no more rows.

    Raises:
        InputError: The contexts cannot be made.
    """
    in_use = kernels.in_use()
    options = ContextOptions(kv_type=kv_type, threads=threads)
    settings = (True,) if needs_flash_attn(kv_type) else (False, True)
    for i, n in enumerate(_SEQUENCES):
        times: dict[tuple[str, bool], list[float]] = {}
        contexts = {flash: options.open(model, _CELLS + _STEPS + 1, n, flash_attn=flash) for flash in settings}
        try:
            for ctx in contexts.values():
                ctx.prefill(0, [0] * _CELLS)
                for seq in range(1, n):
                    ctx.copy(0, seq)
            for k in range(repeat + 1):
                if stopped():
                    return
                report(f"steps of {n} sequences", (i + k / (repeat + 1)) / len(_SEQUENCES))
                for flash, ctx in contexts.items():
                    for name in (in_use, kernels.OFF):
                        kernels.use(name)
                        _steps_ms(ctx, 1)  # another graph, and other memory for it, than the side before
                        took = _steps_ms(ctx, _STEPS)
                        if k:
                            times.setdefault((name, flash), []).append(took)
        finally:
            kernels.use(in_use)
            for ctx in contexts.values():
                ctx.close()
        best = {}
        for name in (in_use, kernels.OFF):
            flash = min(settings, key=lambda flash: statistics.median(times[name, flash]))
            best[name] = times[name, flash]
        yield StepRow(
            sequences=n,
            cells=_CELLS,
            step_ms=_median(best[in_use]),
            off_ms=_median(best[kernels.OFF]),
            off_ratio=_median([off / ours for off, ours in zip(best[kernels.OFF], best[in_use], strict=True)]),
        )


def _steps_ms(ctx: Context, steps: int) -> float:
    """Decode some tokens of all sequences, and forget them; return the milliseconds of each step."""
    began = time.perf_counter()
    for i in range(steps):
        ctx.decode([Token(0, _CELLS + i, seq, logits=True) for seq in range(ctx.n_seq)])
        ctx.synchronize()
    took = (time.perf_counter() - began) * 1e3 / steps
    for seq in range(ctx.n_seq):
        ctx.remove(seq, _CELLS)
    return took


def _median(values: Sequence[float]) -> Median:
    return Median(statistics.median(values), min(values), max(values))
