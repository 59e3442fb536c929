"""A trained adapter as PEFT and PyTorch keep it: a LoRA folder and a mapper's state (docs/method.md, section 5)."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pyps.adapters.mapper import Mapper
from pyps.convert.lora import Lora
from pyps.errors import InputError
from pyps.files import whole_folder

# where the published checkpoints keep their files
_FOLDERS = ("", "latest", "step_checkpoints/latest")
_LORA_FOLDERS = ("judger_lora", "")
_MAPPER, _MAPPER_CONFIG = "cache_mapper.pt", "cache_mapper_config.json"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# the published configuration's names for the mapper's inputs
_METADATA_FEATURES = {
    "both": ("length", "num_agents", "layer"),
    "length": ("length", "layer"),
    "num_agents": ("num_agents", "layer"),
    "none": ("layer",),
}

# the mapper's arrays by their names in a state dictionary
_STATE = {"net.0.weight": "w1", "net.0.bias": "b1", "net.2.weight": "w2", "net.2.bias": "b2"}

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass
class Checkpoint:
    """A checkpoint's content.

    Attributes:
        lora: The LoRA by module. Scalings that differ between modules are multiplied into B.
        alpha: The alpha of all modules.
        mapper: The mapper, or None if the checkpoint has none.
        dropped: The names of tensors that are not part of a LoRA.
        notes: What the user should know, a sentence each.
    """

    lora: Lora
    alpha: float
    mapper: Mapper | None
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_checkpoint(source: Path) -> Checkpoint:
    """Read a PEFT LoRA folder, with a mapper in it, beside it or without one, or a checkpoint in the published layout.

    Raises:
        InputError: There is nothing of the kind, it is damaged, or it is a kind of adapter that llama.cpp cannot apply
            (DoRA, biases, other tuners).
    """
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give a PEFT LoRA directory or a checkpoint's")
    folders = [source / name for name in _FOLDERS]
    loras = [folder / name for folder in folders for name in _LORA_FOLDERS if (folder / name / _CONFIG).is_file()]
    beside = [source.parent] if loras[:1] == [source] else []
    mappers = [folder for folder in [*folders, *beside] if (folder / _MAPPER).is_file()]
    if not loras and not mappers:
        raise InputError(f"{source}: there is neither a LoRA ({_CONFIG}) nor a mapper ({_MAPPER}) in it")
    mapper = read_mapper(mappers[0]) if mappers else None
    if not loras:
        return Checkpoint({}, 1.0, mapper, notes=["there is no LoRA, only a mapper"])
    checkpoint = _read_lora(loras[0])
    checkpoint.mapper = mapper
    if mapper is None:
        checkpoint.notes.append(f"there is no mapper ({_MAPPER}): the adapter will be the LoRA alone")
    return checkpoint


def _read_lora(folder: Path) -> Checkpoint:
    config = _read_json(folder / _CONFIG)
    _check_kind(folder, config)
    path = folder / _WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise InputError(f"{path}: missing{' (save adapter_model.bin again as safetensors)' if pickled else ''}")
    halves: dict[str, dict[str, NDArray[np.float32]]] = {}
    dropped = []
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                if match := _TENSOR.fullmatch(name):
                    halves.setdefault(match[1], {})[match[2]] = file.get_tensor(name).float().numpy()
                elif "lora_" in name:
                    raise InputError(f"{path}: tensor {name!r} is a kind of LoRA that llama.cpp cannot apply")
                else:
                    dropped.append(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: the file is damaged: {error}") from None
    if not halves:
        raise InputError(f"{path}: there is no LoRA in it")
    alpha = float(config.get("lora_alpha", 8))
    lora: Lora = {}
    for module, parts in halves.items():
        if set(parts) != {"A", "B"} or parts["A"].ndim != 2 or parts["A"].shape[0] != parts["B"].shape[1]:
            raise InputError(f"{path}: the LoRA of {module} is incomplete or misshapen")
        rank = parts["A"].shape[0]
        module_alpha = _alpha(config, module)
        scaling = module_alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        # llama.cpp multiplies by alpha / rank
        lora[module] = parts["A"], parts["B"] * np.float32(scaling * rank / alpha)
    notes = []
    if trained := config.get("modules_to_save"):
        notes.append(f"{', '.join(trained)} were trained as a whole: a LoRA file cannot hold that, so it is lost")
    return Checkpoint(lora, alpha, None, dropped, notes)


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    """Raise InputError for a kind of adapter that changes more than W + B·A."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{folder}: this is {kind!r}; only LoRA can be converted")
    for key, what in (
        ("use_dora", "DoRA"),
        ("lora_bias", "a LoRA with biases"),
        ("fan_in_fan_out", "a LoRA of transposed layers"),
        ("trainable_token_indices", "a LoRA with trained tokens"),
        ("target_parameters", "a LoRA of bare parameters"),
        ("use_qalora", "QALoRA"),
        ("alora_invocation_tokens", "an activated LoRA (aLoRA)"),
        ("arrow_config", "a mixture of LoRAs (Arrow)"),
    ):
        if config.get(key):
            raise InputError(f"{folder}: this is {what} ({key}), which llama.cpp cannot apply")
    if config.get("bias", "none") != "none":
        raise InputError(f"{folder}: it was trained with biases (bias: {config['bias']}), which llama.cpp cannot apply")


def _alpha(config: dict[str, Any], module: str) -> float:
    """Return a module's alpha as PEFT chooses it: the first pattern that is the whole name, or its end, wins."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(alpha)
    return float(config.get("lora_alpha", 8))


def read_mapper(folder: Path) -> Mapper:
    """Read a mapper from cache_mapper.pt and, if it is there, cache_mapper_config.json.

    Raises:
        InputError: A file is damaged, or its values are not a mapper's.
    """
    path = folder / _MAPPER
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        values = {name: tensor.float().numpy() for name, tensor in state.items()}
    except Exception as error:
        # unpickling a damaged or hostile file may raise anything
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: cannot be read as a mapper's weights: {first_line}") from None
    config = _read_json(folder / _MAPPER_CONFIG) if (folder / _MAPPER_CONFIG).is_file() else {}
    kind = config.get("metadata_features", "both")
    features = tuple(kind) if isinstance(kind, list) else _METADATA_FEATURES.get(str(kind), ())
    if set(values) != set(_STATE):
        raise InputError(f"{path}: a mapper has {', '.join(_STATE)}; this has {', '.join(sorted(values))}")
    try:
        return Mapper(features, **{array: values[name] for name, array in _STATE.items()})
    except InputError as error:
        raise InputError(f"{path}: {error} (metadata_features: {kind})") from None


def write_checkpoint(folder: Path, lora: Lora, alpha: float, mapper: Mapper | None, base_name: str) -> None:
    """Write a PEFT LoRA folder with the mapper in it, as read_checkpoint reads it, whole or not at all.

    Args:
        folder: The folder to write, which must not exist. Folders above it are made.
        lora: The LoRA by module; it may be empty.
        alpha: The alpha of all modules.
        mapper: The mapper, or None.
        base_name: The name of the base model, for PEFT's configuration.

    Raises:
        InputError: The folder exists, or none can be made there.
        MachineError: The disk is full or fails.
    """
    with whole_folder(folder) as partial:
        if lora:
            _write_lora(partial, lora, alpha, base_name)
        if mapper:
            _write_mapper(partial, mapper)


def _write_lora(folder: Path, lora: Lora, alpha: float, base_name: str) -> None:
    ranks = {module: a.shape[0] for module, (a, _) in lora.items()}
    most = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": most,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in lora}),
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != most},
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2))
    tensors = {}
    for module, (a, b) in lora.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
    try:
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None  # a full disk, for instance


def _write_mapper(folder: Path, mapper: Mapper) -> None:
    state = {name: torch.from_numpy(getattr(mapper, array).copy()) for name, array in _STATE.items()}
    with (folder / _MAPPER).open("wb") as file:  # a full disk is an OSError then; given a path, torch raises its own
        torch.save(state, file)
    kind = {features: name for name, features in _METADATA_FEATURES.items()}.get(mapper.features)
    config = {"hidden_dim": len(mapper.b1), "metadata_features": kind or list(mapper.features)}
    (folder / _MAPPER_CONFIG).write_text(json.dumps(config, indent=2))


def merge(checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
    """Average checkpoints, matrix by matrix (A with A, B with B), as the published checkpoint was made.

    Args:
        checkpoints: Two or more checkpoints of the same shapes.
        weights: A weight for each; they are scaled to a sum of 1.

    Raises:
        InputError: The checkpoints differ in shape or alpha, or the weights are not as many, negative or all 0.
    """
    total = sum(weights)
    if len(weights) != len(checkpoints) or any(w < 0 for w in weights) or not 0 < total < math.inf:
        raise InputError(f"{len(checkpoints)} checkpoints need as many weights, none negative, not all 0")
    first, *others = checkpoints
    for other in others:
        if _shapes(other.lora) != _shapes(first.lora):
            raise InputError("checkpoints of different modules or ranks cannot be averaged")
        if (other.mapper is None) != (first.mapper is None):
            raise InputError("one of the checkpoints has no mapper: they cannot be averaged")
        if other.alpha != first.alpha:
            raise InputError(f"checkpoints of different alpha ({first.alpha:g}, {other.alpha:g}) cannot be averaged")
        if other.mapper and first.mapper and other.mapper.features != first.mapper.features:
            raise InputError("their mappers have different inputs: they cannot be averaged")

    def average(values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        if len({v.shape for v in values}) > 1:
            raise InputError("their mappers are of different sizes: they cannot be averaged")
        mean = sum(np.float64(w / total) * v for w, v in zip(weights, values, strict=True))
        return np.asarray(mean, np.float32)

    lora = {
        module: (average([c.lora[module][0] for c in checkpoints]), average([c.lora[module][1] for c in checkpoints]))
        for module in first.lora
    }
    mapper = None
    if first.mapper:
        mappers = [c.mapper for c in checkpoints if c.mapper]
        arrays = {array: average([getattr(m, array) for m in mappers]) for array in _STATE.values()}
        mapper = Mapper(first.mapper.features, **arrays)
    dropped = [name for c in checkpoints for name in c.dropped]
    return Checkpoint(lora, first.alpha, mapper, dropped, [note for c in checkpoints for note in c.notes])


def _shapes(lora: Lora) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    return {module: (a.shape, b.shape) for module, (a, b) in lora.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a JSON object")
    return values
