"""Tokens computed at any positions of a sequence: refusals, and that a failure changes nothing.

What it computes is compared with the oracle in test_oracle.py.
"""

import llama_cpp
import numpy as np
import pytest
from support.caches import fill, read
from support.tiny import TinyModel

from pyps.engine.context import Context, Token
from pyps.engine.join import Span, join
from pyps.engine.model import Model
from pyps.errors import EngineError, InputError, RefusedError


@pytest.mark.skipif(llama_cpp.llama_supports_gpu_offload(), reason="only a CPU asks whether to abort")
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_an_aborted_one_leaves_the_sequence_as_it_was(tiny_model: TinyModel, arch: str, flash_attn: bool) -> None:
    """Three batches, aborted in the first, the second and the last; cells share positions with those that stay."""
    model = tiny_model(arch, n_layers=7)
    tokens, positions = list(range(1, 41)), [5 + i // 2 for i in range(40)]
    calls = total = 0
    limit: float = np.inf

    def after_limit(_: int) -> bool:
        nonlocal calls
        calls += 1
        return calls > limit

    abort = llama_cpp.ggml_abort_callback(after_limit)
    for share in (None, 0, 0.5, 0.98):  # the first one counts, and is not aborted
        with Context(model, 256, 2, flash_attn=flash_attn, n_batch=16) as ctx:
            ctx.prefill(0, list(range(1, 13)))
            logits, before = ctx.logits(), [read(ctx, 0, layer) for layer in range(7)]
            limit, calls = (np.inf if share is None else share * total), 0
            llama_cpp.llama_set_abort_callback(ctx.pointer, abort, None)
            if share is None:
                ctx.decode_at(0, tokens, positions)
                assert ctx.n_cells(0) == 52
                total = calls
                continue
            with pytest.raises(EngineError, match="as it was"):
                ctx.decode_at(0, tokens, positions)
            limit = np.inf
            assert ctx.end(0) == 12
            assert ctx.n_cells(0) == 12
            assert (ctx.logits() == logits).all()
            for layer, cells in enumerate(before):
                after = read(ctx, 0, layer)
                assert (after.k_bytes == cells.k_bytes).all()
                assert (after.v_bytes == cells.v_bytes).all()
            ctx.decode_at(0, tokens, positions)
            assert ctx.n_cells(0) == 52
            ctx.prefill(0, [1, 2, 3])
            assert np.isfinite(ctx.logits()).all()


def test_what_cannot_be_computed_is_refused(tiny_model: TinyModel, tiny: Model) -> None:
    with Context(tiny, 256, 2) as ctx:
        fill(ctx, 0, 20)
        before = read(ctx, 0, 1)
        cases = [
            (0, [tiny.n_vocab], [0], "does not exist: the vocabulary has"),
            (0, [-1], [0], "does not exist"),
            (0, [1, 2], [3, -1], "negative position"),
            (0, [2**31], [0], "32-bit"),
            (0, [1], [2**31], "32-bit"),
            (2, [1], [0], "sequence 2 does not exist"),
            (-1, [1], [0], "does not exist"),
            (0, [1] * 237, [0] * 237, r"237 more cells are needed; this context has 236 free of 256"),
        ]
        for seq, tokens, positions, message in cases:
            with pytest.raises(InputError, match=message):
                ctx.decode_at(seq, tokens, positions)
        with pytest.raises(ValueError, match="zip"):
            ctx.decode_at(0, [1, 2], [0])
        ctx.decode_at(0, [], [])
        assert ctx.end(0) == 20
        assert (read(ctx, 0, 1).k_bytes == before.k_bytes).all()
        ctx.decode_at(0, [1] * 236, [0] * 236)  # the last cell
        assert ctx.n_cells(0) == 256
    with pytest.raises(InputError, match="closed"):
        ctx.decode_at(0, [1], [0])
    with Context(tiny_model("mamba"), 256) as ctx, pytest.raises(RefusedError, match="recurrent"):
        ctx.decode_at(0, [1], [0])


@pytest.mark.parametrize("unified", [False, True])
def test_other_sequences_are_not_seen_and_not_touched(tiny: Model, unified: bool) -> None:
    """The sequence, the last of four, is what it is in a context of its own; the others stay."""
    logits = []
    for seqs in ([0], [0, 1, 2, 3]):
        with Context(tiny, 512, len(seqs), unified=unified) as ctx:
            seq = seqs[-1]
            for other in seqs[:-1]:
                fill(ctx, other, 30, seed=other + 1)
            before = [read(ctx, other, 1) for other in seqs[:-1]]
            ctx.prefill(seq, [1, 2, 3, 4])
            ctx.decode_at(seq, [7, 8, 9], [6, 4, 5])
            ctx.decode([Token(10, 7, seq, logits=True)])
            logits.append(ctx.logits())
            for other, cells in zip(seqs[:-1], before, strict=True):
                assert (read(ctx, other, 1).k_bytes == cells.k_bytes).all()
    assert np.allclose(logits[0], logits[1], atol=1e-3)


def test_it_sees_cells_that_a_copy_has_queued(tiny: Model) -> None:
    """llama.cpp copies a sequence with the next batch: what is computed here comes after that."""
    with Context(tiny, 256, 2) as ctx:
        fill(ctx, 0, 20)
        ctx.copy(0, 1)
        ctx.decode_at(1, [5], [20])
        ctx.decode_at(0, [5], [20])
        assert (read(ctx, 0, 2).k_bytes == read(ctx, 1, 2).k_bytes).all()


def test_it_goes_where_a_join_left_gaps(tiny: Model) -> None:
    with Context(tiny, 256) as src, Context(tiny, 256) as dst:
        fill(src, 0, 40)
        join(src, dst, [Span(0, 0, 10, 0), Span(0, 20, 40, 20)])
        dst.decode_at(0, list(range(10)), list(range(10, 20)))
        cells = read(dst, 0, 1)
        assert list(cells.positions) == list(range(40))
        whole = read(src, 0, 1)
        assert (cells.k_bytes[:10] == whole.k_bytes[:10]).all()
        assert (cells.k_bytes[20:] == whole.k_bytes[20:]).all()
