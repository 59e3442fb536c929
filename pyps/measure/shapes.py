"""Models of a usual shape with random weights, to measure speed without a download. What they say means nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from pyps.errors import InputError

_Q8_0 = gguf.GGMLQuantizationType.Q8_0
_BLOCK, _BLOCK_BYTES = gguf.GGML_QUANT_SIZES[_Q8_0]


@dataclass(frozen=True)
class Shape:
    """Of a Llama model, its output sharing the embedding's weights."""

    layers: int
    channels: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int


# Llama 3.2 1B and 3B, Llama 3.1 8B; the vocabulary is the default model's
SHAPES = {
    "1b": Shape(16, 2048, 8192, 32, 8, 64),
    "3b": Shape(28, 3072, 8192, 24, 8, 128),
    "8b": Shape(32, 4096, 14336, 32, 8, 128),
}


def write_shape(path: Path, shape: Shape, tokenizer: Path, report: Callable[[float], None] = lambda done: None) -> None:
    """Write a Q8_0 model of a shape. It is written piece by piece: 8b has as many gigabytes.

    Args:
        tokenizer: a GGUF model whose vocabulary and chat template it gets.
        report: called with the fraction that is done.

    Raises:
        InputError: the disk has no room for it.
    """
    reader = gguf.GGUFReader(tokenizer)
    n_vocab = len(reader.fields["tokenizer.ggml.tokens"].data)
    tensors = _tensors(shape, n_vocab)
    try:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name("random weights")
        writer.add_context_length(131072)
        writer.add_embedding_length(shape.channels)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.feed_forward)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(500000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        for key, field in reader.fields.items():
            if key.startswith("tokenizer."):
                writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:2])
        for name, (rows, columns) in tensors.items():
            if rows == 1:
                writer.add_tensor_info(name, (columns,), np.dtype(np.float32), 4 * columns)
            else:
                size = (rows, columns // _BLOCK * _BLOCK_BYTES)
                writer.add_tensor_info(name, size, np.dtype(np.uint8), rows * size[1], raw_dtype=_Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        blocks = _random_blocks()
        total, done = sum(r * c for r, c in tensors.values()), 0
        for rows, columns in tensors.values():
            if rows == 1:
                writer.write_tensor_data(np.ones(columns, np.float32))
            else:
                values = np.resize(blocks, (rows, columns // _BLOCK * _BLOCK_BYTES))
                # Q8_0's scales, for outputs about as large as the inputs
                scales = values.reshape(rows, -1, _BLOCK_BYTES)[:, :, :2]
                scales[:] = np.array([1 / 64 / columns**0.5], np.float16).view(np.uint8)
                writer.write_tensor_data(values)
            done += rows * columns
            report(done / total)
        writer.close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}") from None


def _tensors(shape: Shape, n_vocab: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of each; norms have one row."""
    s = shape
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    found = {"token_embd.weight": (n_vocab, s.channels), "output_norm.weight": (1, s.channels)}
    for i in range(s.layers):
        found |= {
            f"blk.{i}.attn_norm.weight": (1, s.channels),
            f"blk.{i}.attn_q.weight": (q, s.channels),
            f"blk.{i}.attn_k.weight": (kv, s.channels),
            f"blk.{i}.attn_v.weight": (kv, s.channels),
            f"blk.{i}.attn_output.weight": (s.channels, q),
            f"blk.{i}.ffn_norm.weight": (1, s.channels),
            f"blk.{i}.ffn_gate.weight": (s.feed_forward, s.channels),
            f"blk.{i}.ffn_up.weight": (s.feed_forward, s.channels),
            f"blk.{i}.ffn_down.weight": (s.channels, s.feed_forward),
        }
    return found


def _random_blocks() -> NDArray[np.uint8]:
    """Some of Q8_0, again and again the same: speed does not depend on what they are."""
    return np.random.default_rng(0).integers(0, 256, 30000 * _BLOCK_BYTES, np.uint8)
