"""Branches on disk: one file holds the texts, the tokens and the cells' K and V of many branches.

It is a GGUF file, so that any GGUF reader shows what is inside, followed by the SHA-256 of all of it. Its tensors are

    tokens, positions   int32 [cells]       of all branches, one after the other
    blk.N.k, blk.N.v    [cells, channels]   of layer N (counted among those with K and V), one row per cell, of the
                                            cache's own type: quantised ones as the cache stores them, after Hadamard

and its metadata are the model's identity, the caches' type, and the branches as JSON. Nothing in a file is trusted: its
hash, then every name, type and size are checked before anything is handed to llama.cpp.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from pyps.engine import native
from pyps.engine.context import KV_TYPES, MAX_SEQUENCES, Context, split_kv_type
from pyps.engine.gguf_file import check_gguf, open_gguf, writing
from pyps.engine.model import Model
from pyps.engine.positions import check_joinable
from pyps.errors import InputError
from pyps.files import check_writable
from pyps.forkjoin.branches import Branches, BranchResult, Cached

_TYPE = "pyps-branches"
_VERSION = 1
_HASH_SIZE = 32


class _Saved(BaseModel):
    """A branch as the metadata describes it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    prompt: str
    text: str
    tokens: int = Field(ge=0)
    finish_reason: Literal["stop", "length", "error"]


_SAVED = TypeAdapter(list[_Saved])


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The content of a file of branches. Arrays are views of the file, not copies.

    Attributes:
        path: The file.
        model: The name of the model that it was written with.
        arch: That model's architecture; the model that loads the file must have the same.
        fingerprint: That model's fingerprint; the model that loads the file must have the same.
        kv_type: The type of the caches, as `pyps run --kv-type` takes it.
        hadamard: The sizes of the matrices that K and V of each cache are multiplied by; 0 for none.
        long: Whether positions are encoded for a long context (Model.long_context).
        branches: Name, prompt, text and number of tokens of each branch, in the order of their cells.
        tokens: int32 [cells] of all branches.
        positions: int32 [cells] of all branches.
        layers: (K, V) of each layer: [cells, channels] of float16 or float32; uint8 [cells, bytes] for other types.
    """

    path: Path
    model: str
    arch: str
    fingerprint: str
    kv_type: str
    hadamard: list[int]
    long: bool
    branches: tuple[BranchResult, ...]
    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    layers: list[tuple[NDArray[Any], NDArray[Any]]]

    def cells(self, branch: int) -> slice:
        """Return where a branch's rows are in all arrays."""
        start = sum(b.tokens for b in self.branches[:branch])
        return slice(start, start + self.branches[branch].tokens)

    @property
    def n_bytes(self) -> int:
        """Bytes of K and V, all layers."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the object that `pyps slots --json` prints."""
        return {
            "file": str(self.path),
            "model": self.model,
            "arch": self.arch,
            "fingerprint": self.fingerprint,
            "kv_type": self.kv_type,
            "layers": len(self.layers),
            "cells": len(self.tokens),
            "bytes": self.n_bytes,
            "branches": [_saved_fields(branch) for branch in self.branches],
        }


def write_slots(path: Path, branches: Sequence[Branches]) -> None:
    """Write branches into one file, whole or not at all.

    Raises:
        InputError: There are no branches, they are of several models or cache types, or no file can be written there.
        MachineError: The disk is full or fails.
    """
    check_writable(path)
    cached = [(b.ctx, c) for b in branches for c in b.cached]
    if not cached:
        raise InputError("there are no branches to save")
    ctx = cached[0][0]
    for other, _ in cached:
        if other.model is not ctx.model or other.kv_type != ctx.kv_type or _is_long(other) != _is_long(ctx):
            raise InputError("branches of several models, or of caches of several types, do not go into one file")
    spans = [native.read_span(source.address, c.seq, *span) for source, c in cached for span in c.spans]
    saved = [_Saved(**_saved_fields(c.result) | {"tokens": len(c.tokens)}) for _, c in cached]
    with writing(path, _TYPE, seal=_append_hash) as writer:
        writer.add_type(_TYPE)
        writer.add_uint32("pyps.version", _VERSION)
        writer.add_string("pyps.model.name", ctx.model.name)
        writer.add_string("pyps.model.arch", ctx.model.arch)
        writer.add_string("pyps.model.fingerprint", ctx.model.fingerprint)
        writer.add_string("pyps.kv_type", ctx.kv_type)
        writer.add_array("pyps.hadamard", native.hadamard(ctx.address))
        writer.add_bool("pyps.long", _is_long(ctx))
        writer.add_string("pyps.branches", _SAVED.dump_json(saved).decode())
        if spans:
            writer.add_tensor("tokens", np.array([token for _, c in cached for token in c.tokens], np.int32))
            writer.add_tensor("positions", np.concatenate([np.array(pos, np.int32) for pos, _ in spans]))
            types = [KV_TYPES[name] for name in split_kv_type(ctx.kv_type)]
            for layer in range(len(spans[0][1])):
                for name, i in (("k", 0), ("v", 1)):
                    rows = np.concatenate([layers[layer][i] for _, layers in spans])
                    writer.add_tensor(f"blk.{layer}.{name}", rows, raw_dtype=types[i])


def read_slots(path: Path) -> Slots:
    """Open a file of branches and check all that can be checked without the model.

    Raises:
        InputError: The file is missing, damaged, of a newer version, or not a file of branches.
    """
    check_gguf(path, "branches")
    size = path.stat().st_size - _HASH_SIZE
    if size < 0 or _hash(path, size) != _tail(path):
        raise InputError(f"{path}: the file is damaged or cut off, or not a file of branches (its hash differs)")
    with open_gguf(path, "branches") as reader:

        def value(key: str, type_: type) -> Any:
            field = reader.get_field(key)
            content = field.contents() if field else None
            if type(content) is not type_:
                raise InputError(f"not a file of branches: {key} is missing or not of type {type_.__name__}")
            return content

        if value("general.type", str) != _TYPE or value("pyps.version", int) != _VERSION:
            raise InputError("not a file of branches, or one of a newer version of pyps")
        kv_type = value("pyps.kv_type", str)
        types = [KV_TYPES[name] for name in split_kv_type(kv_type)]
        hadamard = value("pyps.hadamard", list)
        if not all(type(n) is int for n in hadamard):
            raise InputError("pyps.hadamard is not a list of numbers")
        saved = _SAVED.validate_json(value("pyps.branches", str))
        results = tuple(BranchResult(**branch.model_dump()) for branch in saved)
        if not 1 <= len(results) <= MAX_SEQUENCES:
            raise InputError(f"{len(results)} branches; 1 to {MAX_SEQUENCES} are possible")
        n_cells = sum(result.tokens for result in results)
        tensors = {tensor.name: tensor for tensor in reader.tensors}

        def array(name: str, type_: gguf.GGMLQuantizationType) -> NDArray[Any]:
            tensor = tensors.pop(name)
            if tensor.tensor_type != type_ or tensor.data.shape[0] != n_cells:
                raise InputError(f"{name} should be {type_.name} of {n_cells} rows")
            return tensor.data

        tokens = positions = np.zeros(0, np.int32)
        layers = []
        if n_cells:
            tokens = array("tokens", gguf.GGMLQuantizationType.I32)
            positions = array("positions", gguf.GGMLQuantizationType.I32)
            if tokens.ndim != 1 or positions.ndim != 1 or tokens.min() < 0 or positions.min() < 0:
                raise InputError("tokens and positions should be numbers from 0 on, one per cell")
            for i in range(len(tensors) // 2):
                k, v = array(f"blk.{i}.k", types[0]), array(f"blk.{i}.v", types[1])
                if k.ndim != 2 or v.ndim != 2:
                    raise InputError(f"K and V of layer {i} should have two dimensions")
                if not (_plausible(k, types[0]) and _plausible(v, types[1])):
                    raise InputError(f"K or V of layer {i} has values that no model computes")
                layers.append((k, v))
        if tensors:
            raise InputError(f"{', '.join(sorted(tensors)[:3])}: tensors that do not belong there")
        slots = Slots(
            path=path,
            model=value("pyps.model.name", str),
            arch=value("pyps.model.arch", str),
            fingerprint=value("pyps.model.fingerprint", str),
            kv_type=kv_type,
            hadamard=hadamard,
            long=value("pyps.long", bool),
            branches=results,
            tokens=tokens,
            positions=positions,
            layers=layers,
        )
        for i in range(len(results)):
            steps = np.diff(positions[slots.cells(i)].astype(np.int64))
            if (steps < 0).any():
                raise InputError(f"the positions of branch {i + 1} do not rise")
        return slots


def load_slots(slots: Slots, model: Model, threads: int | None = None) -> Branches:
    """Put branches into a context of their own, as if they had been generated there.

    Args:
        slots: The branches, as read_slots returns them.
        model: A model with the same weights as theirs.
        threads: How many threads the context computes with; None for what suits the machine.

    Raises:
        InputError: The branches are another model's, or do not fit into this machine.
        RefusedError: This model's caches cannot be joined.
    """
    check_joinable(model)
    if (model.arch, model.fingerprint) != (slots.arch, slots.fingerprint):
        raise InputError(
            f"{slots.path} was written with {slots.model} ({slots.arch}): its caches mean nothing to {model.name}"
        )
    lengths = [b.tokens for b in slots.branches]
    limit = model.long_context
    # One buffer for all, since branches may be of any length; but LongRoPE depends on how many cells a sequence has.
    n_ctx = max(lengths, default=1) if limit else sum(lengths)
    ctx = Context(
        model,
        max(n_ctx, 1, limit + 1 if slots.long else 1),
        len(lengths),
        kv_type=slots.kv_type,
        threads=threads,
        unified=not limit,
    )
    try:
        if _is_long(ctx) != slots.long:
            raise InputError(f"{slots.path}: its branches are longer than their positions are encoded for")
        if native.hadamard(ctx.address) != slots.hadamard:
            raise InputError(f"{slots.path}: its caches are stored in another way than this llama.cpp stores them")
        cached = []
        for seq, result in enumerate(slots.branches):
            cells = slots.cells(seq)
            positions = slots.positions[cells].tolist()
            if positions:
                rows = [(_bytes(k[cells]), _bytes(v[cells])) for k, v in slots.layers]
                native.write_span(ctx.address, seq, positions, rows)
            cached.append(Cached(result, seq, _spans(positions), tuple(slots.tokens[cells].tolist())))
    except BaseException:
        ctx.close()
        raise
    return Branches(ctx, cached)


# For the number that carries the magnitude, which is a block's scale in quantised types: an unsigned integer of its
# size, the bits of its exponent, and the exponent from which on it is too large: 2^15, or 2^8 for a scale. Infinity and
# what is not a number have larger exponents still.
_LARGE: dict[gguf.GGMLQuantizationType, tuple[type, int, int]] = {
    gguf.GGMLQuantizationType.F16: (np.uint16, 0x7C00, 0x7800),
    gguf.GGMLQuantizationType.BF16: (np.uint16, 0x7F80, 0x4700),
    gguf.GGMLQuantizationType.F32: (np.uint32, 0x7F800000, 0x47000000),
    gguf.GGMLQuantizationType.Q8_0: (np.uint16, 0x7C00, 0x5C00),
    gguf.GGMLQuantizationType.Q4_0: (np.uint16, 0x7C00, 0x5C00),
}


def _plausible(rows: NDArray[Any], type_: gguf.GGMLQuantizationType) -> bool:
    """Return False if a value could become infinite, or not a number, on its way through a join."""
    unsigned, exponent, large = _LARGE[type_]
    values = rows.view(np.uint8)
    if type_ in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
        values = np.ascontiguousarray(values.reshape(-1, gguf.GGML_QUANT_SIZES[type_][1])[:, :2])
    return bool((values.view(unsigned) & exponent).max() < large)


def _spans(positions: list[int]) -> tuple[tuple[int, int], ...]:
    """Return [start, end) of each stretch without a gap in rising positions."""
    cuts = [i for i in range(1, len(positions)) if positions[i] - positions[i - 1] > 1]
    parts = zip([0, *cuts], [*cuts, len(positions)], strict=True)
    return tuple((positions[a], positions[b - 1] + 1) for a, b in parts) if positions else ()


def _saved_fields(result: BranchResult) -> dict[str, Any]:
    """Return the fields of a result that a file holds, with "?" for what is not Unicode (arguments' stray bytes)."""
    fields = {name: value for name, value in asdict(result).items() if name in _Saved.model_fields}
    return {
        name: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
        for name, value in fields.items()
    }


def _bytes(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Return rows as bytes, [cells, bytes]."""
    return np.ascontiguousarray(rows).view(np.uint8)


def _is_long(ctx: Context) -> bool:
    return bool(ctx.model.long_context) and ctx.n_ctx > ctx.model.long_context


def _append_hash(path: Path) -> None:
    digest = _hash(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(digest)


def _hash(path: Path, size: int) -> bytes:
    """Return the SHA-256 of the first `size` bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(size, 1 << 20))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.digest()


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-_HASH_SIZE, os.SEEK_END)
        return file.read()
