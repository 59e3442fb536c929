"""Looking into caches, and a NumPy model of what a join should do to them."""

from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from pyps.engine import native
from pyps.engine.context import Context, Token


@dataclass
class Cells:
    """One sequence in one layer, ordered by (position, cell): positions [n], rows [n], K [n, n_embd_k], V [n, …]."""

    positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    k_bytes: NDArray[np.uint8]
    v_bytes: NDArray[np.uint8]


def to_float(data: NDArray[np.uint8], kv_type: str) -> NDArray[np.float32]:
    """Values as they are stored: those of a quantised cache may be in the Hadamard domain (see hadamard)."""
    if kv_type == "f32":
        return data.view(np.float32)
    if kv_type == "f16":
        return data.view(np.float16).astype(np.float32)
    if kv_type in ("q8_0", "q4_0"):
        return np.asarray(dequantize(data, GGMLQuantizationType[kv_type.upper()]), np.float32)
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)  # bf16


def hadamard(values: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """Every block of n channels multiplied by the orthonormal Hadamard matrix, its own inverse."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    blocks = values.reshape(len(values), -1, n) @ (matrix / np.sqrt(n))
    return np.asarray(blocks.reshape(values.shape), np.float32)


def quantisation_steps(values: NDArray[np.float32], kv_type: str) -> NDArray[np.float32]:
    """For each value the distance between neighbours when its block of 32 is quantised."""
    blocks = np.abs(values.reshape(-1, 32)).max(axis=1, keepdims=True) / (127 if kv_type == "q8_0" else 8)
    return np.broadcast_to(blocks, (len(blocks), 32)).reshape(values.shape)


def round_to(values: NDArray[np.float32], kv_type: str) -> NDArray[np.float32]:
    """To the nearest value of the type, as storing it in a cache does."""
    if kv_type == "f32":
        return values
    if kv_type == "f16":
        return values.astype(np.float16).astype(np.float32)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


# the largest relative error of storing a value once
EPSILON = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}


def read(ctx: Context, seq: int, layer: int, kv_type: str = "f16") -> Cells:
    positions, rows, k, v = native.read(ctx.address, seq, layer)
    return Cells(np.array(positions), np.array(rows), to_float(k, kv_type), to_float(v, kv_type), k, v)


def fill(ctx: Context, seq: int, n: int, seed: int = 0) -> list[int]:
    """n random tokens appended to a sequence."""
    rng = np.random.default_rng(seed)
    tokens = [int(t) for t in rng.integers(0, 250, n)]
    start = ctx.end(seq)
    ctx.decode([Token(t, start + i, seq) for i, t in enumerate(tokens)])
    return tokens


def rotate(k: NDArray[np.float32], delta: int, head_dim: int, base: float, neox: bool) -> NDArray[np.float32]:
    """RoPE of every head of every row by the same number of positions, in float64."""
    heads = k.reshape(len(k), -1, head_dim).astype(np.float64)
    angles = delta * base ** (-np.arange(0, head_dim, 2) / head_dim)
    cos, sin = np.cos(angles), np.sin(angles)
    out = np.empty_like(heads)
    if neox:
        a, b = heads[..., : head_dim // 2], heads[..., head_dim // 2 :]
        out[..., : head_dim // 2], out[..., head_dim // 2 :] = a * cos - b * sin, a * sin + b * cos
    else:
        a, b = heads[..., ::2], heads[..., 1::2]
        out[..., ::2], out[..., 1::2] = a * cos - b * sin, a * sin + b * cos
    return out.reshape(k.shape).astype(np.float32)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)), np.float64)


def kl(p_logits: NDArray[np.float32], q_logits: NDArray[np.float32]) -> float:
    """KL(p || q) of two next-token distributions, in nats."""
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return float((np.exp(p) * (p - q)).sum())
