"""What the hardware allows, from the rates measured here.

A computation takes at least the bytes that have to be read over the bandwidth, and at least the operations that have to
be done over their rate: whichever is longer bounds it.
"""

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
    """What a machine can do with a model.

    Attributes:
        read_gb_s: Gigabytes a second that all threads together read from memory.
        compute_gflop_s: Billions of operations a second (a multiply-add is two) at which llama.cpp reads a long prompt.
    """

    read_gb_s: float
    compute_gflop_s: float


def measure_rates(model: Model, kv_type: str = "f16", threads: int | None = None) -> Rates | None:
    """Return the best of some tries, which take about as many seconds; None with a GPU, whose memory is not measured.

    Args:
        model: The model.
        kv_type: Type of K and V in the cache.
        threads: None for what suits the model on this machine.

    Raises:
        InputError: The context cannot be made, as Context says.
    """
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
    """Return the milliseconds that it takes at least to compute some tokens and the last one's logits.

    Weights and cells are read at least once; every token is multiplied with all weights, and with the cells that it
    attends to.

    Args:
        model: The model.
        rates: What the machine can do.
        kv_type: Type of K and V in the cache.
        tokens: Tokens that each sequence gets.
        cells: Cells that each sequence has already.
        sequences: Number of sequences, computed together.
    """
    n_bytes = native.work(model.address)[2] + sequences * _attended(model, cells) * cell_bytes(model, kv_type)
    operations = _operations(model, tokens, cells, sequences)
    return max(n_bytes / (rates.read_gb_s * 1e6), operations / (rates.compute_gflop_s * 1e6))


def _operations(model: Model, tokens: int, cells: int, sequences: int) -> float:
    layers, logits, _ = native.work(model.address)
    channels = int(llama_cpp.llama_model_n_head(model.pointer)) * model.head_dim
    attended = sum(_attended(model, cells + i) for i in range(1, tokens + 1))
    return sequences * (2.0 * layers * tokens + 2.0 * logits + 4.0 * model.n_layer * channels * attended)


def _attended(model: Model, cells: int) -> int:
    """Return the cells that a token attends to in every layer: fewer than there are if layers have a sliding window."""
    return min(cells, int(model.metadata.get(f"{model.arch}.attention.sliding_window") or cells))
