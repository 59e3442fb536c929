"""A LoRA and a mapper to one GGUF adapter file, and back. The file is a contract: METHOD, section 6."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from pyps.adapters.mapper import Mapper
from pyps.engine.gguf_file import open_gguf
from pyps.errors import InputError

VERSION = 1
TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in ("f32", "f16", "bf16", "q8_0")}

# Whether llama.cpp's converter reorders the rows of q and k: RoPE turns neighbouring channels there, and the two halves
# of a head in Transformers. A wrong guess gives a LoRA that loads and means nothing, so there is no default.
_INTERLEAVED = ("llama", "smollm3", "granite")
_AS_THEY_ARE = ("qwen2", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3", "gpt-oss")

# gguf's map knows many names for a tensor; these are the ones that Transformers' models with these tensors have
_SEPARATE = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Shape:
    """What of a base model decides how its LoRA is written.

    Attributes:
        arch: general.architecture.
        n_layers, n_head, n_head_kv: of the base.
    """

    arch: str
    n_layers: int
    n_head: int
    n_head_kv: int

    def check(self) -> None:
        """Raises InputError if it is not known how this architecture's q and k are arranged."""
        if self.arch not in _INTERLEAVED + _AS_THEY_ARE:
            raise InputError(
                f"LoRAs of {self.arch!r} models cannot be converted: it is not known whether their q and k rows are "
                f"interleaved (known: {', '.join(_INTERLEAVED + _AS_THEY_ARE)})"
            )

    def to_gguf(self, module: str, b: NDArray[np.float32]) -> NDArray[np.float32]:
        """lora_b [rows, rank] of a module ("q_proj"), rows in llama.cpp's order."""
        if not (heads := self._heads(module)):
            return b
        return b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)

    def from_gguf(self, module: str, b: NDArray[np.float32]) -> NDArray[np.float32]:
        """The way back."""
        if not (heads := self._heads(module)):
            return b
        return b.reshape(heads, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)

    def _heads(self, module: str) -> int:
        """How many heads of this module are reordered; 0 for none."""
        return {"q_proj": self.n_head, "k_proj": self.n_head_kv}.get(module, 0) if self.arch in _INTERLEAVED else 0


# per module of the Transformers model ("model.layers.3.self_attn.q_proj"): A [rank, inputs], B [outputs, rank]
Lora = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]


def write_adapter(
    path: Path,
    shape: Shape,
    lora: Lora,
    alpha: float,
    mapper: Mapper | None,
    *,
    layout: str,
    in_order: bool,
    base_name: str,
    base_fingerprint: str,
    type: str = "f16",
) -> None:
    """Write an adapter file, whole or not at all.

    Args:
        lora: may be empty: the file then has the mapper only.
        layout, in_order: what it was trained for (layout.py).
        base_name, base_fingerprint: what it was trained on: general.name, and Model.fingerprint.
        type: of the LoRA's matrices, a key of TYPES. Those whose rows are no multiple of q8_0's block of 32 (lora_b of
            rank 16) are f16 instead.

    Raises:
        InputError: an unknown architecture, a module that llama.cpp has no name for, values that are not finite.
    """
    shape.check()
    names = tensor_names(shape)
    partial = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(partial, shape.arch)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_uint32("pyps.version", VERSION)
        writer.add_string("pyps.layout", layout)
        writer.add_bool("pyps.in_order", in_order)
        writer.add_string("pyps.base.name", base_name)
        writer.add_string("pyps.base.fingerprint", base_fingerprint)
        if mapper:
            writer.add_string("pyps.mapper.type", "affine-mlp")
            if mapper.features:  # GGUF has no empty arrays
                writer.add_array("pyps.mapper.features", list(mapper.features))
            writer.add_uint32("pyps.mapper.hidden_dim", len(mapper.b1))
            for name in ("w1", "b1", "w2", "b2"):
                values = getattr(mapper, name)
                _check_finite(f"the mapper's {name}", values)
                if values.size:
                    writer.add_array(f"pyps.mapper.{name}", [float(x) for x in values.ravel()])
        for module, (a, b) in lora.items():
            tensor = names.get_name(module)
            if tensor is None:
                raise InputError(f"llama.cpp has no tensor for {module} in {shape.arch!r} models")
            for suffix, matrix in (("lora_a", a), ("lora_b", shape.to_gguf(module.rpartition(".")[2], b))):
                _check_finite(f"{module}.{suffix}", matrix)
                kind = TYPES["f16" if type == "q8_0" and matrix.shape[1] % 32 else type]
                if kind == TYPES["f16"] and np.abs(matrix).max() > np.finfo(np.float16).max:
                    raise InputError(f"{module}.{suffix} has values too large for f16: choose f32 or bf16")
                data = gguf.quantize(np.ascontiguousarray(matrix, dtype=np.float32), kind)
                writer.add_tensor(f"{tensor}.weight.{suffix}", data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_adapter(path: Path, shape: Shape) -> tuple[dict[str, Any], Lora, float]:
    """An adapter file's metadata, its LoRA by Transformers' names, and its alpha.

    Raises InputError: not an adapter for this shape's architecture, damaged, or with a tensor that Transformers has no
    name for.
    """
    shape.check()
    with open_gguf(path, "adapter") as reader:
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        parts = {t.name: np.array(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    if metadata.get(gguf.Keys.General.TYPE) != gguf.GGUFType.ADAPTER:
        raise InputError(f"{path}: not an adapter")
    if (arch := metadata.get(gguf.Keys.General.ARCHITECTURE)) != shape.arch:
        raise InputError(f"{path}: made for {arch!r} models, not for {shape.arch!r}")
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
    return metadata, lora, float(metadata.get(gguf.Keys.Adapter.LORA_ALPHA, 1.0))


def _modules(shape: Shape) -> dict[str, str]:
    """Transformers' names of the linear layers, by llama.cpp's."""
    names = tensor_names(shape)
    modules = _FUSED if shape.arch == "phi3" else _SEPARATE
    paths = [f"model.layers.{layer}.{module}" for layer in range(shape.n_layers) for module in modules]
    return {tensor: path for path in paths if (tensor := names.get_name(path))}


def tensor_names(shape: Shape) -> gguf.TensorNameMap:
    """llama.cpp's names of an architecture's tensors, by everybody else's."""
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(architectures[shape.arch], shape.n_layers)


def _check_finite(what: str, values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"{what} has values that are not finite: training went wrong")
