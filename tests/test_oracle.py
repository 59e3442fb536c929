"""The runtime against the oracle: every architecture, cache type and layout that pyps claims, with and without prefix,
mapper and LoRA.

How far the two may be apart is not chosen but measured: the same model with the same kind of cache reads as many tokens
without any join, and a join may be about twice as far from the oracle as that. `make exact` runs the same, and writes
the distances to docs/exactness.md.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import kl
from oracle import Oracle
from tiny import mapper_metadata, write_adapter, write_model

from pyps.adapter import Adapter
from pyps.context import Context, Span, Token, join
from pyps.mapper import Mapper
from pyps.model import Model

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama"},
    "llama-3": {"arch": "llama", "freq_factors": True},
    "llama-64": {"arch": "llama", "head_dim": 64},  # heads wide enough for quantised caches, rotated
    "qwen2": {"arch": "qwen2"},
    "qwen3": {"arch": "qwen3"},
    "smollm3": {"arch": "smollm3"},
    "gemma3": {"arch": "gemma3", "n_layers": 7, "gemma3__rope__freq_base": 500000.0},
}
QUANTISED = ("q8_0", "q4_0")
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


def all_cases() -> Iterator[Case]:
    for model, kv_type in itertools.product(MODELS, ("f32", "f16", "bf16", *QUANTISED)):
        if kv_type in QUANTISED and model != "llama-64":
            continue
        for flags in itertools.product((False, True), repeat=6):
            case = Case(model, kv_type, *flags)
            if case.flash_attn or kv_type not in QUANTISED:
                yield case


class Twin:
    """One model on both sides, its adapter, and what reading without a join costs."""

    def __init__(self, name: str, folder: Path) -> None:
        options = dict(MODELS[name])
        path = write_model(folder / f"{name}.gguf", **options)
        shape = {key: options[key] for key in ("arch", "n_layers", "head_dim") if key in options}
        adapter = write_adapter(folder / f"{name}-lora.gguf", **shape)
        self.model = Model.load(path)
        self.adapter = Adapter(adapter, self.model)
        self.oracles = {False: Oracle(path), True: Oracle(path, adapter)}
        self.mapper = Mapper.from_metadata(mapper_metadata(4))

    @functools.cache  # noqa: B019  # lives as long as the test session
    def error_without_join(self, kv_type: str, flash_attn: bool, lora: bool) -> tuple[float, float]:
        """(worst logit error, worst KL) of eight sequences, read in batches of the same sizes as in `run`."""
        found = []
        for seed in range(8):
            tokens = random_tokens(95, seed=90 + seed)
            want = self.oracles[lora].plain(tokens)
            adapter = self.adapter if lora else None
            with Context(self.model, 256, kv_type=kv_type, flash_attn=flash_attn, n_logits=64, adapter=adapter) as ctx:
                logits = []
                for size in [1] * 66 + [9] + [1] * 20:
                    start = ctx.end(0)
                    ctx.decode(
                        [Token(t, start + i, 0, logits=True) for i, t in enumerate(tokens[start : start + size])]
                    )
                    logits += [ctx.logits(i) for i in range(size)]
            found.append(worst(np.stack(logits)[66:], want[66:]))
        return max(error for error, _ in found), max(divergence for _, divergence in found)

    @functools.cache  # noqa: B019
    def reference(self, prefix: bool, equal: bool, mapped: bool, lora: bool, more: tuple[int, ...]) -> np.ndarray:
        """The oracle's logits of the synthesizer's prompt and of `more` tokens after it."""
        oracle = self.oracles[lora]
        job = Job(prefix, equal)
        spans = [
            oracle.encode([*job.prefix, *p, *o], job.span(p, o)) for p, o in zip(job.prompts, job.outputs, strict=True)
        ]
        head = oracle.encode(job.prefix, (0, len(job.prefix))) if prefix else None
        joined = oracle.join(head, spans, self.coefficients(job) if mapped else None)
        return oracle.synthesize(joined, [*job.question, *more])

    def coefficients(self, job: "Job") -> np.ndarray | None:
        assert self.mapper is not None
        return self.mapper.coefficients([len(o) for o in job.outputs], self.oracles[False].n_layers)


class Job:
    """Three branches and a question, in random tokens."""

    def __init__(self, prefix: bool, equal: bool) -> None:
        self.prefix = random_tokens(11, seed=1) if prefix else []
        self.prompts = [random_tokens(n, seed=2 + n) for n in (5, 9, 3)]
        lengths = (24, 24, 24) if equal else (31, 7, 50)
        self.outputs = [random_tokens(n, seed=20 + i) for i, n in enumerate(lengths)]
        self.question = random_tokens(9, seed=40)

    def span(self, prompt: list[int], output: list[int]) -> tuple[int, int]:
        start = len(self.prefix) + len(prompt)
        return start, start + len(output)


def random_tokens(n: int, seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 250, n)]


def worst(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    return float(np.abs(got - want).max()), max(kl(w, g) for w, g in zip(want, got, strict=True))


def run(twin: Twin, case: Case) -> tuple[np.ndarray, tuple[int, ...]]:
    """The runtime's logits of the question and of twenty greedy tokens, and those tokens."""
    job = Job(case.prefix, case.equal)
    layout = {"kv_type": case.kv_type, "flash_attn": case.flash_attn, "unified": case.unified}
    adapter = twin.adapter if case.lora else None
    with (
        Context(twin.model, 512, 4, **layout) as branches,
        Context(twin.model, 512, 2, n_logits=64, adapter=adapter, **layout) as synthesizer,
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
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Twin]:
    folder = tmp_path_factory.mktemp("twins")
    return {name: Twin(name, folder) for name in MODELS}


@pytest.mark.parametrize("case", list(all_cases()), ids=str)
def test_the_runtime_computes_what_the_oracle_computes(
    twins: dict[str, Twin], case: Case, exactness: list[tuple[Case, float, float, float, float]]
) -> None:
    twin = twins[case.model]
    got, chosen = run(twin, case)
    want = twin.reference(case.prefix, case.equal, case.mapped, case.lora, chosen)
    error, divergence = worst(got, want)
    plain_error, plain_divergence = twin.error_without_join(case.kv_type, case.flash_attn, case.lora)
    exactness.append((case, error, plain_error, divergence, plain_divergence))
    assert error <= 2 * plain_error + FLOOR
    assert divergence <= 4 * plain_divergence + FLOOR**2  # KL goes with the square of the error
    # each greedy token is the oracle's, or as good as it within the error
    margin = want[len(want) - 21 : -1].max(axis=1) - want[range(len(want) - 21, len(want) - 1), chosen]
    assert (margin <= 2 * error).all()
