"""What the hardware allows: bytes that have to be read over the bandwidth measured here, and operations that have to be
done over the rate measured here, whichever takes longer."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import llama_cpp
import numpy as np

from pyps.engine import native
from pyps.engine.context import Context, cell_bytes
from pyps.engine.model import Model
from pyps.engine.tuned import tuned

_READ = 2**28  # bytes: far more than a CPU's caches hold
_PROMPT = 512  # tokens: as many as llama.cpp needs to be at its fastest
_TRIES = 3


@dataclass(frozen=True)
class Rates:
    """Gigabytes a second that all threads together read from memory, and billions of operations a second (a
    multiply-add is two) at which llama.cpp reads a long prompt with this model."""

    read_gb_s: float
    compute_gflop_s: float


def measure_rates(model: Model, kv_type: str = "f16", threads: int | None = None) -> Rates | None:
    """The best of some tries, in about as many seconds; None with a GPU, whose memory is not measured. Raises
    InputError as Context does."""
    if llama_cpp.llama_supports_gpu_offload():
        return None
    read = compute = math.inf
    # a long prompt is read fastest with flash attention
    with Context(model, _PROMPT, kv_type=kv_type, flash_attn=True, threads=threads, n_batch=_PROMPT) as ctx:
        for _ in range(_TRIES):
            ctx.clear()
            began = time.perf_counter()
            ctx.prefill(0, [0] * _PROMPT)
            ctx.synchronize()
            compute = min(compute, time.perf_counter() - began)
    n_threads = threads or tuned(model).threads
    parts = np.array_split(np.ones(_READ // 8), n_threads)
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(_TRIES + 1):
            began = time.perf_counter()
            list(pool.map(np.sum, parts))
            read = min(read, time.perf_counter() - began)
    return Rates(_READ / read / 1e9, _operations(model, _PROMPT, 0, 1) / compute / 1e9)


def least_ms(model: Model, rates: Rates, kv_type: str, tokens: int, cells: int, sequences: int = 1) -> float:
    """Milliseconds without which `tokens` more tokens in each of `sequences` sequences of so many cells cannot be
    computed, the last one's logits included: weights and cells are read at least once, and every token is multiplied
    with all weights, and with the cells it attends to."""
    n_bytes = native.work(model.address)[2] + sequences * _attended(model, cells) * cell_bytes(model, kv_type)
    operations = _operations(model, tokens, cells, sequences)
    return max(n_bytes / (rates.read_gb_s * 1e6), operations / (rates.compute_gflop_s * 1e6))


def _operations(model: Model, tokens: int, cells: int, sequences: int) -> float:
    layers, logits, _ = native.work(model.address)
    channels = int(llama_cpp.llama_model_n_head(model.pointer)) * model.head_dim
    attended = sum(_attended(model, cells + i) for i in range(1, tokens + 1))
    return sequences * (2.0 * layers * tokens + 2.0 * logits + 4.0 * model.n_layer * channels * attended)


def _attended(model: Model, cells: int) -> int:
    """Cells that a token attends to in every layer: fewer than there are if layers have a sliding window."""
    return min(cells, int(model.metadata.get(f"{model.arch}.attention.sliding_window") or cells))
