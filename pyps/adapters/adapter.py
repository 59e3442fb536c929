"""Adapters: one GGUF file with the mapper in its metadata and the synthesizer's LoRA as its tensors.

The file is an ordinary llama.cpp LoRA. llama.cpp aborts on a known key of the wrong type and reads no arrays for us, so
the file is read and checked here before llama.cpp gets to see it.
"""

import ctypes
import weakref
from pathlib import Path
from typing import Any

import gguf
import llama_cpp

from pyps.adapters.format import LAYOUTS
from pyps.adapters.mapper import Mapper
from pyps.engine import log
from pyps.engine.context import Context
from pyps.engine.gguf_file import open_gguf
from pyps.engine.model import Model
from pyps.errors import InputError

_STRING, _FLOAT32 = gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32
# what llama_adapter_lora_init reads, with the only type that does not abort the process
_LLAMA_CPP_KEYS = {
    "general.type": _STRING,
    "general.architecture": _STRING,
    "adapter.type": _STRING,
    "adapter.lora.alpha": _FLOAT32,
}
_LORA_TYPES = {gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0")}


class Adapter:
    """An adapter opened for a model. Closing it closes the contexts it is attached to; closing the model closes it.

    Attributes:
        path: the file.
        layout: the prompt layout it was trained for, or None if it does not say.
        in_order: whether spans are placed one after the other, or all at the branch point (layout.place).
        mapper: None means identity.
        lora: llama.cpp's handle, or None if the file has no LoRA tensors.
        warnings: what the user should be told (trained on another model of the same shape, for instance).

    Raises:
        InputError: missing, damaged, for another architecture or size, or with a malformed mapper.
    """

    def __init__(self, path: Path | str, model: Model) -> None:
        self.path = Path(path)
        self.warnings: list[str] = []
        self.lora: ctypes.c_void_p | None = None
        self._model = model
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        with open_gguf(self.path, "adapter") as reader:
            metadata, tensors = _read(reader, self.path.stat().st_size)
            self._check(metadata, model)
            _check_lora(metadata, tensors)
            self.mapper = Mapper.from_metadata(metadata)
        layout = metadata.get("pyps.layout")
        if layout is not None and layout not in LAYOUTS:
            raise InputError(f"{self.path}: pyps.layout is {layout!r}; this version of pyps knows {', '.join(LAYOUTS)}")
        self.layout: str | None = layout
        self.in_order = metadata.get("pyps.in_order", False)
        if not isinstance(self.in_order, bool):
            raise InputError(f"{self.path}: pyps.in_order must be true or false")
        if not tensors:
            return
        with log.captured():
            self.lora = llama_cpp.llama_adapter_lora_init(model.pointer, str(self.path).encode())
            if not self.lora:
                raise InputError(
                    f"{self.path}: llama.cpp cannot use this LoRA with {model.name} "
                    f"({log.last_words() or 'no reason given'})"
                )
        model.adapters.add(self)

    def _check(self, metadata: dict[str, Any], model: Model) -> None:
        if (kind := metadata.get("general.type")) != "adapter":
            raise InputError(f"not an adapter: general.type is {kind!r}, not 'adapter'")
        if (kind := metadata.get("adapter.type")) != "lora":
            raise InputError(f"adapter.type is {kind!r}; pyps reads 'lora'")
        if (arch := metadata.get("general.architecture")) != model.arch:
            raise InputError(f"made for {arch!r} models, but {model.name} is a {model.arch!r} model")
        version = metadata.get("pyps.version", 1)
        if version != 1:
            raise InputError(f"pyps.version is {version}; this version of pyps reads 1")
        base, own = metadata.get("pyps.base.name"), model.metadata.get("general.name")
        if fingerprint := metadata.get("pyps.base.fingerprint"):
            other = fingerprint != model.fingerprint
        else:
            other = bool(base and own and base != own)
        if other:
            self.warnings.append(
                f"{self.path.name} was trained on other weights ({base or 'no name given'}) than this model's "
                f"({own or model.name}): answers may be poor"
            )

    def attach(self, ctx: Context) -> None:
        """Switch the LoRA on for everything that ctx computes from now on. Without a LoRA this does nothing.

        Raises:
            InputError: ctx belongs to another model, or llama.cpp refuses.
        """
        if not self.lora:
            return
        if ctx.model is not self._model:
            raise InputError(f"{self.path}: this adapter was opened for another model than the context's")
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self.lora)  # type: ignore[misc]
        with log.captured():
            if llama_cpp.llama_set_adapters_lora(ctx.pointer, handles, 1, (ctypes.c_float * 1)(1.0)) != 0:
                raise InputError(f"{self.path}: llama.cpp cannot attach this LoRA ({log.last_words()})")
        self._contexts.add(ctx)

    def close(self) -> None:
        for ctx in list(self._contexts):
            ctx.close()
        if self.lora and self._model.is_open:
            llama_cpp.llama_adapter_lora_free(self.lora)
        self.lora = None


def _read(reader: gguf.GGUFReader, file_size: int) -> tuple[dict[str, Any], dict[str, gguf.GGMLQuantizationType]]:
    """The file's metadata, and its tensors' types by name."""
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    types = {name: field.types[0] if field.types else None for name, field in reader.fields.items()}
    tensors = {t.name: t.tensor_type for t in reader.tensors}
    if max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0) > file_size:
        raise InputError("the file is cut off: tensor data is missing")
    for key, expected in _LLAMA_CPP_KEYS.items():
        if key in types and types[key] != expected:
            raise InputError(f"{key} must be of type {expected.name}")
    return metadata, tensors


def _check_lora(metadata: dict[str, Any], tensors: dict[str, gguf.GGMLQuantizationType]) -> None:
    if tensors and "adapter.lora.alpha" not in metadata:
        raise InputError("adapter.lora.alpha is missing")
    for name, kind in tensors.items():
        if not name.endswith((".lora_a", ".lora_b")):
            raise InputError(f"tensor {name!r} is not part of a LoRA")
        if kind not in _LORA_TYPES:
            raise InputError(f"tensor {name!r} is {kind.name}; LoRA tensors are F32, F16, BF16 or Q8_0")
