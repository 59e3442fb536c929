"""Contexts: llama.cpp's sequences with their KV cache, and decoding."""

import ctypes
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

from pyps.engine import kernels, log, native
from pyps.engine.model import Model
from pyps.engine.tuned import tuned
from pyps.errors import EngineError, InputError, RefusedError

# types that K and V can have in a cache and a join can move
KV_TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in ("f16", "bf16", "f32", "q8_0", "q4_0")}
_QUANTISED = ("q8_0", "q4_0")

MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ

_BLOCK = 32  # values that q8_0 and q4_0 quantise together

_CELL_BYTES = 64  # what llama.cpp notes about a cell, about: positions, sequences


def split_kv_type(kv_type: str) -> tuple[str, str]:
    """Return the types of K and V from a type for both ("f16") or one each ("q8_0/f16"). Raises InputError."""
    types = kv_type.split("/")
    if len(types) > 2 or not set(types) <= KV_TYPES.keys():
        raise InputError(
            f"KV type {kv_type!r} is not supported: choose one of {', '.join(KV_TYPES)}, or one for K and one for V "
            f"(q8_0/f16)"
        )
    return types[0], types[-1]


def needs_flash_attn(kv_type: str) -> bool:
    """Return whether a cache of this type needs flash attention: llama.cpp has a quantised V only with it."""
    return split_kv_type(kv_type)[1] in _QUANTISED


def prefers_flash_attn(model: Model, kv_type: str) -> bool:
    """Return whether a context that decodes should have flash attention.

    With our kernels (kernels.py) and on a GPU it is better for every batch; on a CPU without them it is much slower for
    short ones. An f32 cache is for exactness, and llama.cpp's flash attention rounds that to f16.
    """
    exact = "f32" in split_kv_type(kv_type)
    ours = kernels.in_use() != kernels.OFF and model.head_dim % kernels.HEAD_MULTIPLE == 0 and not exact
    return ours or needs_flash_attn(kv_type) or bool(llama_cpp.llama_supports_gpu_offload())


def round_up(n_ctx: int) -> int:
    """Return how many cells llama.cpp gives a sequence that is to have n_ctx."""
    return -(-n_ctx // 256) * 256


@dataclass(frozen=True)
class Token:
    """One token to decode. Its logits are computed only if asked for."""

    id: int
    pos: int
    seq: int
    logits: bool = False


class Context:
    """Sequences 0 … n_seq-1 of one model, each with a stream of `n_ctx` cells of its own (a unified cache shares them).

    A stream of its own keeps a sequence's cells contiguous and its attention off the other sequences' cells. Not
    thread-safe. Close it (or use `with`).

    Args:
        model: Closing it closes the context.
        n_ctx: Cells of each sequence; llama.cpp rounds them up to a multiple of 256.
        n_seq: Number of sequences, 1 to 256.
        kv_type: Type of K and V, a key of KV_TYPES; or one of each: "q8_0/f16". A quantised V needs flash_attn.
        flash_attn: Whether to use flash attention; None for what is faster here (`prefers_flash_attn`).
        threads: Threads that compute; None for what suits the model on this machine (tuned.py).
        unified: Whether all sequences share one buffer instead of having a stream each.
        n_batch: Most tokens that are computed at once; None likewise.
        n_logits: Most tokens of one batch whose logits may be asked for; None for n_seq. Memory grows with it.
        swa_full: Whether layers with a sliding window keep all their cells, as a join of whole branches needs. If not,
            they keep about a window.

    Raises:
        InputError: A size or type is not possible, or there is not enough memory.
        RefusedError: The model cannot generate text.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        n_seq: int = 1,
        *,
        kv_type: str = "f16",
        flash_attn: bool | None = None,
        threads: int | None = None,
        unified: bool = False,
        n_batch: int | None = None,
        n_logits: int | None = None,
        swa_full: bool = True,
    ) -> None:
        self._pointer: llama_cpp.llama_context_p | None = None
        type_k, type_v = split_kv_type(kv_type)
        if needs_flash_attn(kv_type) and flash_attn is False:
            raise InputError(f"KV type {kv_type!r} needs flash attention (flash_attn=True)")
        if not 1 <= n_seq <= MAX_SEQUENCES:
            raise InputError(f"a context can hold 1 to {MAX_SEQUENCES} sequences, not {n_seq}")
        if not 1 <= n_ctx * n_seq < 2**31:
            raise InputError(f"a context of {n_ctx} cells for each of {n_seq} sequences is not possible")
        if threads is not None and not 1 <= threads <= 512:
            raise InputError(f"threads must be between 1 and 512, not {threads}")
        self.model = model
        self.n_seq = n_seq
        self.kv_type = kv_type
        model.check_open()

        cells = n_ctx if unified else round_up(n_ctx) * n_seq
        _check_memory(model, cells, kv_type)
        if type_k in _QUANTISED and model.head_dim % _BLOCK:
            # with flash attention llama.cpp says so itself, without it would abort
            raise InputError(
                f"{model.name} cannot have {type_k} keys: heads of {model.head_dim} channels, no multiple of {_BLOCK}"
            )

        params = llama_cpp.llama_context_default_params()
        params.n_ctx = cells
        params.n_seq_max = n_seq
        params.kv_unified = unified
        params.n_batch = params.n_ubatch = n_batch or tuned(model).batch
        params.n_outputs_max = max(n_seq, n_logits or 0)
        params.n_threads = params.n_threads_batch = threads or tuned(model).threads
        params.type_k, params.type_v = KV_TYPES[type_k], KV_TYPES[type_v]
        params.flash_attn_type = int(prefers_flash_attn(model, kv_type) if flash_attn is None else flash_attn)
        params.no_perf = True
        params.swa_full = swa_full
        with log.captured():
            self._pointer = llama_cpp.llama_init_from_model(model.pointer, params)
            if not self._pointer:
                raise InputError(
                    f"llama.cpp cannot make a context of {n_seq} x {n_ctx} cells ({kv_type}) for {model.name}: "
                    f"{log.last_words() or 'not enough memory?'}"
                )
        model.contexts.add(self)
        self._memory = llama_cpp.llama_get_memory(self._pointer)
        if not self._memory:
            self.close()
            raise RefusedError(f"'{model.arch}' models have no memory, so they cannot generate text")
        self.n_ctx = int(llama_cpp.llama_n_ctx_seq(self._pointer))
        self.n_batch = int(llama_cpp.llama_n_batch(self._pointer))
        self._max_logits = int(params.n_outputs_max)

    def __enter__(self) -> "Context":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and its cache."""
        # a context whose borrowed model is gone cannot be freed any more
        if self._pointer is not None and self.model.is_open:
            with log.captured():
                llama_cpp.llama_free(self._pointer)
        self._pointer = None

    def __del__(self) -> None:
        # only a safety net: at interpreter exit llama_cpp may be gone
        if getattr(self, "_pointer", None) is not None and llama_cpp is not None:
            self.close()

    @property
    def pointer(self) -> llama_cpp.llama_context_p:
        """The llama_context for llama_cpp's functions. Raises InputError once closed."""
        if self._pointer is None:
            raise InputError("the context is closed")
        self.model.check_open()
        return self._pointer

    @property
    def address(self) -> int:
        """The llama_context's address, for the extension. Raises InputError once closed."""
        return int(ctypes.cast(self.pointer, ctypes.c_void_p).value or 0)

    def _check_seq(self, seq: int) -> None:
        """Raise InputError for a sequence or a context that is not there: llama.cpp would abort the process."""
        self.pointer  # noqa: B018
        if not 0 <= seq < self.n_seq:
            raise InputError(f"sequence {seq} does not exist: this context has sequences 0 to {self.n_seq - 1}")

    def end(self, seq: int) -> int:
        """Return the position after the last of the sequence; 0 if it is empty."""
        self._check_seq(seq)
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, seq)) + 1

    def n_cells(self, seq: int) -> int:
        """Return the cells that the sequence takes: more than positions where spans have been joined."""
        self._check_seq(seq)
        return int(native.n_cells(self.address, seq))

    def remove(self, seq: int, p0: int = 0, p1: int = -1) -> None:
        """Forget positions [p0, p1) of the sequence; p1 = -1 means to the end."""
        self._check_seq(seq)
        llama_cpp.llama_memory_seq_rm(self._memory, seq, p0, p1)

    def copy(self, src: int, dst: int) -> None:
        """Make sequence dst a copy of src: llama.cpp copies the whole stream, whatever its length."""
        self._check_seq(src)
        self._check_seq(dst)
        llama_cpp.llama_memory_seq_cp(self._memory, src, dst, -1, -1)

    def clear(self) -> None:
        """Forget all sequences."""
        for seq in range(self.n_seq):
            self.remove(seq)

    def decode(self, tokens: Sequence[Token]) -> None:
        """Compute the tokens, which must continue their sequences without gaps, in batches of up to n_batch.

        Afterwards `logits(i)` and samplers see the tokens of the last batch only.

        Raises:
            InputError: A sequence is full, or the tokens do not continue it.
            EngineError: llama.cpp failed.
        """
        for chunk in _even_chunks(tokens, self.n_batch):
            self._decode_batch(chunk)

    def _decode_batch(self, tokens: Sequence[Token]) -> None:
        pointer = self.pointer
        n = len(tokens)
        if sum(t.logits for t in tokens) > self._max_logits:
            raise InputError(f"at most {self._max_logits} tokens of a batch can have logits in this context (n_logits)")
        for t in tokens:
            self._check_seq(t.seq)
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, t in enumerate(tokens):
                batch.token[i] = t.id
                batch.pos[i] = t.pos
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = t.seq
                batch.logits[i] = t.logits
            with log.captured():
                status = llama_cpp.llama_decode(pointer, batch)
                words = log.last_words()
        finally:
            llama_cpp.llama_batch_free(batch)
        if status == 0:
            return
        if status == 1:
            raise InputError(f"the context is full: {self.n_ctx} cells for each sequence; make it larger (n_ctx)")
        if status == -1:
            raise InputError(f"these tokens cannot be decoded here: {words or 'invalid batch'}")
        raise EngineError(f"llama.cpp could not decode (status {status}): {words or 'no reason given'}")

    def decode_at(self, seq: int, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Compute tokens at any positions of a sequence, in the order of the positions, without logits.

        Each attends to every cell of the sequence that is not behind it: to joined ones, and to the other tokens. The
        logits of the last `decode` stay. All or nothing.

        Args:
            seq: The sequence.
            tokens: The tokens [n].
            positions: The position of each [n]; several may share one, as after a join.

        Raises:
            RefusedError: Caches of this model cannot be joined.
            InputError: There is no room, or no such sequence, token or position.
            EngineError: llama.cpp failed.
        """
        self._check_seq(seq)
        pairs = list(zip(tokens, positions, strict=True))
        if any(not -(2**31) <= number < 2**31 for pair in pairs for number in pair):
            raise InputError("tokens and positions are 32-bit numbers")
        with log.captured():
            native.decode_at(self.address, seq, pairs)

    def warm_up(self) -> None:
        """Compute something and forget it, so that what is measured next pays for nothing but itself.

        With the first token llama.cpp sets up a LoRA and memory gets its pages; with the first prompt a GPU loads what
        reads prompts.
        """
        self.prefill(0, [0] * (32 if llama_cpp.llama_supports_gpu_offload() else 1))
        self.clear()

    def prefill(self, seq: int, tokens: Sequence[int]) -> None:
        """Append tokens to a sequence; the last one's logits are at index -1."""
        start = self.end(seq)
        last = len(tokens) - 1
        self.decode([Token(id, start + i, seq, logits=i == last) for i, id in enumerate(tokens)])

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """Return a copy of the logits [n_vocab] of the last batch's index-th token; InputError if it has none."""
        with log.captured():
            values = llama_cpp.llama_get_logits_ith(self.pointer, index)
        if not values:
            raise InputError(f"token {index} of the last batch has no logits")
        return np.ctypeslib.as_array(values, shape=(self.model.n_vocab,)).copy()

    def synchronize(self) -> None:
        """Wait until everything that was asked for is computed."""
        llama_cpp.llama_synchronize(self.pointer)


def _check_memory(model: Model, cells: int, kv_type: str) -> None:
    """Raise InputError if K and V alone do not fit into this machine: llama.cpp would try, and be killed for it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = cells * (cell_bytes(model, kv_type) + _CELL_BYTES)
    if size > physical:
        raise InputError(
            f"{cells:,} cells of K and V ({kv_type}) need {size / 1e9:,.0f} GB; this machine has "
            f"{physical / 1e9:,.0f} GB: use fewer or shorter sequences"
        )


def cell_bytes(model: Model, kv_type: str) -> int:
    """Return the bytes of one cell of a cache of this type: K and V of all layers."""
    sizes = [gguf.GGML_QUANT_SIZES[KV_TYPES[name]] for name in split_kv_type(kv_type)]
    return sum(model.n_layer * model.n_embd_kv * size // block for block, size in sizes)


def _even_chunks(tokens: Sequence[Token], most: int) -> Iterable[Sequence[Token]]:
    """Yield chunks of nearly equal size: with flash attention a short last one is many times slower than a long one."""
    n_chunks = -(-len(tokens) // most)
    start = 0
    for i in range(n_chunks):
        size = (len(tokens) - start) // (n_chunks - i)
        yield tokens[start : start + size]
        start += size
