"""Adapters: one GGUF file with the mapper in its metadata and the synthesizer's LoRA as its tensors.

The file is an ordinary llama.cpp LoRA. llama.cpp aborts on a known key of the wrong type and reads no arrays for us, so
the file is read and checked here before llama.cpp gets to see it.
"""

import ctypes
import weakref
from pathlib import Path

import gguf
import llama_cpp

from pyps.adapters.format import AdapterMetadata, read_metadata
from pyps.engine import log
from pyps.engine.context import Context
from pyps.engine.gguf_file import open_gguf
from pyps.engine.model import Model
from pyps.errors import InputError

_LORA_TYPES = {gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0")}


class Adapter:
    """An adapter that is opened for a model.

    Closing it closes the contexts that it is attached to; closing the model closes it.

    Attributes:
        path: The file.
        layout: The prompt layout that it was trained for, or None if the file does not say.
        in_order: True if spans are placed one after the other, False if all begin at the branch point.
        mapper: The mapper; None means the identity.
        lora: llama.cpp's handle, or None if the file has no LoRA tensors.
        warnings: What the user should know, for instance that it was trained on another model of the same shape.

    Args:
        path: The file to read.
        model: The model that the adapter is for.

    Raises:
        InputError: The file is missing, damaged, for another architecture or size, or its mapper is malformed.
    """

    def __init__(self, path: Path | str, model: Model) -> None:
        self.path = Path(path)
        self.warnings: list[str] = []
        self.lora: ctypes.c_void_p | None = None
        self._model = model
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        with open_gguf(self.path, "adapter") as reader:
            metadata = read_metadata(reader)
            if metadata.arch != model.arch:
                raise InputError(f"made for {metadata.arch!r} models, but {model.name} is a {model.arch!r} model")
            _check_tensors(reader)
            has_lora = bool(reader.tensors)
        self.mapper = metadata.mapper
        self.layout = metadata.layout
        self.in_order = metadata.in_order
        self._warn_of_other_weights(metadata)
        if not has_lora:
            return
        with log.captured():
            self.lora = llama_cpp.llama_adapter_lora_init(model.pointer, str(self.path).encode())
            if not self.lora:
                raise InputError(
                    f"{self.path}: llama.cpp cannot use this LoRA with {model.name} "
                    f"({log.last_words() or 'no reason given'})"
                )
        model.adapters.add(self)

    def _warn_of_other_weights(self, metadata: AdapterMetadata) -> None:
        base_name, model_name = metadata.base_name, self._model.metadata.get("general.name")
        if metadata.base_fingerprint:
            differs = metadata.base_fingerprint != self._model.fingerprint
        else:
            differs = bool(base_name and model_name and base_name != model_name)
        if differs:
            self.warnings.append(
                f"{self.path.name} was trained on other weights ({base_name or 'no name given'}) than this model's "
                f"({model_name or self._model.name}): answers may be poor"
            )

    def attach(self, ctx: Context) -> None:
        """Switch the LoRA on for everything that a context computes from then on, if the adapter has one.

        Raises:
            InputError: The context belongs to another model, or llama.cpp refuses.
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
        """Free the LoRA, and before it every context that it is attached to."""
        for ctx in list(self._contexts):
            ctx.close()
        if self.lora and self._model.is_open:
            llama_cpp.llama_adapter_lora_free(self.lora)
        self.lora = None


def _check_tensors(reader: gguf.GGUFReader) -> None:
    for tensor in reader.tensors:
        if not tensor.name.endswith((".lora_a", ".lora_b")):
            raise InputError(f"tensor {tensor.name!r} is not part of a LoRA")
        if tensor.tensor_type not in _LORA_TYPES:
            raise InputError(
                f"tensor {tensor.name!r} is {tensor.tensor_type.name}; LoRA tensors are F32, F16, BF16 or Q8_0"
            )
