"""What went on before a join, or goes on beside it, changes nothing: the same job in contexts with a past gives what it
gives in a fresh process.

llama.cpp reuses its last graph, queues shifts and copies for the next decode, replaces its scheduler when a LoRA comes,
and leaves old data in free cells.
"""

import ctypes
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray
from support.caches import fill
from support.contexts import context_with
from support.tiny import write_adapter, write_model

from pyps.adapters.adapter import Adapter
from pyps.engine.context import Context, Token
from pyps.engine.join import Span, join
from pyps.engine.model import Model

PREFIX, BRANCHES, QUESTION = list(range(40, 50)), [list(range(100, 130)), list(range(60, 75))], [33, 34, 35, 36, 37]
SPARE = 2  # a sequence of either context that the job does not use
SHAPE: dict[str, Any] = {"n_ctx": 256, "n_seq": 3, "kv_type": "f32"}

# the tokens that were chosen, and the last logits [n_vocab]
Outcome = tuple[list[int], NDArray[np.float32]]


def job(src: Context, dst: Context) -> Outcome:
    """Two branches, joined after a prefix, then a question and twelve greedy tokens; and the last logits."""
    encode(src)
    return synthesize(src, dst)


def encode(src: Context) -> None:
    for seq, branch in enumerate(BRANCHES):
        src.prefill(seq, [*PREFIX, *branch])


def synthesize(src: Context, dst: Context, shift: int = 0) -> Outcome:
    """shift: by how much the branches' outputs have been moved since they were encoded."""
    n = len(PREFIX)
    join(src, dst, [Span(0, 0, n, 0)])
    join(src, dst, [Span(seq, n + shift, n + shift + len(b), n) for seq, b in enumerate(BRANCHES)])
    dst.prefill(0, QUESTION)
    chosen = []
    for _ in range(12):
        chosen.append(int(dst.logits().argmax()))
        dst.prefill(0, [chosen[-1]])
    return chosen, dst.logits()


def memory(ctx: Context) -> Any:
    return llama_cpp.llama_get_memory(ctx.pointer)


def cleared(src: Context, dst: Context) -> Outcome:
    for ctx in (src, dst):
        for seq in range(3):
            fill(ctx, seq, 50, seed=seq)
        llama_cpp.llama_memory_clear(memory(ctx), False)
    return job(src, dst)


def several_times(src: Context, dst: Context) -> Outcome:
    for _ in range(3):
        last = job(src, dst)
        src.clear()
        dst.clear()
    again = job(src, dst)
    assert again[0] == last[0]
    return again


def copies_are_queued(src: Context, dst: Context) -> Outcome:
    fill(dst, SPARE, 90)
    dst.copy(SPARE, 0)
    dst.remove(0)
    encode(src)
    src.copy(0, SPARE)
    src.remove(SPARE)
    return synthesize(src, dst)


def shifts_are_queued(src: Context, dst: Context) -> Outcome:
    """Of other sequences, and of those that are joined: their cells are found where they were moved to, and turned."""
    fill(dst, SPARE, 90)
    llama_cpp.llama_memory_seq_add(memory(dst), SPARE, 0, -1, 11)
    encode(src)
    fill(src, SPARE, 20)
    llama_cpp.llama_memory_seq_add(memory(src), SPARE, 0, -1, 5)
    for seq in range(len(BRANCHES)):
        llama_cpp.llama_memory_seq_add(memory(src), seq, len(PREFIX), -1, 7)
    return synthesize(src, dst, shift=7)


def decodes_of_the_same_shape_go_before(src: Context, dst: Context) -> Outcome:
    for tokens in (QUESTION, [1], [2], [3]):
        dst.prefill(SPARE, tokens)
    encode(src)
    for tokens in (QUESTION, [1]):
        dst.prefill(SPARE, tokens)
    return synthesize(src, dst)


def joins_of_others_come_between(src: Context, dst: Context) -> Outcome:
    encode(src)
    join(src, dst, [Span(1, 0, 20, 0)], SPARE)
    join(dst, dst, [Span(SPARE, 5, 20, 30)], SPARE)
    dst.prefill(SPARE, [1, 2])
    return synthesize(src, dst)


def a_branch_goes_on(src: Context, dst: Context) -> Outcome:
    """The source decodes between the join's two calls, and after them."""
    encode(src)
    n = len(PREFIX)
    join(src, dst, [Span(0, 0, n, 0)])
    src.decode([Token(5, len(PREFIX) + len(b), seq) for seq, b in enumerate(BRANCHES)])
    dst.clear()
    return synthesize(src, dst)


@dataclass(frozen=True)
class Case:
    """A model, its file, and the file of an adapter for it: what another process needs to do the same job."""

    model: Model
    path: Path
    adapter: Path


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder, arch = tmp_path_factory.mktemp("interference"), request.param
    path = write_model(folder / "m.gguf", arch, n_layers=7)
    adapter = write_adapter(folder / "lora.gguf", arch=arch, n_layers=7)
    model = Model.load(path)
    yield Case(model, path, adapter)
    model.close()


@functools.cache
def fresh(path: Path, unified: bool, adapter: Path | None) -> Outcome:
    """The job in a process of its own."""
    words = [sys.executable, __file__, str(path), str(int(unified)), str(adapter or "")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    tokens, logits = json.loads(done.stdout)
    return tokens, np.array(logits, np.float32)


def same(got: Outcome, want: Outcome) -> None:
    assert got[0] == want[0]
    # cells may lie elsewhere, so sums may be in another order
    np.testing.assert_allclose(got[1], want[1], rtol=0, atol=1e-3 * np.abs(want[1]).max())


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize(
    "history",
    [
        cleared,
        several_times,
        copies_are_queued,
        shifts_are_queued,
        decodes_of_the_same_shape_go_before,
        joins_of_others_come_between,
        a_branch_goes_on,
    ],
)
def test_a_past_changes_nothing(case: Case, history: Callable[[Context, Context], Outcome], unified: bool) -> None:
    shape = SHAPE | ({"n_ctx": 768, "unified": True} if unified else {})
    with Context(case.model, **shape) as src, Context(case.model, **shape) as dst:
        same(history(src, dst), fresh(case.path, unified, None))


def test_a_lora_that_has_just_come_or_gone(case: Case) -> None:
    """llama.cpp replaces the context's scheduler at the next decode after its adapters change."""
    adapter = Adapter(case.adapter, case.model)
    lora: Any = adapter.lora
    handles = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora)

    def attach(ctx: Context, n: int) -> None:
        assert llama_cpp.llama_set_adapters_lora(ctx.pointer, handles, n, (ctypes.c_float * 1)(1.0)) == 0

    with Context(case.model, **SHAPE) as src, Context(case.model, **SHAPE) as dst:
        encode(src)
        for n, attached in ((0, None), (1, case.adapter), (0, None), (1, case.adapter)):
            attach(dst, 1 - n)
            dst.prefill(SPARE, QUESTION)
            attach(dst, n)
            same(synthesize(src, dst), fresh(case.path, False, attached))
            dst.clear()
    adapter.close()


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_threads_do_not_disturb_each_other(case: Case) -> None:
    def work() -> list[Outcome]:
        got = []
        with Context(case.model, threads=1, **SHAPE) as src, Context(case.model, threads=1, **SHAPE) as dst:
            for _ in range(10):
                got.append(job(src, dst))
                src.clear()
                dst.clear()
        return got

    with ThreadPoolExecutor() as pool:
        workers = [pool.submit(work) for _ in range(4)]
    got = [result for worker in workers for result in worker.result()]
    assert len(got) == 40
    for result in got:
        same(result, fresh(case.path, False, None))


def main(path: str, unified: str, adapter: str) -> None:
    model = Model.load(path)
    shape = SHAPE | ({"n_ctx": 768, "unified": True} if int(unified) else {})
    lora = Adapter(adapter, model) if adapter else None
    with Context(model, **shape) as src, context_with(lora, model, **shape) as dst:
        tokens, logits = job(src, dst)
    print(json.dumps([tokens, logits.tolist()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
