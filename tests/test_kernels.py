"""Our kernels: products and attention against float64, alone and within models; which are used, and by whom.

Single nodes go through ggml's CPU backend and the hook as those of a model do.
"""

import ctypes
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.command_line import pyps
from support.contexts import context_with
from support.tiny import write_adapter

from pyps.adapters.adapter import Adapter
from pyps.engine import kernels
from pyps.engine.context import Context, Token, prefers_flash_attn
from pyps.engine.generate import Generation, generate
from pyps.engine.model import Model
from pyps.engine.sampling import Sampling
from pyps.errors import EngineError, InputError

_kernels: Any = pytest.importorskip("pyps.engine._kernels")

Floats = NDArray[np.float32]

OURS = [name for name in kernels.names() if _kernels.runs_here(name)]
DEFAULT = kernels.in_use()
TYPES = [Type[name.upper()] for name in (_kernels.types(OURS[0]) if OURS else [])]

FROM_TWO = (Type.Q4_K, Type.Q5_K, Type.Q6_K)  # columns: llama.cpp's own are faster for one
REPACKED = (Type.Q4_0, Type.Q4_K, Type.IQ4_NL)

needs_ours = pytest.mark.skipif(not OURS, reason="none of the kernels runs on this CPU")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    kernels.use(DEFAULT)


def random_weights(rng: np.random.Generator, type: Type, rows: int, k: int) -> NDArray[np.uint8]:
    """Return the bytes [rows, row] of weights with every pattern of bits, and scales of one size."""
    values, size = gguf.GGML_QUANT_SIZES[type]
    weights = rng.integers(0, 256, (rows, k // values, size), dtype=np.uint8)

    def put(at: int, low: float, high: float) -> None:
        halves = (rng.uniform(low, high, (rows, k // values, 1)) * 0.01).astype(np.float16)
        weights[:, :, at : at + 2] = halves.view(np.uint8)

    put(208 if type == Type.Q6_K else 0, 0.5, 1.5)
    if type in (Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K):
        put(2, -0.5, 1.5)
    return weights.reshape(rows, -1)


def exact(type: Type, weights: NDArray[np.uint8], x: Floats | NDArray[np.float64]) -> NDArray[np.float64]:
    return x.astype(np.float64) @ gguf.dequantize(weights, type).astype(np.float64).T


def quantised(x: Floats) -> NDArray[np.float64]:
    """Return what is left of columns once each 32 values have a scale and 8 bits."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    limit = np.abs(blocks).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.rint(blocks * np.where(limit > 1e-35, np.float32(127) / limit, np.float32(0)))
    return np.asarray((q * (limit / np.float32(127)).astype(np.float64)).reshape(x.shape))


def multiply(
    name: str, type: Type, weights: NDArray[np.uint8], x: Floats, threads: int = 2, repacked: bool = False
) -> Floats:
    """Return the product as these kernels compute it, and see that it was they, if there are enough columns."""
    kernels.use(name)
    before = kernels.computed()
    shape = (1,) * (4 - x.ndim) + x.shape
    columns = np.lib.stride_tricks.as_strided(x, shape, _strides(x))
    product = _kernels.multiply(int(type), weights, columns, threads, repacked)
    enough = repacked or type in FROM_TWO
    assert kernels.computed() - before == (name != kernels.OFF and x.size // x.shape[-1] > enough)
    return np.asarray(product.reshape(*x.shape[:-1], -1))


def _strides(x: Floats) -> tuple[int, ...]:
    return (x.strides[0] * x.shape[0],) * (4 - x.ndim) + x.strides


def error(got: Floats, want: NDArray[np.float64]) -> tuple[float, float]:
    distance = got - want
    return float(np.abs(distance).max()), float(np.sqrt((distance**2).mean()))


@needs_ours
@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_products_are_no_further_from_exact_than_llama_cpps_own(type: Type) -> None:
    rng = np.random.default_rng(1)
    weights = random_weights(rng, type, 97, 1536)
    x = rng.standard_normal((70, 1536)).astype(np.float32)
    want = exact(type, weights, x)
    most, rms = error(multiply(kernels.OFF, type, weights, x), want)
    for name in OURS:
        our_most, our_rms = error(multiply(name, type, weights, x), want)
        assert our_rms < 1.01 * rms
        assert our_most < 1.15 * most, "the greatest of 7,000 scatters"


@needs_ours
@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 40),
    columns=st.integers(2, 70),
    threads=st.integers(1, 16),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_of_any_size(type: Type, rows: int, blocks: int, columns: int, threads: int, seed: int) -> None:
    """Nothing but the quantisation of the columns stands between a product and the exact one."""
    rng = np.random.default_rng(seed)
    k = blocks * gguf.GGML_QUANT_SIZES[type][0]
    weights = random_weights(rng, type, rows, k)
    x = rng.standard_normal((columns, k)).astype(np.float32)
    want = exact(type, weights, quantised(x))
    size = np.abs(quantised(x)) @ np.abs(gguf.dequantize(weights, type).astype(np.float64)).T
    for name in OURS:
        assert (np.abs(multiply(name, type, weights, x, threads) - want) <= 1e-5 * size + 1e-30).all()


@needs_ours
@pytest.mark.parametrize("type", REPACKED, ids=lambda type: type.name)
def test_products_with_weights_that_llama_cpp_has_repacked(type: Type) -> None:
    rng = np.random.default_rng(5)
    for rows, blocks, columns, threads in ((8, 1, 2, 1), (24, 3, 5, 2), (40, 17, 70, 3), (200, 2, 33, 16)):
        k = blocks * gguf.GGML_QUANT_SIZES[type][0]
        weights = random_weights(rng, type, rows, k)
        x = rng.standard_normal((columns, k)).astype(np.float32)
        want = exact(type, weights, quantised(x))
        size = np.abs(quantised(x)) @ np.abs(gguf.dequantize(weights, type).astype(np.float64)).T
        for name in OURS:
            assert (np.abs(multiply(name, type, weights, x, threads, repacked=True) - want) <= 1e-5 * size).all()


@needs_ours
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_a_column_does_not_depend_on_the_others(name: str, type: Type) -> None:
    """A sequence says the same alone as in a batch, whoever computes."""
    rng = np.random.default_rng(2)
    weights = random_weights(rng, type, 50, 512)
    x = rng.standard_normal((600, 512)).astype(np.float32)
    together = multiply(name, type, weights, x, 3)
    for columns in (slice(0, 2), slice(3, 6), slice(598, 600), slice(100, 164)):
        assert np.array_equal(multiply(name, type, weights, x[columns], 1), together[columns])


@needs_ours
@pytest.mark.parametrize("name", OURS)
def test_columns_with_gaps_and_in_several_dimensions(name: str) -> None:
    rng = np.random.default_rng(3)
    weights = random_weights(rng, Type.Q8_0, 33, 96)
    x = rng.standard_normal((2, 3, 5, 128)).astype(np.float32)[:, :, ::2, :96]
    flat = np.ascontiguousarray(x).reshape(-1, 96)
    got = multiply(name, Type.Q8_0, weights, x)
    assert got.shape == (2, 3, 3, 33)
    assert np.array_equal(got.reshape(-1, 33), multiply(name, Type.Q8_0, weights, flat))


@needs_ours
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_zeros_great_and_small_values_and_what_is_no_number(name: str, type: Type) -> None:
    rng = np.random.default_rng(4)
    weights = random_weights(rng, type, 20, 512)
    x = rng.standard_normal((7, 512)).astype(np.float32)
    x[0] = 0
    x[1] *= np.float32(1e30)
    x[2] *= np.float32(1e-30)
    x[3] *= np.float32(1e-44)
    x[4, 77] = np.nan
    x[5, 400] = np.inf
    got = multiply(name, type, weights, x)
    assert (got[0] == 0).all()
    for i in (1, 2, 6):
        want = exact(type, weights, quantised(x[i : i + 1]))[0]
        assert np.abs(got[i] - want).max() < 1e-4 * np.abs(want).max()
    assert np.abs(got[3]).max() < 1e-38, "too small to be told from 0"
    assert np.isnan(got[4]).all()
    assert not np.isfinite(got[5]).any()


@dataclass(frozen=True)
class Node:
    """The sizes of a flash attention node."""

    streams: int = 1
    tokens: int = 1
    heads: int = 4
    kv_heads: int = 2
    cells: int = 100
    dk: int = 64
    dv: int = 64
    k_type: Type = Type.F16
    v_type: Type = Type.F16
    masked: bool = True
    sinks: bool = False
    bias: float = 0.0
    cap: float = 0.0


@dataclass
class Values:
    """What a node computes with, and the exact result."""

    q: Floats
    k: NDArray[np.uint8]
    v: NDArray[np.uint8]
    mask: NDArray[np.float16] | None
    sinks: Floats | None
    want: NDArray[np.float64]


def slopes(heads: int, bias: float) -> NDArray[np.float64]:
    """Return ALiBi's slopes, as its paper defines them for any number of heads."""
    if not bias:
        return np.ones(heads)
    n = 2 ** int(np.floor(np.log2(heads)))
    first = [2 ** (-bias * (h + 1) / n) for h in range(n)]
    return np.array(first + [2 ** (-bias / 2 * (2 * h + 1) / n) for h in range(heads - n)])


def values(node: Node, seed: int = 0) -> Values:
    rng = np.random.default_rng(seed)
    q = (2 * rng.standard_normal((node.streams, node.tokens, node.heads, node.dk))).astype(np.float32)

    def cache(type: Type, width: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        plain = rng.standard_normal((node.streams * node.cells * node.kv_heads, width)).astype(np.float32)
        packed = gguf.quantize(plain, type)
        shape = (node.streams, node.cells, node.kv_heads, -1)
        return packed.view(np.uint8).reshape(shape), gguf.dequantize(packed, type).astype(np.float64).reshape(shape)

    k, k_exact = cache(node.k_type, node.dk)
    v, v_exact = cache(node.v_type, node.dv)
    mask = None
    if node.masked:
        mask = -rng.integers(0, 9, (node.streams, node.tokens, node.cells)).astype(np.float16)
        mask[rng.random(mask.shape) < 0.3] = -np.inf
        mask[:, :, : node.cells // 3] = -np.inf
        mask[:, :, -1] = 0
    sinks = rng.standard_normal(node.heads).astype(np.float32) if node.sinks else None

    group = node.heads // node.kv_heads
    keys, vals = np.repeat(k_exact, group, 2), np.repeat(v_exact, group, 2)
    scores = np.einsum("snhd,schd->shnc", q.astype(np.float64), keys) * node.dk**-0.5
    if node.cap:
        scores = node.cap * np.tanh(scores / node.cap)
    if mask is not None:
        scores = scores + slopes(node.heads, node.bias)[:, None, None] * mask[:, None].astype(np.float64)
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.astype(np.float64)[None, :, None, None] - most)
    return Values(q, k, v, mask, sinks, np.einsum("shnc,schd->snhd", weights / total, vals))


def attend(name: str, node: Node, x: Values, threads: int = 2) -> Floats:
    kernels.use(name)
    before = kernels.computed()
    mask = None if x.mask is None else np.ascontiguousarray(x.mask).view(np.uint16)
    words = (x.q, int(node.k_type), x.k, int(node.v_type), x.v, mask, x.sinks)
    got = _kernels.attend(*words, scale=node.dk**-0.5, bias=node.bias, cap=node.cap, threads=threads)
    assert kernels.computed() - before == (name != kernels.OFF)
    return np.asarray(got)


NODES = [
    Node(streams=8, heads=9, kv_heads=3, cells=300),
    Node(tokens=18, heads=9, kv_heads=3, cells=1000),
    Node(streams=2, tokens=3, heads=8, cells=77, dk=128, dv=96, cap=30.0),
    Node(tokens=70, heads=4, kv_heads=4, cells=256, dk=128, dv=128, sinks=True),
    Node(streams=3, heads=64, kv_heads=1, cells=33, dk=16, dv=16),
    Node(heads=12, kv_heads=12, cells=500, dk=80, dv=80, bias=8.0),
    Node(tokens=5, cells=1, masked=False),
    Node(cells=4000, masked=False),
]
CACHES = [Type.F16, Type.BF16, Type.F32, Type.Q8_0, Type.Q4_0]


@needs_ours
@pytest.mark.parametrize("node", NODES, ids=str)
@pytest.mark.parametrize("type", CACHES, ids=lambda type: type.name)
def test_attention_is_exact_but_for_rounding(node: Node, type: Type) -> None:
    """f32 throughout: llama.cpp's own is a thousand times further off, since it sums V in f16 or rounds the queries."""
    if gguf.GGML_QUANT_SIZES[type][0] == 32 and node.dk % 32:
        pytest.skip("heads that are no whole blocks")
    node = replace(node, k_type=type, v_type=type)
    x = values(node)
    for name in OURS:
        assert error(attend(name, node, x), x.want)[0] < 1e-5


@needs_ours
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    node=st.builds(
        lambda group, **words: Node(heads=words["kv_heads"] * group, **words),
        group=st.integers(1, 9),
        streams=st.integers(1, 4),
        tokens=st.integers(1, 40),
        kv_heads=st.integers(1, 4),
        cells=st.integers(1, 400),
        dk=st.sampled_from([32, 64, 96, 128]),
        dv=st.sampled_from([32, 64, 96]),
        k_type=st.sampled_from(CACHES),
        v_type=st.sampled_from(CACHES),
        masked=st.booleans(),
        sinks=st.booleans(),
        cap=st.sampled_from([0.0, 20.0]),
    ),
    threads=st.integers(1, 16),
    seed=st.integers(0, 1000),
)
def test_attention_of_any_size(node: Node, threads: int, seed: int) -> None:
    x = values(node, seed)
    for name in OURS:
        assert error(attend(name, node, x, threads), x.want)[0] < 2e-5


@needs_ours
@pytest.mark.parametrize("name", OURS)
def test_what_lies_in_hidden_cells_does_not_matter(name: str) -> None:
    node = Node(streams=2, tokens=3, cells=200)
    x = values(node)
    assert x.mask is not None
    x.mask[:, :, 150:] = -np.inf
    before = attend(name, node, x)
    x.k[:, 150:], x.v[:, 150:] = 0xFF, 0xFF  # not a number
    assert np.array_equal(attend(name, node, x), before)


@needs_ours
@pytest.mark.parametrize("name", OURS)
def test_a_token_that_sees_nothing_gets_zeros_and_what_is_no_number_stays_none(name: str) -> None:
    node = Node(tokens=3, cells=300)
    x = values(node)
    assert x.mask is not None
    x.mask[:, 1] = -np.inf
    x.q[0, 2, 1, 5] = np.nan
    got = attend(name, node, x)
    assert (got[0, 1] == 0).all()
    assert np.isnan(got[0, 2, 1]).all()
    assert np.isfinite(got[0, 0]).all()
    assert np.isfinite(got[0, 2, [0, 2, 3]]).all()


# --- within models ---


def logits(model: Model, tokens: list[int], *, one_by_one: bool = False, **options: Any) -> Floats:
    """Return the logits [tokens, vocabulary] after each token."""
    n = len(tokens)
    with Context(model, n + 1, n_logits=n, threads=2, **options) as ctx:
        batch = [Token(id, i, 0, logits=True) for i, id in enumerate(tokens)]
        if not one_by_one:
            ctx.decode(batch)
            return np.stack([ctx.logits(i) for i in range(n)])
        rows = []
        for token in batch:
            ctx.decode([token])
            rows.append(ctx.logits(-1))
        return np.stack(rows)


@needs_ours
@pytest.mark.parametrize("name", OURS)
def test_the_default_model_says_what_it_says_without(name: str, smollm2: Model) -> None:
    """Ours are no further from llama.cpp's own than its own ways to compute are from each other."""
    text = (Path(__file__).parent / "support" / "prose.txt").read_text(encoding="utf-8")
    tokens = smollm2.tokenize(text)[:96]
    kernels.use(kernels.OFF)
    own = [
        logits(smollm2, tokens, flash_attn=flash, one_by_one=one) for flash in (False, True) for one in (False, True)
    ]
    kernels.use(name)
    ours = [
        logits(smollm2, tokens, flash_attn=flash, one_by_one=one) for flash in (False, True) for one in (False, True)
    ]

    def distance(a: Floats, b: Floats) -> float:
        return float(np.sqrt(((a - b) ** 2).mean()))

    among_own = max(distance(a, b) for a in own for b in own)
    assert among_own > 0
    for a in ours:
        assert min(distance(a, b) for b in own) < among_own
    among_ours = max(distance(a, b) for a in ours for b in ours)
    assert among_ours < among_own


@needs_ours
@pytest.mark.parametrize("name", OURS)
def test_a_branch_says_the_same_alone_and_in_a_batch(name: str, smollm2: Model) -> None:
    kernels.use(name)
    prompts = [smollm2.tokenize(words) for words in ("The tide comes in", "A list of tools:", "Once, in winter, we")]
    greedy = Sampling(temperature=0, max_tokens=24, ignore_eos=True)

    def texts(groups: list[list[int]]) -> list[str]:
        found = []
        for group in groups:
            with Context(smollm2, 64, len(group)) as ctx:
                members = [Generation(ctx, seq, prompts[i], greedy) for seq, i in enumerate(group)]
                for _ in generate(ctx, members):
                    pass
                found += [member.text for member in members]
        return found

    assert texts([[0], [1], [2]]) == texts([[0, 1, 2]])


@needs_ours
@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0", "bf16", "f32"])
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_more_threads_than_there_is_work_for(tiny_model: Callable[..., Model], kv_type: str, threads: int) -> None:
    tiny = tiny_model("llama", head_dim=32)
    tokens = list(range(5, 40))
    seen = []
    for name in (kernels.OFF, DEFAULT):
        kernels.use(name)
        with Context(tiny, 64, 3, kv_type=kv_type, flash_attn=True, threads=threads) as ctx:
            for seq in range(3):
                ctx.prefill(seq, tokens)
            ctx.decode([Token(7, len(tokens), seq, logits=True) for seq in range(3)])
            seen.append(ctx.logits(2))
    assert seen[0] == pytest.approx(seen[1], abs=0.05)


@needs_ours
def test_contexts_of_several_threads(smollm2_path: Path) -> None:
    """Each with a model of its own, all at once, while others change what is used."""
    want: list[Floats] = []
    found: list[Floats] = []
    errors: list[Exception] = []
    done = threading.Event()

    def work(keep: list[Floats]) -> None:
        model = Model.load(smollm2_path)
        try:
            for _ in range(4):
                keep.append(logits(model, list(range(100, 120)), flash_attn=True))
        except Exception as e:
            errors.append(e)
        finally:
            model.close()

    def change() -> None:
        while not done.is_set():
            for name in [kernels.OFF, *OURS]:
                kernels.use(name)

    work(want)
    threads = [threading.Thread(target=work, args=(found,)) for _ in range(3)]
    changer = threading.Thread(target=change)
    for thread in [*threads, changer]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    changer.join()
    assert not errors
    assert len(found) == 12
    for got in found:
        assert np.sqrt(((got - want[0]) ** 2).mean()) < 0.2


@needs_ours
def test_somebody_elses_llama_has_them_too(smollm2_path: Path) -> None:
    llama = llama_cpp.Llama(str(smollm2_path), n_ctx=128, verbose=False)
    try:
        texts, counts = [], []
        for name in (kernels.OFF, DEFAULT):
            kernels.use(name)
            before = kernels.computed()
            tokens = llama.tokenize(b"The capital of France is")
            texts.append(llama.detokenize([t for t, _ in zip(llama.generate(tokens, temp=0), range(4), strict=False)]))
            counts.append(kernels.computed() - before)
            llama.reset()  # type: ignore[no-untyped-call]
        assert texts[0] == texts[1]
        assert counts[0] == 0
        assert counts[1] > 4 * 30
    finally:
        llama.close()


@needs_ours
def test_with_a_lora(tiny: Model, tmp_path: Path) -> None:
    adapter = Adapter(write_adapter(tmp_path / "a.gguf"), tiny)
    tokens, seen = list(range(5, 30)), []
    for name in (kernels.OFF, DEFAULT):
        kernels.use(name)
        with context_with(adapter, tiny, 64, flash_attn=True) as ctx:
            ctx.prefill(0, tokens)
            seen.append(ctx.logits())
    adapter.close()
    assert seen[0] == pytest.approx(seen[1], abs=0.05)


@needs_ours
def test_a_computation_that_is_broken_off(smollm2: Model) -> None:
    """The next one is as if nothing had been."""
    calls = 0

    @llama_cpp.ggml_abort_callback  # type: ignore[untyped-decorator]
    def abort(_: ctypes.c_void_p) -> bool:
        nonlocal calls
        calls += 1
        return calls == 100

    tokens = list(range(200, 240))
    with Context(smollm2, 64) as ctx:
        llama_cpp.llama_set_abort_callback(ctx.pointer, abort, None)
        with pytest.raises(EngineError):
            ctx.prefill(0, tokens)
        assert calls == 100
        ctx.clear()
        ctx.prefill(0, tokens)
        again = ctx.logits()
    with Context(smollm2, 64) as ctx:
        ctx.prefill(0, tokens)
        assert np.array_equal(ctx.logits(), again)


@needs_ours
def test_weights_that_llama_cpp_has_repacked(smollm2_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "q4_0.gguf"
    words = llama_cpp.llama_model_quantize_default_params()
    words.ftype, words.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    assert llama_cpp.llama_model_quantize(str(smollm2_path).encode(), str(path).encode(), words) == 0
    model = Model.load(path)
    try:
        seen = []
        for name, flash in ((kernels.OFF, False), (kernels.OFF, True), (DEFAULT, True)):
            kernels.use(name)
            seen.append(logits(model, list(range(5, 30)), flash_attn=flash))
        distances = [float(np.sqrt(((seen[0] - other) ** 2).mean())) for other in seen[1:]]
        assert distances[1] < 2 * distances[0]
    finally:
        model.close()


# --- which are used ---


@needs_ours
def test_flash_attention_is_better_with_ours_only(smollm2: Model) -> None:
    kernels.use(DEFAULT)
    assert prefers_flash_attn(smollm2, "f16")
    kernels.use(kernels.OFF)
    assert prefers_flash_attn(smollm2, "f16") == bool(llama_cpp.llama_supports_gpu_offload())
    assert prefers_flash_attn(smollm2, "q8_0"), "a quantised V needs it"


def test_names_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose one of off"):
        kernels.use("sse")
    done = pyps("doctor", env={"PYPS_KERNELS": "sse"})
    assert done.returncode == 2
    assert "PYPS_KERNELS=sse: there are no kernels 'sse': choose one of off" in done.stderr
    done = pyps("run", "task", "--branch", "a", env={"PYPS_KERNELS": "AVX2"})
    assert done.returncode == 2
    assert "PYPS_KERNELS=AVX2" in done.stderr


def test_kernels_that_this_cpu_cannot_run_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CPU has none of some: what the CPU says is changed here, not what is done about it."""

    class Other:
        def __getattr__(self, name: str) -> Any:
            return getattr(_kernels, name)

        def runs_here(self, name: str) -> bool:
            return False

    monkeypatch.setattr(kernels, "_kernels", Other())
    for name in kernels.names():
        with pytest.raises(InputError, match=f"this CPU cannot run the kernels '{name}'"):
            kernels.use(name)


@pytest.mark.parametrize("name", [kernels.OFF, *OURS])
def test_the_variable_and_the_doctor(name: str) -> None:
    done = pyps("doctor", "--json", env={"PYPS_KERNELS": name})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kernels"]["in_use"] == name
    if name == kernels.OFF:
        assert report["kernels"]["why_off"] == "PYPS_KERNELS=off"
    else:
        assert report["kernels"]["types"]["q8_0"] == name
        assert report["kernels"]["types"]["f16"].startswith("llama.cpp")
