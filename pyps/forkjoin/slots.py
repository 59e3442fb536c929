"""Branches on disk: the K and V of their cells, tokens and texts, of many branches in one file.

A GGUF file, so that any GGUF reader shows what is inside; after it, the SHA-256 of all of it. Of tensors it has

    tokens, positions   int32 [cells]       of all branches, one after the other
    blk.N.k, blk.N.v    [cells, channels]   of layer N (counted among those with K and V), a row a cell, of the cache's
                                            own type: quantised ones as the cache stores them, Hadamard and all

and of metadata the model's identity, the caches' type, and the branches as JSON. Nothing in a file is believed: its
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
from pyps.engine.context import KV_TYPES, MAX_SEQUENCES, Context, needs_flash_attn, split_kv_type
from pyps.engine.gguf_file import check_gguf, open_gguf
from pyps.engine.model import Model
from pyps.engine.positions import check_joinable
from pyps.errors import InputError
from pyps.forkjoin.branches import Branches, BranchResult, Cached

_TYPE = "pyps-branches"
_VERSION = 1
_HASH_SIZE = 32


class _Saved(BaseModel):
    """One branch, as the metadata has it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    prompt: str
    text: str
    tokens: int = Field(ge=0)
    finish_reason: Literal["stop", "length", "error"]


_SAVED = TypeAdapter(list[_Saved])


@dataclass(frozen=True)
class Slots:
    """What a file holds. Arrays are views of the file, not copies.

    Attributes:
        path: the file.
        model, arch, fingerprint: of the model it was written with; the last two must be those of the one that loads it.
        kv_type: of the caches, as `pyps run --kv-type` takes it.
        hadamard: sizes of the matrices that K and V of each cache are multiplied by; 0 for none.
        long: whether positions are encoded for a long context (Model.long_context).
        branches: name, prompt, text and number of tokens of each, in the order of their cells.
        tokens, positions: int32 [cells] of all branches.
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
        """Where a branch's rows are in all arrays."""
        start = sum(b.tokens for b in self.branches[:branch])
        return slice(start, start + self.branches[branch].tokens)

    @property
    def n_bytes(self) -> int:
        """Of K and V."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the object that `pyps slots --json` prints."""
        return {
            "file": str(self.path),
            "model": self.model,
            "arch": self.arch,
            "fingerprint": self.fingerprint,
            "kv_type": self.kv_type,
            "layers": len(self.layers),
            "cells": len(self.tokens),
            "bytes": self.n_bytes,
            "branches": [_known(b) for b in self.branches],
        }


def write_slots(path: Path, branches: Sequence[Branches]) -> None:
    """All these branches into one file, whole or not at all.

    Raises:
        InputError: there are none, they are of several models or cache types, or the file cannot be written.
    """
    cached = [(b.ctx, c) for b in branches for c in b.cached]
    if not cached:
        raise InputError("there are no branches to save")
    ctx = cached[0][0]
    for other, _ in cached:
        if other.model is not ctx.model or other.kv_type != ctx.kv_type or _is_long(other) != _is_long(ctx):
            raise InputError("branches of several models, or of caches of several types, do not go into one file")
    spans = [native.read_span(x.address, c.seq, *span) for x, c in cached for span in c.spans]
    writer = gguf.GGUFWriter(None, _TYPE)
    writer.add_type(_TYPE)
    writer.add_uint32("pyps.version", _VERSION)
    writer.add_string("pyps.model.name", ctx.model.name)
    writer.add_string("pyps.model.arch", ctx.model.arch)
    writer.add_string("pyps.model.fingerprint", ctx.model.fingerprint)
    writer.add_string("pyps.kv_type", ctx.kv_type)
    writer.add_array("pyps.hadamard", native.hadamard(ctx.address))
    writer.add_bool("pyps.long", _is_long(ctx))
    saved = [_Saved(**_known(c.result) | {"tokens": len(c.tokens)}) for _, c in cached]
    writer.add_string("pyps.branches", _SAVED.dump_json(saved).decode())
    if spans:
        ids = np.array([t for _, c in cached for t in c.tokens], np.int32)
        writer.add_tensor("tokens", ids)
        writer.add_tensor("positions", np.concatenate([np.array(pos, np.int32) for pos, _ in spans]))
        types = [KV_TYPES[name] for name in split_kv_type(ctx.kv_type)]
        for layer in range(len(spans[0][1])):
            for name, i in (("k", 0), ("v", 1)):
                rows = np.concatenate([layers[layer][i] for _, layers in spans])
                writer.add_tensor(f"blk.{layer}.{name}", rows, raw_dtype=types[i])
    partial = path.with_name(path.name + ".part")
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with partial.open("ab") as file:
            file.write(_hash(partial, partial.stat().st_size))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written (is the disk full?): {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises InputError if branches could not be saved there: better before they are generated than after."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file to save to")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: the folder cannot be written to")


def read_slots(path: Path) -> Slots:
    """Opens a file and checks all that can be checked without the model. Raises InputError."""
    check_gguf(path, "branches")
    size = path.stat().st_size - _HASH_SIZE
    if size < 0 or _hash(path, size) != _tail(path):
        raise InputError(f"{path}: the file is damaged or cut off, or no file of branches (its hash is another)")
    with open_gguf(path, "branches") as reader:

        def value(key: str, type_: type) -> Any:
            field = reader.get_field(key)
            found = field.contents() if field else None
            if type(found) is not type_:
                raise InputError(f"not a file of branches: {key} is missing or no {type_.__name__}")
            return found

        if value("general.type", str) != _TYPE or value("pyps.version", int) != _VERSION:
            raise InputError("not a file of branches, or one of a newer version of pyps")
        kv_type = value("pyps.kv_type", str)
        types = [KV_TYPES[name] for name in split_kv_type(kv_type)]
        hadamard = value("pyps.hadamard", list)
        if not all(type(n) is int for n in hadamard):
            raise InputError("pyps.hadamard is not a list of numbers")
        results = tuple(BranchResult(**b.model_dump()) for b in _SAVED.validate_json(value("pyps.branches", str)))
        if not 1 <= len(results) <= MAX_SEQUENCES:
            raise InputError(f"{len(results)} branches; 1 to {MAX_SEQUENCES} are possible")
        n = sum(r.tokens for r in results)
        tensors = {t.name: t for t in reader.tensors}

        def array(name: str, type_: gguf.GGMLQuantizationType) -> NDArray[Any]:
            tensor = tensors.pop(name)
            if tensor.tensor_type != type_ or tensor.data.shape[0] != n:
                raise InputError(f"{name} should be {type_.name} of {n} rows")
            return tensor.data

        tokens = positions = np.zeros(0, np.int32)
        layers = []
        if n:
            tokens = array("tokens", gguf.GGMLQuantizationType.I32)
            positions = array("positions", gguf.GGMLQuantizationType.I32)
            if tokens.ndim != 1 or positions.ndim != 1 or tokens.min() < 0 or positions.min() < 0:
                raise InputError("tokens and positions should be numbers from 0 on, one a cell")
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
            path,
            value("pyps.model.name", str),
            value("pyps.model.arch", str),
            value("pyps.model.fingerprint", str),
            kv_type,
            hadamard,
            value("pyps.long", bool),
            results,
            tokens,
            positions,
            layers,
        )
        for i in range(len(results)):
            here = positions[slots.cells(i)].astype(np.int64)
            if (np.diff(here) < 0).any():
                raise InputError(f"the positions of branch {i + 1} do not rise")
        return slots


def load_slots(slots: Slots, model: Model, threads: int | None = None) -> Branches:
    """The branches in a context of their own, as if they had been generated there.

    Raises:
        InputError: they are of another model, or do not fit into this machine.
        RefusedError: this model's caches cannot be joined.
    """
    check_joinable(model)
    mine = model.arch, model.fingerprint
    if mine != (slots.arch, slots.fingerprint):
        raise InputError(
            f"{slots.path} was written with {slots.model} ({slots.arch}): its caches mean nothing to {model.name}"
        )
    lengths = [b.tokens for b in slots.branches]
    limit = model.long_context
    # one buffer for all, as branches may be of any length; but LongRoPE goes by the cells that a sequence has
    n_ctx = max(lengths, default=1) if limit else sum(lengths)
    ctx = Context(
        model,
        max(n_ctx, 1, limit + 1 if slots.long else 1),
        len(lengths),
        kv_type=slots.kv_type,
        flash_attn=needs_flash_attn(slots.kv_type),
        threads=threads,
        unified=not limit,
    )
    try:
        if _is_long(ctx) != slots.long:
            raise InputError(f"{slots.path}: its branches are longer than what their positions are encoded for")
        if native.hadamard(ctx.address) != slots.hadamard:
            raise InputError(f"{slots.path}: its caches are stored in another way than this llama.cpp does")
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


# Of the number that carries the magnitude: its size, which bits are its exponent, and from where on they mean 2^15 or
# more, infinity, or no number. Of quantised types that is the scale of a block; there from 2^8 on.
_LARGE: dict[gguf.GGMLQuantizationType, tuple[type, int, int]] = {
    gguf.GGMLQuantizationType.F16: (np.uint16, 0x7C00, 0x7800),
    gguf.GGMLQuantizationType.BF16: (np.uint16, 0x7F80, 0x4700),
    gguf.GGMLQuantizationType.F32: (np.uint32, 0x7F800000, 0x47000000),
    gguf.GGMLQuantizationType.Q8_0: (np.uint16, 0x7C00, 0x5C00),
    gguf.GGMLQuantizationType.Q4_0: (np.uint16, 0x7C00, 0x5C00),
}


def _plausible(rows: NDArray[Any], type_: gguf.GGMLQuantizationType) -> bool:
    """False if there is anything that could become infinite, or no number, on its way through a join."""
    unsigned, exponent, large = _LARGE[type_]
    values = rows.view(np.uint8)
    if type_ in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
        values = np.ascontiguousarray(values.reshape(-1, gguf.GGML_QUANT_SIZES[type_][1])[:, :2])
    return bool((values.view(unsigned) & exponent).max() < large)


def _spans(positions: list[int]) -> tuple[tuple[int, int], ...]:
    """Of rising positions: [start, end) of each stretch without a gap."""
    cuts = [i for i in range(1, len(positions)) if positions[i] - positions[i - 1] > 1]
    parts = zip([0, *cuts], [*cuts, len(positions)], strict=True)
    return tuple((positions[a], positions[b - 1] + 1) for a, b in parts) if positions else ()


def _known(result: BranchResult) -> dict[str, Any]:
    """What a file has of a result. Of texts, what is no Unicode (an argument's stray bytes) is replaced."""
    known = {k: v for k, v in asdict(result).items() if k in _Saved.model_fields}
    return {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in known.items()}


def _bytes(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """[cells, bytes]."""
    return np.ascontiguousarray(rows).view(np.uint8)


def _is_long(ctx: Context) -> bool:
    return bool(ctx.model.long_context) and ctx.n_ctx > ctx.model.long_context


def _hash(path: Path, size: int) -> bytes:
    """SHA-256 of the first size bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(size, 1 << 20))):
            found.update(chunk)
            size -= len(chunk)
    return found.digest()


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-_HASH_SIZE, os.SEEK_END)
        return file.read()
