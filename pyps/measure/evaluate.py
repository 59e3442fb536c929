"""Quality: what a synthesizer makes of caches, and of texts, on the same branches and without a word of labels.

Every example's branches are encoded once. Text synthesis answers greedily; that answer is the reference that the other
modes' next-token distributions are compared with, token by token. Then each mode gives its own greedy answer, which is
right if it contains what the example says it must.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyps.adapters.adapter import Adapter
from pyps.data.example import Example, read_examples
from pyps.data.tokens import TokenExample, lay_out, text_of
from pyps.engine.context import Context, Token
from pyps.engine.join import Span, join
from pyps.engine.model import Model
from pyps.engine.positions import check_joinable, rotated_layers
from pyps.errors import InputError
from pyps.forkjoin.synthesis import ContextOptions
from pyps.prompts.layout import place

_JUDGED_TOGETHER = 64  # tokens whose logits are kept at once: half a megabyte each with a large vocabulary


@dataclass(frozen=True)
class Mode:
    """A way to answer: from the branches' caches or from their texts, with which parts of the adapter."""

    name: str
    cache: bool = False
    mapper: bool = False
    lora: bool = False
    backwards: bool = False  # the texts, the last branch's first


MODES = (
    Mode("text"),
    Mode("text, backwards", backwards=True),  # what the order alone changes, of which joined caches have none
    Mode("cache", cache=True),
    Mode("cache, mapper", cache=True, mapper=True),
    Mode("cache, LoRA", cache=True, lora=True),
    Mode("cache, adapter", cache=True, mapper=True, lora=True),
    Mode("text, LoRA", lora=True),  # what the LoRA's training alone brings
)


@dataclass(frozen=True)
class Outcome:
    """What one mode made of one example.

    Attributes:
        mode, family: names.
        answer: its greedy answer.
        right: whether it is; None if the example does not say.
        kl: from text synthesis, nats, mean over the tokens of text synthesis' answer; kl_first: of the first.
        agreement: share of those tokens for which the most likely one is the same.
        ttft_ms: from the branches' last token to the answer's first.
    """

    mode: str
    family: str
    answer: str
    right: bool | None
    kl: float
    kl_first: float
    agreement: float
    ttft_ms: float


def read_suite() -> list[Example]:
    """The built-in suite: 40 examples of each of six families, with entities and phrasings that no adapter was trained
    on."""
    with as_file(files("pyps.data") / "suite.jsonl") as path:
        return read_examples([path])


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
    report: Callable[[int], None] = lambda n: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Runs every example in every mode that the adapter's parts allow, and yields the outcomes as they come.

    Args:
        max_tokens: most of an answer, and of a branch that is generated.
        run_code: whether answers to examples with a program may be run (sandbox.py).
        report: called with the number of examples done.
        stopped: asked before each example; once true, those that are done are all.

    Raises:
        RefusedError: the model's caches cannot be joined.
        InputError: an example does not fit the model, or its prompts cannot be laid out.
    """
    check_joinable(model)
    has = {"mapper": adapter is not None and adapter.mapper is not None, "lora": adapter is not None and adapter.lora}
    modes = [m for m in MODES if (has["mapper"] or not m.mapper) and (has["lora"] or not m.lora)]
    for i, example in enumerate(examples):
        if stopped():
            return
        (tokens,) = lay_out(model, layout, [example], seed=i, branch_tokens=max_tokens)
        said = [
            b.model_copy(update={"text": text_of(model, output)})
            for b, (_, output) in zip(example.branches, tokens.branches, strict=True)
        ]
        (backwards,) = lay_out(model, layout, [example.model_copy(update={"branches": said[::-1]})], seed=i)
        with _Bench(model, adapter, tokens, backwards.pasted, max_tokens, kv_type, threads) as bench:
            reference = bench.answer(MODES[0])
            for mode in modes:
                mine = reference if mode == MODES[0] else bench.answer(mode)
                logs = reference.logs if mode == MODES[0] else bench.judge(mode, reference)
                kl = (np.exp(reference.logs) * (reference.logs - logs)).sum(-1)
                text = text_of(model, mine.tokens)
                yield Outcome(
                    mode.name,
                    example.family,
                    text.strip(),
                    example.is_right(text, run_code),
                    float(kl.mean()),
                    float(kl[0]),
                    float((reference.logs.argmax(-1) == logs.argmax(-1)).mean()),
                    mine.ttft_ms,
                )
        report(i + 1)


@dataclass(frozen=True)
class _Answer:
    tokens: list[int]
    logs: NDArray[np.float32]  # log-probabilities [tokens, and the end if it came to that; vocabulary]
    ttft_ms: float


class _Bench:
    """One example's branches, encoded; and synthesizers for them without and with the LoRA."""

    def __init__(
        self,
        model: Model,
        adapter: Adapter | None,
        e: TokenExample,
        backwards: list[int],
        max_tokens: int,
        kv_type: str,
        threads: int | None,
    ) -> None:
        self._e, self._adapter, self._model, self._max_tokens = e, adapter, model, max_tokens
        self._backwards = backwards
        self._end = 0  # of the prompt of the synthesizer that was asked last
        longest = max(len(p) + len(o) for p, o in e.branches)
        pasted = max(len(e.pasted), len(backwards))
        cells = max(len(e.prefix) + pasted, e.n_cells + len(e.synthesizer)) + max_tokens
        if cells > model.n_ctx_train:
            raise InputError(f"an example needs {cells:,} positions; {model.name} was trained on {model.n_ctx_train:,}")

        def context(n_ctx: int, n_seq: int, adapter: Adapter | None = None) -> Context:
            return ContextOptions(kv_type=kv_type, threads=threads).open(
                model,
                n_ctx,
                n_seq,
                n_logits=_JUDGED_TOGETHER if n_seq == 1 else None,
                adapter=adapter,
            )

        self._contexts = [context(max(len(e.prefix) + longest, cells), len(e.branches)), context(cells, 1)]
        if adapter and adapter.lora:
            self._contexts.append(context(cells, 1, adapter))
        for ctx in self._contexts:
            ctx.warm_up()
        branches = self._contexts[0]
        branches.prefill(0, e.prefix)
        for seq in range(1, len(e.branches)):
            branches.copy(0, seq)
        batch = []
        for seq, (prompt, output) in enumerate(e.branches):
            batch += [Token(t, len(e.prefix) + i, seq) for i, t in enumerate(prompt + output)]
        branches.decode(batch)

    def __enter__(self) -> "_Bench":
        return self

    def __exit__(self, *_: object) -> None:
        for ctx in self._contexts:
            ctx.close()

    def answer(self, mode: Mode) -> _Answer:
        """The mode's own greedy answer."""
        ctx, ttft_ms = self._prompt(mode)
        tokens: list[int] = []
        logs = []
        while True:
            logs.append(_log_softmax(ctx.logits()))
            token = int(logs[-1].argmax())
            if self._model.ends(token):
                break
            tokens.append(token)
            if len(tokens) == self._max_tokens:
                break
            ctx.decode([Token(token, ctx.end(0), 0, logits=True)])
        return _Answer(tokens, np.stack(logs), ttft_ms)

    def judge(self, mode: Mode, reference: _Answer) -> NDArray[np.float32]:
        """Log-probabilities where the reference chose its tokens, under the mode that was asked last."""
        ctx = self._synthesizer(mode)
        ctx.remove(0, self._end - 1)
        last = self._prompt_tokens(mode)[-1]
        said = [last, *reference.tokens][: len(reference.logs)]
        rows = []
        for start in range(0, len(said), _JUDGED_TOGETHER):
            chunk = said[start : start + _JUDGED_TOGETHER]
            at = self._end - 1 + start
            ctx.decode([Token(t, at + i, 0, logits=True) for i, t in enumerate(chunk)])
            rows += [_log_softmax(ctx.logits(i)) for i in range(len(chunk))]
        return np.stack(rows)

    def _synthesizer(self, mode: Mode) -> Context:
        return self._contexts[2 if mode.lora else 1]

    def _prompt_tokens(self, mode: Mode) -> list[int]:
        if mode.backwards:
            return self._backwards
        return self._e.synthesizer if mode.cache else self._e.pasted

    def _prompt(self, mode: Mode) -> tuple[Context, float]:
        """Everything up to the first token's logits, and how long it took."""
        e, ctx, branches = self._e, self._synthesizer(mode), self._contexts[0]
        ctx.clear()
        kept = e.branch_point if mode.cache else len(e.prefix)
        if kept:
            join(branches, ctx, [Span(0, 0, kept, 0)])
        ctx.synchronize()
        began = time.perf_counter()
        if mode.cache:
            adapter = self._adapter if mode.mapper or mode.lora else None
            lengths = [len(output) for _, output in e.branches]
            starts = place(e.branch_point, lengths, bool(adapter and adapter.in_order))
            spans = []
            for seq, (prompt, output) in enumerate(e.branches):
                start = len(e.prefix) + len(prompt)
                spans.append(Span(seq, start, start + len(output), starts[seq]))
            mapper = adapter.mapper if adapter and mode.mapper else None
            affine = mapper.coefficients(lengths, len(rotated_layers(self._model))) if mapper else None
            join(branches, ctx, spans, 0, affine)
        ctx.prefill(0, self._prompt_tokens(mode))
        ctx.synchronize()
        self._end = ctx.end(0)
        return ctx, (time.perf_counter() - began) * 1e3


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def interval(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson)."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.96, right / n
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((middle - spread) / (1 + z * z / n), 0.0), min((middle + spread) / (1 + z * z / n), 1.0)


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Mode -> measures: over everything, and under "families" of each."""

    def measures(chosen: Sequence[Outcome]) -> dict[str, Any]:
        judged = [o.right for o in chosen if o.right is not None]
        right = sum(judged)
        low, high = interval(right, len(judged))
        return {
            "examples": len(chosen),
            "accuracy": right / len(judged) if judged else None,
            "accuracy_95": [low, high] if judged else None,
            "kl": fmean(o.kl for o in chosen),
            "kl_first": fmean(o.kl_first for o in chosen),
            "agreement": fmean(o.agreement for o in chosen),
            "ttft_ms": median(o.ttft_ms for o in chosen),
        }

    found: dict[str, Any] = {}
    for mode in dict.fromkeys(o.mode for o in outcomes):
        mine = [o for o in outcomes if o.mode == mode]
        names = dict.fromkeys(o.family for o in mine)
        found[mode] = measures(mine) | {"families": {f: measures([o for o in mine if o.family == f]) for f in names}}
    return found
