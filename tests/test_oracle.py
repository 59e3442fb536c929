"""The runtime against the oracle: every architecture, cache type and layout that pyps claims, with and without prefix,
mapper and LoRA.

How far the two may be apart is not chosen but measured: the same model with the same kind of cache reads as many tokens
without any join, and a join may be about twice as far from the oracle as that. `make test` runs a quarter of the
combinations; `make exact` runs all, and writes the distances to docs/exactness.md.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from support.caches import kl
from support.contexts import context_with
from support.exactness import Distance, Record
from support.oracle import Oracle
from support.tiny import mapper_metadata, write_adapter, write_model

from pyps.adapters.adapter import Adapter
from pyps.adapters.format import read_mapper
from pyps.engine import kernels, native
from pyps.engine.context import Context, Token, needs_flash_attn
from pyps.engine.find import find_model, requantise
from pyps.engine.join import Span, join
from pyps.engine.model import Model

# a text that nobody edits: how far the two are apart depends on it
_PROSE = Path(__file__).parent / "support" / "prose.txt"

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama"},
    "llama-3": {"arch": "llama", "freq_factors": True},
    "llama-64": {"arch": "llama", "head_dim": 64},  # heads wide enough for quantised caches, rotated
    "qwen2": {"arch": "qwen2"},
    "qwen3": {"arch": "qwen3"},
    "qwen3moe": {"arch": "qwen3moe"},
    "smollm3": {"arch": "smollm3"},
    "phi3": {"arch": "phi3"},
    "phi3-long": {
        "arch": "phi3",
        "long_rope": True,
        "phi3__rope__scaling__original_context_length": 128,
        "phi3__rope__scaling__attn_factor": 1.2,
    },
    "gemma3": {
        "arch": "gemma3",
        "n_layers": 7,
        "gemma3__rope__freq_base": 500000.0,
        "gemma3__rope__scaling__type": "linear",  # in the layers that see everything
        "gemma3__rope__scaling__factor": 8.0,
    },
    "gpt-oss": {
        "arch": "gpt-oss",
        "gpt-oss__rope__scaling__type": "yarn",
        "gpt-oss__rope__scaling__factor": 4.0,
        "gpt-oss__rope__scaling__original_context_length": 512,
    },
}
# rotated quantised caches need heads of 64 channels
MODELS["gemma3-64"] = MODELS["gemma3"] | {"head_dim": 64}
KV_TYPES = {
    "f32": MODELS,
    "f16": MODELS,
    "bf16": MODELS,
    "f16/bf16": MODELS,
    "q8_0": ("llama-64", "gemma3-64"),
    "q4_0": ("llama-64", "gemma3-64"),
    "q8_0/f16": ("llama-64", "gemma3-64"),
    "f16/q4_0": ("llama-64", "gemma3-64"),
}
_FIRST = (("f32", False), ("f16", False), ("q8_0", True))  # of the real model, in `make test`
_AT_ONCE = 16  # tokens that are read again at once
FLOOR = 1e-5  # float32 angles and sums: the part of the error that no cache type explains


@dataclass(frozen=True)
class Case:
    model: str
    kv_type: str
    flash_attn: bool
    unified: bool
    prefix: bool
    equal: bool
    mapped: bool
    lora: bool

    def __str__(self) -> str:
        flags = [name for name in ("flash_attn", "unified", "prefix", "equal", "mapped", "lora") if getattr(self, name)]
        return "-".join([self.model, self.kv_type, *flags])

    @property
    def representative(self) -> bool:
        """True for a quarter of them, in which every two flags meet in all four ways (an orthogonal array)."""
        return self.mapped == (self.unified ^ self.prefix) and self.lora == (self.unified ^ self.equal)


def all_cases() -> Iterator[Any]:
    for (kv_type, models), flash_attn in itertools.product(KV_TYPES.items(), (False, True)):
        if needs_flash_attn(kv_type) and not flash_attn:
            continue
        for model, flags in itertools.product(models, itertools.product((False, True), repeat=5)):
            case = Case(model, kv_type, flash_attn, *flags)
            yield pytest.param(case, id=str(case), marks=[] if case.representative else pytest.mark.exact)
        for flags in itertools.product((False, True), repeat=5):
            case = Case("smollm2", kv_type, flash_attn, *flags)
            if case.representative:  # a real model takes its time
                first = case.prefix and case.mapped and case.lora and (kv_type, flash_attn) in _FIRST
                yield pytest.param(case, id=str(case), marks=[] if first else pytest.mark.exact)


class Twin:
    """One model on both sides, its adapter, and what reading without a join costs."""

    def __init__(self, name: str, folder: Path) -> None:
        adapter = folder / f"{name}-lora.gguf"
        if name == "smollm2":
            # its weights as they are, but in F32: Q8_0 kernels round activations to 8 bits, which hides everything else
            path = folder / "smollm2-F32.gguf"
            requantise(find_model(name), path, llama_cpp.LLAMA_FTYPE_ALL_F32)
            write_adapter(adapter, n_layers=30, n_embd=576, n_head=9, n_head_kv=3, head_dim=64, scale=0.02)
        else:
            options = dict(MODELS[name])
            path = write_model(folder / f"{name}.gguf", **options)
            shape = {key: options[key] for key in ("arch", "n_layers", "head_dim") if key in options}
            write_adapter(adapter, **shape)
        self.model = Model.load(path)
        self.adapter = Adapter(adapter, self.model)
        self.oracle = Oracle(path, adapter)
        # a real model gets a mapper that moves K and V by a few percent, as a trained one does
        self.mapper = read_mapper(mapper_metadata(4, scale=0.02 if name == "smollm2" else 0.1))
        # a real model is given text, not noise
        self._text = self.model.tokenize(_PROSE.read_text()) if name == "smollm2" else None

    def tokens(self, n: int, seed: int) -> list[int]:
        if self._text:
            return self._text[17 * seed :][:n]
        return [int(t) for t in np.random.default_rng(seed).integers(0, 250, n)]

    @functools.cache  # noqa: B019  # lives as long as the test session
    def error_without_join(self, kv_type: str, flash_attn: bool) -> Distance:
        """The worst of eight sequences with the LoRA and eight without, read in batches as small as in `run`: with
        flash attention llama.cpp computes batches of 64 and more in another way. Its own kernels compute them, whatever
        computes the join: ours are nearer to exact, which would make the bound depend on them."""
        in_use = kernels.in_use()
        kernels.use(kernels.OFF)
        try:
            distances = [d for lora in (False, True) for d in self._errors_without_join(kv_type, flash_attn, lora)]
        finally:
            kernels.use(in_use)
        return Distance(max(d.rms for d in distances), max(d.worst for d in distances), max(d.kl for d in distances))

    def _errors_without_join(self, kv_type: str, flash_attn: bool, lora: bool) -> list[Distance]:
        n, sizes = 8, [1] * 66 + [9] + [1] * 20
        sequences = [self.tokens(sum(sizes), seed=90 + seed) for seed in range(n)]
        got: list[list[np.ndarray]] = [[] for _ in range(n)]
        adapter = self.adapter if lora else None
        with context_with(adapter, self.model, 256, n, kv_type=kv_type, flash_attn=flash_attn, n_logits=64) as ctx:
            start = 0
            for size in sizes:
                for seqs in [range(n)] if size == 1 else [[seq] for seq in range(n)]:
                    batch = [(seq, start + i) for seq in seqs for i in range(size)]
                    ctx.decode([Token(sequences[seq][pos], pos, seq, logits=True) for seq, pos in batch])
                    for i, (seq, pos) in enumerate(batch):
                        if pos >= 66:
                            got[seq].append(ctx.logits(i))
                start += size
        return [distance(np.stack(g), self.oracle.plain(t, lora)[66:]) for g, t in zip(got, sequences, strict=True)]

    @functools.cache  # noqa: B019
    def reference(self, prefix: bool, equal: bool, mapped: bool, lora: bool, more: tuple[int, ...]) -> np.ndarray:
        """The oracle's logits of the synthesizer's prompt and of `more` tokens after it."""
        job = Job(self, prefix, equal)
        spans = [
            self.oracle.encode([*job.prefix, *p, *o], job.span(p, o))
            for p, o in zip(job.prompts, job.outputs, strict=True)
        ]
        head = self.oracle.encode(job.prefix, (0, len(job.prefix))) if prefix else None
        joined = self.oracle.join(head, spans, self.coefficients(job) if mapped else None)
        return self.oracle.synthesize(joined, [*job.question, *more], lora)

    def coefficients(self, job: "Job") -> np.ndarray | None:
        assert self.mapper is not None
        return self.mapper.coefficients([len(o) for o in job.outputs], self.oracle.n_layers)


class Job:
    """Three branches and a question."""

    def __init__(self, twin: Twin, prefix: bool, equal: bool) -> None:
        self.prefix = twin.tokens(11, seed=1) if prefix else []
        self.prompts = [twin.tokens(n, seed=2 + n) for n in (5, 9, 3)]
        lengths = (24, 24, 24) if equal else (31, 7, 50)
        self.outputs = [twin.tokens(n, seed=20 + i) for i, n in enumerate(lengths)]
        self.question = twin.tokens(9, seed=40)

    def span(self, prompt: list[int], output: list[int]) -> tuple[int, int]:
        start = len(self.prefix) + len(prompt)
        return start, start + len(output)


def distance(got: np.ndarray, want: np.ndarray) -> Distance:
    return Distance(
        rms=float(np.sqrt(np.mean((got - want) ** 2))),
        worst=float(np.abs(got - want).max()),
        kl=float(np.mean([kl(w, g) for w, g in zip(want, got, strict=True)])),
    )


def run(twin: Twin, case: Case) -> tuple[np.ndarray, tuple[int, ...]]:
    """The runtime's logits of the question and of twenty greedy tokens, and those tokens."""
    job = Job(twin, case.prefix, case.equal)
    layout: dict[str, Any] = {"kv_type": case.kv_type, "flash_attn": case.flash_attn, "unified": case.unified}
    adapter = twin.adapter if case.lora else None
    with (
        Context(twin.model, 512, 4, **layout) as branches,
        context_with(adapter, twin.model, 512, 2, n_logits=64, **layout) as synthesizer,
    ):
        steps = [[*job.prefix, *p, *o] for p, o in zip(job.prompts, job.outputs, strict=True)]
        for pos in range(max(map(len, steps))):  # in lock step
            branches.decode([Token(s[pos], pos, seq) for seq, s in enumerate(steps) if pos < len(s)])
        if case.prefix:
            join(branches, synthesizer, [Span(0, 0, len(job.prefix), 0)], 1)
        spans = [
            Span(seq, *job.span(p, o), to=len(job.prefix))
            for seq, (p, o) in enumerate(zip(job.prompts, job.outputs, strict=True))
        ]
        join(branches, synthesizer, spans, 1, twin.coefficients(job) if case.mapped else None)
        start = synthesizer.end(1)
        n = len(job.question)
        synthesizer.decode([Token(t, start + i, 1, logits=True) for i, t in enumerate(job.question)])
        logits = [synthesizer.logits(i) for i in range(n)]
        chosen: list[int] = []
        for i in range(20):
            chosen.append(int(logits[-1].argmax()))
            synthesizer.decode([Token(chosen[-1], start + n + i, 1, logits=True)])
            logits.append(synthesizer.logits())
    return np.stack(logits), tuple(chosen)


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Twin]]:
    folder = tmp_path_factory.mktemp("twins")
    with ExitStack() as stack:

        @functools.cache
        def make(name: str) -> Twin:
            twin = Twin(name, folder)
            stack.callback(twin.model.close)
            return twin

        yield make


@pytest.mark.parametrize("case", list(all_cases()))
def test_the_runtime_computes_what_the_oracle_computes(
    twins: Callable[[str], Twin], case: Case, exactness: list[Record]
) -> None:
    twin = twins(case.model)
    got, chosen = run(twin, case)
    want = twin.reference(case.prefix, case.equal, case.mapped, case.lora, chosen)
    joined, plain = distance(got, want), twin.error_without_join(case.kv_type, case.flash_attn)
    exactness.append(Record(case.model, case.kv_type, case.flash_attn, case.lora, joined, plain))
    assert joined.rms <= 2 * plain.rms + FLOOR
    assert joined.worst <= 4 * plain.worst + FLOOR  # one value's luck
    assert joined.kl <= 4 * plain.kl + FLOOR**2  # which goes with the square of the error
    # each greedy token is the oracle's, or as good as it within the error
    margin = want[len(want) - 21 : -1].max(axis=1) - want[range(len(want) - 21, len(want) - 1), chosen]
    assert (margin <= 2 * joined.worst).all()


# one cache that holds everything, one with windows, one whose keys have no positions in some layers, one with experts
_AGAIN_MODELS = ("llama", "llama-64", "qwen2", "qwen3moe", "smollm3", "phi3-long", "gemma3-64", "gpt-oss")


def again_cases() -> Iterator[Any]:
    for model, kv_type, flash_attn in itertools.product(_AGAIN_MODELS, ("f32", "f16", "q8_0"), (False, True)):
        if model not in KV_TYPES[kv_type] or (needs_flash_attn(kv_type) and not flash_attn):
            continue
        for flags in itertools.product((False, True), repeat=5):
            case = Case(model, kv_type, flash_attn, *flags)
            yield pytest.param(case, id=str(case), marks=[] if case.representative else pytest.mark.exact)


def correction_for(twin: Twin) -> list[tuple[np.ndarray, np.ndarray]]:
    """Lines near the identity, different in every channel."""
    rng = np.random.default_rng(5)
    with Context(twin.model, 256) as ctx:
        ctx.prefill(0, [1])
        n_layers = native.n_layers(ctx.address)
    n = twin.model.n_embd_kv  # of K and of V

    def lines() -> np.ndarray:
        a, b = 1 + 0.1 * rng.standard_normal(n), 0.1 * rng.standard_normal(n)
        return np.stack([a, b]).astype(np.float32)

    return [(lines(), lines()) for _ in range(n_layers)]


@pytest.mark.parametrize("case", list(again_cases()))
def test_what_is_read_again_is_what_the_oracle_reads(twins: Callable[[str], Twin], case: Case) -> None:
    """Spans stand side by side or in order ("equal"), corrected or not ("mapped"); a third of their tokens is read
    again in several batches, in sight of everything."""
    twin = twins(case.model)
    oracle, job = twin.oracle, Job(twin, case.prefix, equal=False)
    in_order, correction = case.equal, correction_for(twin) if case.mapped else []
    spans = [
        oracle.encode([*job.prefix, *p, *o], job.span(p, o)) for p, o in zip(job.prompts, job.outputs, strict=True)
    ]
    point = len(job.prefix)
    starts = [point + in_order * sum(map(len, spans[:i])) for i in range(len(spans))]
    again = [(i, j) for i, o in enumerate(job.outputs) for j in range(len(o)) if (j + i) % 7 < 2]
    tokens = [job.outputs[i][j] for i, j in again]
    positions = [starts[i] + j for i, j in again]

    head = oracle.encode(job.prefix, (0, point)) if case.prefix else None
    corrected = [oracle.correct(span, correction) for span in spans] if correction else spans
    offsets = [point + sum(map(len, spans[:i])) for i in range(len(spans))]
    joined = oracle.without(oracle.join(head, corrected, None, in_order), [offsets[i] + j for i, j in again])
    order = sorted(range(len(again)), key=lambda i: positions[i])
    for start in range(0, len(order), _AT_ONCE):
        chosen = order[start : start + _AT_ONCE]
        at = [positions[i] for i in chosen]
        joined = oracle.read_again(joined, [tokens[i] for i in chosen], at, case.lora)
    want = oracle.synthesize(joined, job.question, case.lora)

    layout: dict[str, Any] = {"kv_type": case.kv_type, "flash_attn": case.flash_attn, "unified": case.unified}
    adapter = twin.adapter if case.lora else None
    with (
        Context(twin.model, 512, 4, **layout) as branches,
        context_with(adapter, twin.model, 512, 2, n_logits=64, n_batch=_AT_ONCE, **layout) as synthesizer,
    ):
        for seq, (p, o) in enumerate(zip(job.prompts, job.outputs, strict=True)):
            branches.prefill(seq, [*job.prefix, *p, *o])
        if case.prefix:
            join(branches, synthesizer, [Span(0, 0, point, 0)], 1)
        pieces = []
        for seq, (p, o) in enumerate(zip(job.prompts, job.outputs, strict=True)):
            start, _ = job.span(p, o)
            for j in range(len(o)):
                if (seq, j) not in again:
                    pieces.append(Span(seq, start + j, start + j + 1, starts[seq] + j))
        join(branches, synthesizer, pieces, 1, correction=correction)
        synthesizer.decode_at(1, tokens, positions)
        assert synthesizer.n_cells(1) == point + sum(map(len, job.outputs))
        end = synthesizer.end(1)
        synthesizer.decode([Token(t, end + i, 1, logits=True) for i, t in enumerate(job.question)])
        got = np.stack([synthesizer.logits(i) for i in range(len(job.question))])
    apart, plain = distance(got, want), twin.error_without_join(case.kv_type, case.flash_attn)
    assert apart.rms <= 2 * plain.rms + FLOOR
    assert apart.worst <= 4 * plain.worst + FLOOR


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("model", ["llama", "qwen2", "gemma3", "gpt-oss"])
def test_reading_everything_again_is_reading_the_text(
    twins: Callable[[str], Twin], model: str, flash_attn: bool
) -> None:
    """In order and at once, or in batches: the logits are those of the same tokens, decoded from the beginning."""
    twin = twins(model)
    tokens, question = twin.tokens(90, seed=3), twin.tokens(9, seed=4)
    want = twin.oracle.plain([*tokens, *question], False)[-9:]
    plain = twin.error_without_join("f32", flash_attn)
    for at_once in (512, _AT_ONCE):
        with Context(twin.model, 512, kv_type="f32", flash_attn=flash_attn, n_logits=16, n_batch=at_once) as ctx:
            ctx.prefill(0, tokens[:7])
            before = ctx.logits()
            ctx.decode_at(0, tokens[7:], list(range(7, 90)))
            assert (ctx.logits() == before).all(), "the logits of the last decode stay"
            ctx.decode([Token(t, 90 + i, 0, logits=True) for i, t in enumerate(question)])
            got = np.stack([ctx.logits(i) for i in range(9)])
        assert distance(got, want).rms <= 2 * plain.rms + FLOOR
