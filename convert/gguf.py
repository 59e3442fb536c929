"""`pyps convert`: checkpoints to one GGUF adapter, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf

from pyps.adapters.mapper import Mapper
from pyps.convert.lora import Shape, read_adapter, tensor_names, write_adapter
from pyps.convert.peft import merge, read_checkpoint, write_checkpoint
from pyps.engine.gguf_file import open_gguf
from pyps.engine.model import hash_norms
from pyps.errors import InputError


@dataclass(frozen=True)
class Base:
    """What a conversion needs to know of a base model; its weights are not read.

    Attributes:
        name: general.name.
        fingerprint: as Model.fingerprint.
        linear: (inputs, outputs) of its weights by llama.cpp's names.
    """

    shape: Shape
    name: str
    fingerprint: str
    linear: dict[str, tuple[int, ...]]


def read_base(path: Path) -> Base:
    """Of a GGUF model. Raises InputError if it is none."""
    with open_gguf(path, "model") as reader:
        fields = {name: field.contents() for name, field in reader.fields.items() if "tokenizer." not in name}
        arch = fields[gguf.Keys.General.ARCHITECTURE]
        if f"{arch}.block_count" not in fields:
            raise InputError("not a language model")
        heads = fields[f"{arch}.attention.head_count"]
        shape = Shape(arch, fields[f"{arch}.block_count"], heads, fields.get(f"{arch}.attention.head_count_kv", heads))
        norms = sorted((t for t in reader.tensors if t.name.endswith("norm.weight")), key=lambda t: t.name)
        fingerprint = hash_norms(b"".join(t.data.tobytes() for t in norms))
        linear = {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}
    return Base(shape, fields.get(gguf.Keys.General.NAME, ""), fingerprint, linear)


def to_gguf(
    sources: Sequence[Path],
    output: Path,
    base_path: Path,
    *,
    layout: str,
    in_order: bool = False,
    type: str = "f16",
    weights: Sequence[float] | None = None,
) -> list[str]:
    """Write the adapter of a checkpoint, or the weighted average of several, as one GGUF file, whole or not at all.

    Returns:
        What the user should be told.

    Raises:
        InputError: a checkpoint is damaged or of a kind that llama.cpp cannot apply, does not fit the base, or does not
            fit the others.
    """
    base = read_base(base_path)
    if weights is not None and len(weights) != len(sources):
        raise InputError(f"{len(sources)} checkpoints need as many weights, not {len(weights)}")
    checkpoints = [read_checkpoint(source) for source in sources]
    found = merge(checkpoints, weights or [1.0] * len(checkpoints)) if len(checkpoints) > 1 else checkpoints[0]
    names = tensor_names(base.shape)
    for module, (a, b) in found.lora.items():
        tensor = names.get_name(module)
        if tensor is None or f"{tensor}.weight" not in base.linear:
            raise InputError(f"{base_path.name} has no {module}: was this trained on another model?")
        has, wants = (a.shape[1], b.shape[0]), base.linear[f"{tensor}.weight"]
        if has != wants:
            raise InputError(
                f"{module}: the LoRA is for a layer of {has[0]} inputs and {has[1]} outputs, {base_path.name}'s has "
                f"{' and '.join(map(str, wants))}: it was trained on another model"
            )
    if output.is_dir():
        raise InputError(f"{output} is a folder: give the name of the file to write")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_adapter(
            output,
            base.shape,
            found.lora,
            found.alpha,
            found.mapper,
            layout=layout,
            in_order=in_order,
            base_name=base.name,
            base_fingerprint=base.fingerprint,
            type=type,
        )
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error}") from None
    notes = list(dict.fromkeys(found.notes))
    if found.dropped:
        shown = ", ".join(dict.fromkeys(found.dropped[:3])) + (", …" if len(found.dropped) > 3 else "")
        notes.append(f"left out {len(found.dropped)} tensors that are no LoRA: {shown}")
    return notes


def from_gguf(source: Path, output: Path, base_path: Path) -> list[str]:
    """Write a GGUF adapter as a PEFT LoRA directory with its mapper in it. Raises InputError."""
    base = read_base(base_path)
    metadata, lora, alpha = read_adapter(source, base.shape)
    write_checkpoint(output, lora, alpha, Mapper.from_metadata(metadata), str(metadata.get("pyps.base.name", "")))
    options = [f"--layout {metadata['pyps.layout']}"] if "pyps.layout" in metadata else []
    options += ["--in-order"] if metadata.get("pyps.in_order") else []
    if not options:
        return []
    return [f"the folder does not hold what it was trained for: to convert it back, add {' '.join(options)}"]
