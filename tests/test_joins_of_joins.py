"""A tree of fork-joins against the oracle: four branches, two answers, one. The answers' own caches are joined."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.caches import read
from support.oracle import Joined, Oracle, Span
from support.tiny import mapper_metadata, write_adapter, write_model

from pyps import Branches, ForkJoin, Sampling
from pyps.prompts.layout import DEFAULT_SYNTHESIZE, Layout, Prompts

SAMPLING = Sampling(temperature=1, seed=4, max_tokens=14, ignore_eos=True)
N_LAYERS = 4


class Tree:
    def __init__(self, fj: ForkJoin, oracle: Oracle) -> None:
        self.fj, self.oracle = fj, oracle

    def prompts(self, task: str, branches: list[str]) -> Prompts:
        return Layout(self.fj.model, "shared", task, None, DEFAULT_SYNTHESIZE).prompts(branches)

    def branch(self, task: str, prompt: str, output: tuple[int, ...]) -> Span:
        p = self.prompts(task, [prompt])
        before = [*p.prefix, *p.branches[0]]
        return self.oracle.encode([*before, *output], (len(before), len(before) + len(output)))

    def joined(self, task: str, spans: list[Span]) -> Joined:
        prefix = self.oracle.encode(self.prompts(task, []).prefix, (0, len(self.prompts(task, []).prefix)))
        assert self.fj.adapter is not None
        assert self.fj.adapter.mapper is not None
        coefficients = self.fj.adapter.mapper.coefficients(list(map(len, spans)), N_LAYERS)
        return self.oracle.join(prefix, spans, coefficients, in_order=True)

    def answer(self, task: str, spans: list[Span], kept: Branches) -> Span:
        return self.oracle.answer(
            self.joined(task, spans), self.prompts(task, []).synthesizer, list(kept.cached[0].tokens)
        )


def _rows(values: list[torch.Tensor], layer: int) -> np.ndarray:
    """[cells, channels]"""
    return values[layer].transpose(0, 1).flatten(1).numpy()


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])  # whose keys GGUF does not permute
def test_its_caches_are_the_oracles(tmp_path: Path, arch: str) -> None:
    path = write_model(tmp_path / "m.gguf", arch)
    options: dict[str, Any] = {"pyps__layout": "shared", "pyps__in_order": True}
    adapter = write_adapter(tmp_path / "a.gguf", arch=arch, mapper=mapper_metadata(3), **options)
    pairs = {"Go left.": ["a", "b"], "Go right.": ["c", "d"]}
    with ForkJoin.from_pretrained(str(path), adapter=adapter, kv_type="f32") as fj:
        tree = Tree(fj, Oracle(path, adapter))
        trees, answers = [], []
        for n, (task, instructions) in zip((14, 9), pairs.items(), strict=True):
            with fj.fork(task, instructions, sampling=SAMPLING) as forked:
                result = fj.run(task, join=forked, answer=replace(SAMPLING, max_tokens=n), keep=True)
                assert result.kept is not None
                trees.append(result.kept)
                outputs = [c.tokens for c in forked.cached]
                spans = [tree.branch(task, *pair) for pair in zip(instructions, outputs, strict=True)]
                answers.append(tree.answer(task, spans, result.kept))
        top = fj.run("Now sum up.", join=trees, answer=SAMPLING, keep=True)
        assert top.kept is not None
        joined = tree.joined("Now sum up.", answers)
        top_span = tree.answer("Now sum up.", answers, top.kept)
        n, start, end = len(joined.positions), top_span.start, top_span.start + len(top_span)
        for layer in range(N_LAYERS):
            got = read(top.kept.ctx, 0, layer, "f32")
            assert got.positions[:n].tolist() == joined.positions
            for name, want, last in (("k", joined.k, top_span.k), ("v", joined.v, top_span.v)):
                have = getattr(got, name)
                scale = np.abs(have).max()
                assert np.abs(have[:n] - _rows(want, layer)).max() < 1e-4 * scale
                assert np.abs(have[start:end] - _rows(last, layer)).max() < 1e-4 * scale
