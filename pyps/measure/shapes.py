"""Models of a usual shape with random weights, to measure speed without a download. What they say means nothing."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from pyps.engine.find import Progress, no_progress
from pyps.files import check_writable, whole

_Q8_0 = gguf.GGMLQuantizationType.Q8_0
_BLOCK, _BLOCK_BYTES = gguf.GGML_QUANT_SIZES[_Q8_0]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama model whose output shares the embedding's weights."""

    layers: int
    channels: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int


# Llama 3.2 1B and 3B, Llama 3.1 8B; the vocabulary is the default model's
SHAPES = {
    "1b": Shape(layers=16, channels=2048, feed_forward=8192, heads=32, kv_heads=8, head_dim=64),
    "3b": Shape(layers=28, channels=3072, feed_forward=8192, heads=24, kv_heads=8, head_dim=128),
    "8b": Shape(layers=32, channels=4096, feed_forward=14336, heads=32, kv_heads=8, head_dim=128),
}


@contextlib.contextmanager
def temporary_model(name: str, tokenizer: Path, report: Progress = no_progress) -> Iterator[Path]:
    """Yield the file of a model with random weights, which is gone afterwards.

    Args:
        name: A key of SHAPES.
        tokenizer: A GGUF model whose vocabulary and chat template it gets.
        report: Called while the file is written.

    Raises:
        MachineError: The disk has no room for it.
    """
    with tempfile.TemporaryDirectory(prefix="pyps-") as folder:
        path = Path(folder) / f"{name}-random.gguf"
        write_shape(path, SHAPES[name], tokenizer, report)
        yield path


def write_shape(path: Path, shape: Shape, tokenizer: Path, report: Progress = no_progress) -> None:
    """Write a Q8_0 model of a shape, piece by piece: the largest has eight gigabytes.

    Args:
        path: The file to write.
        shape: The model's sizes.
        tokenizer: A GGUF model whose vocabulary and chat template it gets.
        report: Called with the fraction that is done.

    Raises:
        InputError: There is no such folder.
        MachineError: The disk has no room for it.
    """
    check_writable(path, "model")
    reader = gguf.GGUFReader(tokenizer)
    n_vocab = len(reader.fields["tokenizer.ggml.tokens"].data)
    tensors = _tensors(shape, n_vocab)
    with whole(path) as partial, contextlib.closing(gguf.GGUFWriter(partial, "llama")) as writer:
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
            report("writing the model", done / total)


def _tensors(shape: Shape, n_vocab: int) -> dict[str, tuple[int, int]]:
    """Return rows and columns of each tensor; norms have one row."""
    s = shape
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    tensors = {"token_embd.weight": (n_vocab, s.channels), "output_norm.weight": (1, s.channels)}
    for i in range(s.layers):
        tensors |= {
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
    return tensors


def _random_blocks() -> NDArray[np.uint8]:
    """Return blocks of Q8_0, the same ones each time: speed does not depend on what they are."""
    return np.random.default_rng(0).integers(0, 256, 30000 * _BLOCK_BYTES, np.uint8)
