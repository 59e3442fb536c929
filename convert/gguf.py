"""Conversions between checkpoints and GGUF adapters, as `pyps convert` does them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf

from pyps.adapters.format import AdapterMetadata, LayoutName
from pyps.convert.lora import BaseShape, read_adapter, tensor_names, write_adapter
from pyps.convert.peft import merge, read_checkpoint, write_checkpoint
from pyps.engine.gguf_file import open_gguf
from pyps.engine.model import hash_norms
from pyps.errors import InputError
from pyps.files import check_writable


@dataclass(frozen=True)
class Base:
    """The properties of a base model that a conversion needs. Its weights are not read.

    Attributes:
        shape: The properties that decide how its LoRA is written.
        name: general.name, or "" if the file does not say.
        fingerprint: The same as Model.fingerprint.
        linear: (inputs, outputs) of its weights by llama.cpp's names.
    """

    shape: BaseShape
    name: str
    fingerprint: str
    linear: dict[str, tuple[int, ...]]


def read_base(path: Path) -> Base:
    """Read what a conversion needs from a GGUF model. Raises InputError if the file is not one."""
    with open_gguf(path, "model") as reader:
        fields = {name: field.contents() for name, field in reader.fields.items() if "tokenizer." not in name}
        arch = fields[gguf.Keys.General.ARCHITECTURE]
        if f"{arch}.block_count" not in fields:
            raise InputError("not a language model")
        heads = fields[f"{arch}.attention.head_count"]
        heads_kv = fields.get(f"{arch}.attention.head_count_kv", heads)
        shape = BaseShape(arch, fields[f"{arch}.block_count"], heads, heads_kv)
        norms = sorted((t for t in reader.tensors if t.name.endswith("norm.weight")), key=lambda t: t.name)
        fingerprint = hash_norms(b"".join(t.data.tobytes() for t in norms))
        linear = {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}
    return Base(shape, fields.get(gguf.Keys.General.NAME, ""), fingerprint, linear)


def to_gguf(
    sources: Sequence[Path],
    output: Path,
    base_path: Path,
    *,
    layout: LayoutName,
    in_order: bool = False,
    type: str = "f16",
    weights: Sequence[float] | None = None,
) -> list[str]:
    """Write the adapter of a checkpoint, or the weighted average of several, as one GGUF file, whole or not at all.

    Args:
        sources: The checkpoints' folders, as read_checkpoint takes them.
        output: The file to write. Folders above it are made.
        base_path: The GGUF model that the checkpoints were trained on, of any quantisation.
        layout: The prompt layout that they were trained for.
        in_order: Whether they were trained for spans that stand one after the other.
        type: The type of the LoRA's matrices, a key of lora.TYPES.
        weights: The weight of each checkpoint in the average; None for the same weight.

    Returns:
        What the user should know about the conversion, a sentence each.

    Raises:
        InputError: A checkpoint is damaged or of a kind that llama.cpp cannot apply, does not fit the base, or does not
            fit the others.
        MachineError: The disk is full or fails.
    """
    base = read_base(base_path)
    if weights is not None and len(weights) != len(sources):
        raise InputError(f"{len(sources)} checkpoints need as many weights, not {len(weights)}")
    checkpoints = [read_checkpoint(source) for source in sources]
    checkpoint = merge(checkpoints, weights or [1.0] * len(checkpoints)) if len(checkpoints) > 1 else checkpoints[0]
    names = tensor_names(base.shape)
    for module, (a, b) in checkpoint.lora.items():
        tensor = names.get_name(module)
        if tensor is None or f"{tensor}.weight" not in base.linear:
            raise InputError(f"{base_path.name} has no {module}: was this trained on another model?")
        lora_size, base_size = (a.shape[1], b.shape[0]), base.linear[f"{tensor}.weight"]
        if lora_size != base_size:
            raise InputError(
                f"{module}: the LoRA is for a layer of {lora_size[0]} inputs and {lora_size[1]} outputs, "
                f"{base_path.name}'s has {' and '.join(map(str, base_size))}: it was trained on another model"
            )
    metadata = AdapterMetadata(
        arch=base.shape.arch,
        alpha=checkpoint.alpha,
        layout=layout,
        in_order=in_order,
        mapper=checkpoint.mapper,
        base_name=base.name,
        base_fingerprint=base.fingerprint,
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error}") from None
    check_writable(output)
    write_adapter(output, base.shape, checkpoint.lora, metadata, type=type)
    notes = list(dict.fromkeys(checkpoint.notes))
    if dropped := checkpoint.dropped:
        examples = ", ".join(dict.fromkeys(dropped[:3])) + (", …" if len(dropped) > 3 else "")
        notes.append(f"left out {len(dropped)} tensors that are no LoRA: {examples}")
    return notes


def from_gguf(source: Path, output: Path, base_path: Path) -> list[str]:
    """Write a GGUF adapter as a PEFT LoRA folder with its mapper in it, whole or not at all.

    Args:
        source: The adapter file.
        output: The folder to write, which must not exist.
        base_path: The GGUF model that the adapter was trained on, of any quantisation.

    Returns:
        What the user should know about the conversion, a sentence each.

    Raises:
        InputError: The adapter is damaged or for another model, or the folder exists.
        MachineError: The disk is full or fails.
    """
    base = read_base(base_path)
    metadata, lora = read_adapter(source, base.shape)
    write_checkpoint(output, lora, metadata.alpha, metadata.mapper, metadata.base_name)
    options = [f"--layout {metadata.layout}"] if metadata.layout else []
    options += ["--in-order"] if metadata.in_order else []
    if not options:
        return []
    return [f"the folder does not hold what it was trained for: to convert it back, add {' '.join(options)}"]
