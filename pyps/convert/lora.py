"""A LoRA and a mapper to one GGUF adapter file, and back. The file is a contract: METHOD, section 6."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from pyps.errors import InputError
from pyps.mapper import Mapper

VERSION = 1
TYPES = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16}

# Whether llama.cpp's converter reorders the rows of q and k: RoPE turns neighbouring channels there, and the two halves
# of a head in Transformers. A wrong guess gives a LoRA that loads and means nothing, so there is no default.
_INTERLEAVED = ("llama", "smollm3", "granite")
_AS_THEY_ARE = ("qwen2", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3", "gpt-oss")


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
    base_name: str,
    type: str = "f16",
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter file, whole or not at all.

    Args:
        lora: may be empty: the file then has the mapper only.
        type: of the LoRA's matrices, a key of TYPES.
        more: further metadata, strings.

    Raises:
        InputError: an unknown architecture, a module that llama.cpp has no name for, values that are not finite.
    """
    shape.check()
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[shape.arch], shape.n_layers)
    partial = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(partial, shape.arch)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_uint32("pyps.version", VERSION)
        writer.add_string("pyps.layout", layout)
        writer.add_string("pyps.base.name", base_name)
        for key, value in (more or {}).items():
            writer.add_string(key, value)
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
                data = gguf.quantize(np.ascontiguousarray(matrix, dtype=np.float32), TYPES[type])
                writer.add_tensor(f"{tensor}.weight.{suffix}", data, raw_dtype=TYPES[type])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_lora(path: Path, shape: Shape) -> tuple[Lora, float]:
    """The LoRA of an adapter file by Transformers' names, and its alpha. Raises InputError for an unknown tensor."""
    shape.check()
    reader = gguf.GGUFReader(path)
    parts = {t.name: np.array(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    lora: Lora = {}
    for name in parts:
        match = re.fullmatch(r"blk\.(\d+)\.attn_(q|k|v|output|qkv)\.weight\.lora_a", name)
        if not match:
            if not name.endswith(".lora_b"):
                raise InputError(f"{path}: tensor {name!r} is not one that pyps trains")
            continue
        module = {"output": "o_proj"}.get(match[2], f"{match[2]}_proj")
        b = shape.from_gguf(module, parts[name.removesuffix("a") + "b"])
        lora[f"model.layers.{match[1]}.self_attn.{module}"] = parts[name], b
    return lora, float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())


def _check_finite(what: str, values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"{what} has values that are not finite: training went wrong")
