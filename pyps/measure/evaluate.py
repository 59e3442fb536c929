"""Quality: what a synthesizer makes of caches, and of texts, on the same branches.

Every example's branches are encoded once. Text synthesis answers greedily; that answer is the reference that the other
modes' next-token distributions are compared with, token by token. Then each mode gives its own greedy answer, which is
right if it contains what the example says it must.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from statistics import fmean, median
from typing import Any

from pyps.adapters.adapter import Adapter
from pyps.data.example import Example, read_examples
from pyps.data.tokens import lay_out
from pyps.engine.find import Progress, no_progress
from pyps.engine.model import Model
from pyps.engine.positions import check_joinable
from pyps.forkjoin import ForkJoin
from pyps.forkjoin.comparison import Comparison, Job, Way, divergence, together, words_of
from pyps.forkjoin.reading import Read, Reading
from pyps.forkjoin.synthesis import ContextOptions
from pyps.measure.reports import EvaluationReport, ModeScores, Outcome, Scores
from pyps.prompts.layout import Layout


@dataclass(frozen=True, kw_only=True)
class EvaluationMode:
    """A way to answer, and its name in reports."""

    name: str
    way: Way


_TEXT = EvaluationMode(name="text", way=Way())


def modes_of(adapter: Adapter | None, reading: Reading | None, shares: Sequence[float] = ()) -> list[EvaluationMode]:
    """Return the modes that are compared: those that the adapter's parts and what is read again allow.

    Args:
        adapter: The adapter, or None.
        reading: What the synthesizer reads again, as configured; None for nothing.
        shares: More shares of tokens to read again: the points of a curve.
    """
    has_mapper = adapter is not None and adapter.mapper is not None
    has_lora = adapter is not None and bool(adapter.lora)
    ways = {
        # what the order alone changes, of which joined caches have none
        "text, backwards": Way(backwards=True),
        "cache": Way(cache=True),
        "cache, mapper": Way(cache=True, mapper=True),
        "cache, LoRA": Way(cache=True, lora=True),
        "cache, adapter": Way(cache=True, mapper=True, lora=True),
        "text, LoRA": Way(lora=True),  # what the LoRA's training alone brings
    }
    parts = Way(cache=True, mapper=has_mapper, lora=has_lora)
    name = "cache, adapter" if adapter else "cache"
    if reading is not None and not reading.joins_only:
        ways[f"{name}, read again"] = replace(parts, reading=reading)
        # is joining what is not read again better than leaving it out?
        ways["read again, rest cut"] = replace(parts, reading=reading, omits=True)
    for share in shares:
        of_share = replace(reading or Reading(), share=share, auto=False)
        ways[f"{name}, read {100 * share:g}%"] = replace(parts, reading=of_share)
    possible = {n: w for n, w in ways.items() if (has_mapper or not w.mapper) and (has_lora or not w.lora)}
    return [_TEXT, *(EvaluationMode(name=n, way=w) for n, w in possible.items())]


def read_suite(long: bool = False) -> list[Example]:
    """Return the built-in suite: 40 examples of each of six families.

    No adapter was trained on their entities and phrasings.

    Args:
        long: The suite whose branches have 100 to 300 tokens, instead of about 15.
    """
    with as_file(files("pyps.data") / ("suite_long.jsonl" if long else "suite.jsonl")) as path:
        return read_examples([path])


def limited(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """Return the first `limit` examples of each family; all of them for None."""
    n_of_family: Counter[str] = Counter()
    chosen = []
    for example in examples:
        n_of_family[example.family] += 1
        if limit is None or n_of_family[example.family] <= limit:
            chosen.append(example)
    return chosen


def run_evaluation(
    fj: ForkJoin,
    examples: Sequence[Example],
    *,
    read: Read | None = None,
    shares: Sequence[float] = (),
    max_tokens: int = 64,
    run_code: bool = False,
    kv_type: str = "f16",
    threads: int | None = None,
    report: Progress = no_progress,
    stopped: Callable[[], bool] = lambda: False,
) -> EvaluationReport:
    """Evaluate the model, the adapter and the layout of `fj` on all examples, as `evaluate` does.

    `read` is what a run reads again (Request.read).
    """
    reading = fj.reading(read, stopped)
    outcomes = tuple(
        evaluate(
            fj.model,
            fj.adapter,
            examples,
            fj.layout,
            reading=reading,
            shares=shares,
            max_tokens=max_tokens,
            run_code=run_code,
            kv_type=kv_type,
            threads=threads,
            report=report,
            stopped=stopped,
        )
    )
    return EvaluationReport(
        model=fj.model.name,
        adapter=str(fj.adapter.path) if fj.adapter else None,
        layout=fj.layout,
        reading=reading.describe(),
        modes=summarise(outcomes),
        outcomes=outcomes,
    )


def evaluate(
    model: Model,
    adapter: Adapter | None,
    examples: Sequence[Example],
    layout: str,
    *,
    reading: Reading | None = None,
    shares: Sequence[float] = (),
    max_tokens: int = 64,
    run_code: bool = False,
    kv_type: str = "f16",
    threads: int | None = None,
    report: Progress = no_progress,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Run every example in every mode of `modes_of`, and yield the outcomes as they come.

    Args:
        model: The model.
        adapter: Its parts are used by the modes that name them; None for none.
        examples: Branches without a text are generated.
        layout: The prompt layout.
        reading: As modes_of takes it.
        shares: As modes_of takes them.
        max_tokens: Most tokens of an answer, and of a branch that is generated.
        run_code: Whether answers to examples with a program may be run (data/sandbox.py).
        kv_type: Type of K and V in the caches.
        threads: Threads of each context; None for what suits the model on this machine.
        report: Called with the fraction of the examples that is done, after each.
        stopped: Asked before each example; once true, those that are done are all.

    Raises:
        RefusedError: The model's caches cannot be joined.
        InputError: An example does not fit the model, or its prompts cannot be laid out.
    """
    check_joinable(model)
    modes = modes_of(adapter, reading, shares)
    options = ContextOptions(kv_type=kv_type, threads=threads)
    for i, example in enumerate(examples):
        if stopped():
            return
        job = _job(model, layout, example, seed=i, branch_tokens=max_tokens)
        with Comparison(model, adapter, job, max_tokens, options) as comparison:
            reference = comparison.answer(_TEXT.way)
            for mode in modes:
                answer = reference if mode == _TEXT else comparison.answer(mode.way)
                logs = reference.logs if mode == _TEXT else comparison.judge(mode.way, reference)
                kl = divergence(reference.logs, logs)
                text = model.text(answer.tokens)
                yield Outcome(
                    mode=mode.name,
                    family=example.family,
                    answer=text.strip(),
                    right=example.is_right(text, run_code),
                    kl=float(kl.mean()),
                    kl_first=float(kl[0]),
                    agreement=together(reference.logs, logs),
                    ttft_ms=answer.ttft_ms,
                    again=answer.n_again / job.n_output,
                )
        report(f"evaluating {len(examples)} examples", (i + 1) / len(examples))


def _job(model: Model, layout: str, example: Example, seed: int, branch_tokens: int) -> Job:
    """Return an example in tokens, and generate what it lacks."""
    (tokens,) = lay_out(model, layout, [example], seed=seed, branch_tokens=branch_tokens)
    lay = Layout(model, layout, example.task, example.system, example.synthesize)
    names = [b.name or f"branch-{i + 1}" for i, b in enumerate(example.branches)]
    texts = [b.text or model.text(output) for b, (_, output) in zip(example.branches, tokens.branches, strict=True)]
    labels, labelled = lay.labelled(names)
    return Job(
        prefix=tokens.prefix,
        branches=tokens.branches,
        branch_point=tokens.branch_point,
        synthesizer=tokens.synthesizer,
        labels=labels,
        labelled=labelled,
        pasted=tokens.pasted,
        backwards=lay.pasted(names[::-1], texts[::-1]),
        question=words_of(example.task, example.synthesize),
    )


def interval(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval (Wilson) of the true share of right answers when `right` of n were right."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.96, right / n
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((middle - spread) / (1 + z * z / n), 0.0), min((middle + spread) / (1 + z * z / n), 1.0)


def difference(pairs: Sequence[tuple[bool, bool]]) -> tuple[float, tuple[float, float]]:
    """Return how much larger the share of the first of each pair is than that of the second, and its 95 % interval.

    It is the normal interval of a paired difference: only pairs that differ count for its width.
    """
    n = len(pairs)
    more, less = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
    middle = (more - less) / n
    # one pair is added to either side, since none at all would mean certainty
    spread = 1.96 * math.sqrt((more + less + 2 - (more - less) ** 2 / (n + 2)) / (n + 2) ** 2)
    return middle, (max(middle - spread, -1.0), min(middle + spread, 1.0))


def summarise(outcomes: Sequence[Outcome]) -> dict[str, ModeScores]:
    """Return the scores of each mode, over all outcomes and over those of each family.

    Args:
        outcomes: As `evaluate` yields them: the same examples in every mode.
    """
    text = [o for o in outcomes if o.mode == _TEXT.name]
    modes = {}
    for mode in dict.fromkeys(o.mode for o in outcomes):
        pairs = list(zip([o for o in outcomes if o.mode == mode], text, strict=False))
        families = {
            family: Scores(**_scores([(o, t) for o, t in pairs if o.family == family]))
            for family in dict.fromkeys(o.family for o, _ in pairs)
        }
        modes[mode] = ModeScores(**_scores(pairs), families=families)
    return modes


def _scores(pairs: Sequence[tuple[Outcome, Outcome]]) -> dict[str, Any]:
    """Return the fields of Scores, of one mode's outcomes and those of text synthesis on the same examples."""
    outcomes = [outcome for outcome, _ in pairs]
    judged = [(o.right, t.right) for o, t in pairs if o.right is not None and t.right is not None]
    right = sum(r for r, _ in judged)
    more, more_95 = difference(judged) if judged else (None, None)
    return {
        "examples": len(outcomes),
        "accuracy": right / len(judged) if judged else None,
        "accuracy_95": interval(right, len(judged)) if judged else None,
        "kl": fmean(o.kl for o in outcomes),
        "kl_first": fmean(o.kl_first for o in outcomes),
        "agreement": fmean(o.agreement for o in outcomes),
        "ttft_ms": median(o.ttft_ms for o in outcomes),
        "again": fmean(o.again for o in outcomes),
        "difference": more,
        "difference_95": more_95,
    }
