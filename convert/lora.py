"""A LoRA and a mapper to one GGUF adapter file, and back (the file: docs/method.md, section 6)."""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from pyps.adapters.format import AdapterMetadata, read_metadata, write_metadata
from pyps.engine.gguf_file import open_gguf, writing
from pyps.errors import InputError

TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in ("f32", "f16", "bf16", "q8_0")}

# The architectures whose rows of q and k llama.cpp's converter reorders, and those whose rows it leaves: RoPE turns
# neighbouring channels in llama.cpp, and the two halves of a head in Transformers. A wrong guess would make a LoRA that
# loads and means nothing, so there is no default.
_INTERLEAVED = ("llama", "smollm3", "granite")
_AS_THEY_ARE = ("qwen2", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3", "gpt-oss")

# gguf's map knows many names for a tensor; these are the names of modules in Transformers' models
_SEPARATE = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class BaseShape:
    """The properties of a base model that decide how its LoRA is written.

    Attributes:
        arch: Its architecture, as llama.cpp names it.
        n_layers: How many layers it has.
        n_head: How many heads a layer has.
        n_head_kv: How many heads of K and V a layer has.
    """

    arch: str
    n_layers: int
    n_head: int
    n_head_kv: int

    def check(self) -> None:
        """Raise InputError if it is not known how this architecture's q and k are arranged."""
        if self.arch not in _INTERLEAVED + _AS_THEY_ARE:
            raise InputError(
                f"LoRAs of {self.arch!r} models cannot be converted: it is not known whether their q and k rows are "
                f"interleaved (known: {', '.join(_INTERLEAVED + _AS_THEY_ARE)})"
            )

    def to_gguf(self, module: str, b: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return lora_b [rows, rank] of a module ("q_proj") with its rows in llama.cpp's order."""
        if not (heads := self._heads(module)):
            return b
        return b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)

    def from_gguf(self, module: str, b: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return lora_b [rows, rank] of a module ("q_proj") with its rows in Transformers' order."""
        if not (heads := self._heads(module)):
            return b
        return b.reshape(heads, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)

    def _heads(self, module: str) -> int:
        """Return how many heads of this module are reordered, or 0 if its rows stay as they are."""
        return {"q_proj": self.n_head, "k_proj": self.n_head_kv}.get(module, 0) if self.arch in _INTERLEAVED else 0


Lora = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""A [rank, inputs] and B [outputs, rank] by module of the Transformers model ("model.layers.3.self_attn.q_proj")."""


def write_adapter(path: Path, shape: BaseShape, lora: Lora, metadata: AdapterMetadata, *, type: str = "f16") -> None:
    """Write an adapter file, whole or not at all.

    Args:
        path: The file to write. Its folder must exist.
        shape: The base model's shape.
        lora: The LoRA by module. If it is empty, the file has the mapper only.
        metadata: Everything else that the file says.
        type: The type of the LoRA's matrices, a key of TYPES. Matrices whose rows are not a multiple of q8_0's block of
            32 (lora_b of rank 16) are f16 instead.

    Raises:
        InputError: The architecture is unknown, llama.cpp has no name for a module, or a value is not finite.
        MachineError: The disk is full or fails.
    """
    shape.check()
    names = tensor_names(shape)
    with writing(path, metadata.arch) as writer:
        write_metadata(writer, metadata)
        for module, (a, b) in lora.items():
            tensor = names.get_name(module)
            if tensor is None:
                raise InputError(f"llama.cpp has no tensor for {module} in {shape.arch!r} models")
            for suffix, matrix in (("lora_a", a), ("lora_b", shape.to_gguf(module.rpartition(".")[2], b))):
                if not np.isfinite(matrix).all():
                    raise InputError(f"{module}.{suffix} has values that are not finite: training went wrong")
                kind = TYPES["f16" if type == "q8_0" and matrix.shape[1] % 32 else type]
                if kind == TYPES["f16"] and np.abs(matrix).max() > np.finfo(np.float16).max:
                    raise InputError(f"{module}.{suffix} has values too large for f16: choose f32 or bf16")
                data = gguf.quantize(np.ascontiguousarray(matrix, dtype=np.float32), kind)
                writer.add_tensor(f"{tensor}.weight.{suffix}", data, raw_dtype=kind)


def read_adapter(path: Path, shape: BaseShape) -> tuple[AdapterMetadata, Lora]:
    """Read an adapter file.

    Args:
        path: The file to read.
        shape: The base model's shape.

    Returns:
        The metadata, and the LoRA by Transformers' names, which is empty if the file has none.

    Raises:
        InputError: The file is damaged, not an adapter for this architecture, or has a tensor that Transformers has no
            name for.
    """
    shape.check()
    with open_gguf(path, "adapter") as reader:
        metadata = read_metadata(reader)
        if metadata.arch != shape.arch:
            raise InputError(f"made for {metadata.arch!r} models, not for {shape.arch!r}")
        parts = {tensor.name: np.array(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    modules = _modules(shape)
    lora: Lora = {}
    for name, a in parts.items():
        if name.endswith(".weight.lora_b"):
            continue
        tensor = name.removesuffix(".weight.lora_a")
        if tensor not in modules or f"{tensor}.weight.lora_b" not in parts:
            raise InputError(f"{path}: tensor {name!r} is not half of a LoRA that Transformers has a name for")
        module = modules[tensor]
        lora[module] = a, shape.from_gguf(module.rpartition(".")[2], parts[f"{tensor}.weight.lora_b"])
    return metadata, lora


def _modules(shape: BaseShape) -> dict[str, str]:
    """Return Transformers' names of the linear layers by llama.cpp's names."""
    names = tensor_names(shape)
    modules = _FUSED if shape.arch == "phi3" else _SEPARATE
    paths = [f"model.layers.{layer}.{module}" for layer in range(shape.n_layers) for module in modules]
    return {tensor: path for path in paths if (tensor := names.get_name(path))}


def tensor_names(shape: BaseShape) -> gguf.TensorNameMap:
    """Return llama.cpp's names of an architecture's tensors by everybody else's names."""
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(architectures[shape.arch], shape.n_layers)
