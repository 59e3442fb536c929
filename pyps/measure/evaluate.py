"""Quality: what a synthesizer makes of caches, and of texts, on the same branches.

Every example's branches are encoded once. Text synthesis answers greedily; that answer is the reference that the other
modes' next-token distributions are compared with, token by token. Then each mode gives its own greedy answer, which is
right if it contains what the example says it must.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyps.adapters.adapter import Adapter
from pyps.data.example import Example, read_examples
from pyps.data.tokens import TokenExample, lay_out
from pyps.engine.context import Context, Token
from pyps.engine.find import Progress, no_progress
from pyps.engine.logits import log_softmax
from pyps.engine.model import Model
from pyps.engine.positions import check_joinable
from pyps.errors import InputError
from pyps.forkjoin import ForkJoin
from pyps.forkjoin.synthesis import ContextOptions, Output, Synthesizer, placement
from pyps.measure.reports import EvaluationReport, ModeScores, Outcome, Scores

_JUDGED_TOGETHER = 64  # tokens whose logits are kept at once: half a megabyte each with a large vocabulary


@dataclass(frozen=True, kw_only=True)
class EvaluationMode:
    """A way to answer: from the branches' caches or from their texts, with which parts of the adapter."""

    name: str
    cache: bool = False
    mapper: bool = False
    lora: bool = False
    backwards: bool = False  # the texts, the last branch's first


MODES = (
    EvaluationMode(name="text"),
    # what the order alone changes, of which joined caches have none
    EvaluationMode(name="text, backwards", backwards=True),
    EvaluationMode(name="cache", cache=True),
    EvaluationMode(name="cache, mapper", cache=True, mapper=True),
    EvaluationMode(name="cache, LoRA", cache=True, lora=True),
    EvaluationMode(name="cache, adapter", cache=True, mapper=True, lora=True),
    EvaluationMode(name="text, LoRA", lora=True),  # what the LoRA's training alone brings
)


def read_suite() -> list[Example]:
    """Return the built-in suite: 40 examples of each of six families.

    No adapter was trained on their entities and phrasings.
    """
    with as_file(files("pyps.data") / "suite.jsonl") as path:
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
    max_tokens: int = 64,
    run_code: bool = False,
    kv_type: str = "f16",
    threads: int | None = None,
    report: Progress = no_progress,
    stopped: Callable[[], bool] = lambda: False,
) -> EvaluationReport:
    """Evaluate the model, the adapter and the layout of `fj` on all examples, as `evaluate` does."""
    outcomes = tuple(
        evaluate(
            fj.model,
            fj.adapter,
            examples,
            fj.layout,
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
        modes=summarise(outcomes),
        outcomes=outcomes,
    )


def evaluate(
    model: Model,
    adapter: Adapter | None,
    examples: Sequence[Example],
    layout: str,
    *,
    max_tokens: int = 64,
    run_code: bool = False,
    kv_type: str = "f16",
    threads: int | None = None,
    report: Progress = no_progress,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Run every example in every mode that the adapter's parts allow, and yield the outcomes as they come.

    Args:
        model: The model.
        adapter: Its parts are used by the modes that name them; None for none.
        examples: Branches without a text are generated.
        layout: The prompt layout.
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
    has_mapper = adapter is not None and adapter.mapper is not None
    has_lora = adapter is not None and bool(adapter.lora)
    modes = [mode for mode in MODES if (has_mapper or not mode.mapper) and (has_lora or not mode.lora)]
    for i, example in enumerate(examples):
        if stopped():
            return
        (tokens,) = lay_out(model, layout, [example], seed=i, branch_tokens=max_tokens)
        branches = [
            branch.model_copy(update={"text": model.text(output)})
            for branch, (_, output) in zip(example.branches, tokens.branches, strict=True)
        ]
        (backwards,) = lay_out(model, layout, [example.model_copy(update={"branches": branches[::-1]})], seed=i)
        with _EncodedExample(model, adapter, tokens, backwards.pasted, max_tokens, kv_type, threads) as encoded:
            reference = encoded.answer(MODES[0])
            for mode in modes:
                answer = reference if mode == MODES[0] else encoded.answer(mode)
                logs = reference.logs if mode == MODES[0] else encoded.judge(mode, reference)
                kl = (np.exp(reference.logs) * (reference.logs - logs)).sum(-1)
                text = model.text(answer.tokens)
                yield Outcome(
                    mode=mode.name,
                    family=example.family,
                    answer=text.strip(),
                    right=example.is_right(text, run_code),
                    kl=float(kl.mean()),
                    kl_first=float(kl[0]),
                    agreement=float((reference.logs.argmax(-1) == logs.argmax(-1)).mean()),
                    ttft_ms=answer.ttft_ms,
                )
        report(f"evaluating {len(examples)} examples", (i + 1) / len(examples))


@dataclass(frozen=True)
class _Answer:
    tokens: list[int]
    logs: NDArray[np.float32]  # log-probabilities [tokens, and the end if it came to that; vocabulary]
    ttft_ms: float


class _EncodedExample:
    """One example's branches, encoded; and the synthesizers that answer from them."""

    def __init__(
        self,
        model: Model,
        adapter: Adapter | None,
        example: TokenExample,
        backwards: list[int],
        max_tokens: int,
        kv_type: str,
        threads: int | None,
    ) -> None:
        self._model, self._adapter, self._example, self._backwards = model, adapter, example, backwards
        self._max_tokens = max_tokens
        self._end = 0  # of the prompt that was read last
        e = example
        lengths = [len(output) for _, output in e.branches]
        longest = max(len(prompt) + len(output) for prompt, output in e.branches)
        pasted = max(len(e.pasted), len(backwards))
        text_cells = len(e.prefix) + pasted + max_tokens
        positions = max(
            text_cells, len(e.prefix) + longest, e.branch_point + max(lengths) + len(e.synthesizer) + max_tokens
        )
        if positions > model.n_ctx_train:
            raise InputError(
                f"an example needs {positions:,} positions; {model.name} was trained on {model.n_ctx_train:,}"
            )
        # all contexts are of one size: LongRoPE encodes positions by it
        cells = max(text_cells, len(e.prefix) + longest, e.n_cells + len(e.synthesizer) + max_tokens)
        self._options = ContextOptions(kv_type=kv_type, threads=threads, min_cells=cells)
        self._synthesizers: dict[tuple[bool, bool], Synthesizer] = {}
        self._branches = self._options.open(model, cells, len(e.branches))
        try:
            self._branches.warm_up()
            self._branches.prefill(0, e.prefix)
            for seq in range(1, len(e.branches)):
                self._branches.copy(0, seq)
            batch = []
            for seq, (prompt, output) in enumerate(e.branches):
                batch += [Token(t, len(e.prefix) + i, seq) for i, t in enumerate(prompt + output)]
            self._branches.decode(batch)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "_EncodedExample":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for synthesizer in self._synthesizers.values():
            synthesizer.close()
        self._branches.close()

    def answer(self, mode: EvaluationMode) -> _Answer:
        """Return the mode's own greedy answer."""
        ctx, ttft_ms = self._read_prompt(mode)
        tokens: list[int] = []
        logs = []
        while True:
            logs.append(log_softmax(ctx.logits()))
            token = int(logs[-1].argmax())
            if self._model.ends(token):
                break
            tokens.append(token)
            if len(tokens) == self._max_tokens:
                break
            ctx.decode([Token(token, ctx.end(0), 0, logits=True)])
        return _Answer(tokens, np.stack(logs), ttft_ms)

    def judge(self, mode: EvaluationMode, reference: _Answer) -> NDArray[np.float32]:
        """Return log-probabilities where the reference chose its tokens, under the mode that answered last."""
        ctx = self._synthesizer(mode).decoder
        ctx.remove(0, self._end - 1)
        last = self._prompt(mode)[-1]
        tokens = [last, *reference.tokens][: len(reference.logs)]
        rows = []
        for start in range(0, len(tokens), _JUDGED_TOGETHER):
            chunk = tokens[start : start + _JUDGED_TOGETHER]
            position = self._end - 1 + start
            ctx.decode([Token(t, position + i, 0, logits=True) for i, t in enumerate(chunk)])
            rows += [log_softmax(ctx.logits(i)) for i in range(len(chunk))]
        return np.stack(rows)

    def _synthesizer(self, mode: EvaluationMode) -> Synthesizer:
        """Return the synthesizer of a mode, with the prefix in it; those with the same contexts share one."""
        key = (mode.cache, mode.lora)
        if key not in self._synthesizers:
            e, prompt = self._example, self._prompt(mode)
            synthesizer = self._synthesizers[key] = Synthesizer(
                self._model,
                prompt=len(prompt),
                cells=(e.n_cells if mode.cache else len(e.prefix)) + len(prompt),
                after=self._max_tokens,
                options=self._options,
                adapter=self._adapter if mode.lora else None,
                n_logits=_JUDGED_TOGETHER,
            )
            synthesizer.warm_up()
            synthesizer.keep_prefix(self._branches, self._prefix_cells(mode))
        return self._synthesizers[key]

    def _prompt(self, mode: EvaluationMode) -> list[int]:
        if mode.backwards:
            return self._backwards
        return self._example.synthesizer if mode.cache else self._example.pasted

    def _prefix_cells(self, mode: EvaluationMode) -> int:
        return self._example.branch_point if mode.cache else len(self._example.prefix)

    def _read_prompt(self, mode: EvaluationMode) -> tuple[Context, float]:
        """Do everything up to the first token's logits, and return where they are and the milliseconds it took."""
        e, synthesizer, prompt = self._example, self._synthesizer(mode), self._prompt(mode)
        decoder = synthesizer.decoder
        synthesizer.forget(self._prefix_cells(mode))
        synthesizer.reader.synchronize()
        began = time.perf_counter()
        if mode.cache:
            adapter = self._adapter if mode.mapper or mode.lora else None
            outputs = []
            for seq, (instruction, output) in enumerate(e.branches):
                start = len(e.prefix) + len(instruction)
                outputs.append(Output(self._branches, seq, ((start, start + len(output)),)))
            starts = placement(
                e.branch_point,
                [len(output) for output in outputs],
                in_order=bool(adapter and adapter.in_order),
                after=len(prompt) + self._max_tokens,
                n_positions=self._model.n_ctx_train,
            )
            synthesizer.join(outputs, starts, adapter.mapper if adapter and mode.mapper else None)
        decoder.prefill(0, synthesizer.read(prompt))
        decoder.synchronize()
        self._end = decoder.end(0)
        return decoder, (time.perf_counter() - began) * 1e3


def interval(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval (Wilson) of the true share of right answers when `right` of n were right."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.96, right / n
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((middle - spread) / (1 + z * z / n), 0.0), min((middle + spread) / (1 + z * z / n), 1.0)


def summarise(outcomes: Sequence[Outcome]) -> dict[str, ModeScores]:
    """Return the scores of each mode, over all outcomes and over those of each family."""
    modes = {}
    for mode in dict.fromkeys(o.mode for o in outcomes):
        of_mode = [o for o in outcomes if o.mode == mode]
        families = {
            family: Scores(**_scores([o for o in of_mode if o.family == family]))
            for family in dict.fromkeys(o.family for o in of_mode)
        }
        modes[mode] = ModeScores(**_scores(of_mode), families=families)
    return modes


def _scores(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the fields of Scores."""
    judged = [o.right for o in outcomes if o.right is not None]
    right = sum(judged)
    return {
        "examples": len(outcomes),
        "accuracy": right / len(judged) if judged else None,
        "accuracy_95": interval(right, len(judged)) if judged else None,
        "kl": fmean(o.kl for o in outcomes),
        "kl_first": fmean(o.kl_first for o in outcomes),
        "agreement": fmean(o.agreement for o in outcomes),
        "ttft_ms": median(o.ttft_ms for o in outcomes),
    }
