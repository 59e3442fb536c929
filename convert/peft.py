"""A trained adapter as PEFT and PyTorch keep it: a LoRA directory, and a mapper's state (METHOD, section 5)."""

import json
import math
import re
import shutil
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

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass
class Checkpoint:
    """What was found.

    Attributes:
        lora: by module; alpha: of all of it. Scalings that differ between modules are multiplied into B.
        mapper: None if there is none.
        dropped: names of tensors that are no LoRA.
        notes: what the user should be told.
    """

    lora: Lora
    alpha: float
    mapper: Mapper | None
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_checkpoint(source: Path) -> Checkpoint:
    """A PEFT LoRA directory with a mapper beside it or without, or a checkpoint in the published layout.

    Raises InputError: nothing of the kind is there, it is damaged, or it is a kind of adapter that llama.cpp cannot
    apply (DoRA, biases, other tuners).
    """
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give a PEFT LoRA directory or a checkpoint's")
    folders = [source / name for name in _FOLDERS]
    loras = [f / name for f in folders for name in _LORA_FOLDERS if (f / name / _CONFIG).is_file()]
    mappers = [f for f in [*folders, source.parent if loras[:1] == [source] else source] if (f / _MAPPER).is_file()]
    if not loras and not mappers:
        raise InputError(f"{source}: there is neither a LoRA ({_CONFIG}) nor a mapper ({_MAPPER}) in it")
    mapper = read_mapper(mappers[0]) if mappers else None
    if not loras:
        return Checkpoint({}, 1.0, mapper, notes=["there is no LoRA, only a mapper"])
    found = _read_lora(loras[0])
    found.mapper = mapper
    if mapper is None:
        found.notes.append(f"there is no mapper ({_MAPPER}): the adapter will be the LoRA alone")
    return found


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
        wanted = _alpha(config, module)
        scaling = wanted / (math.sqrt(rank) if config.get("use_rslora") else rank)
        # llama.cpp multiplies by alpha / rank
        lora[module] = parts["A"], parts["B"] * np.float32(scaling * rank / alpha)
    notes = []
    if trained := config.get("modules_to_save"):
        notes.append(f"{', '.join(trained)} were trained as a whole: a LoRA file cannot hold that, so it is lost")
    return Checkpoint(lora, alpha, None, dropped, notes)


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    """Raises InputError for what changes more than W + B·A."""
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
    """As PEFT chooses it: the first pattern that is the whole name, or its end, wins."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(alpha)
    return float(config.get("lora_alpha", 8))


def read_mapper(folder: Path) -> Mapper:
    """cache_mapper.pt and, if it is there, cache_mapper_config.json. Raises InputError."""
    path = folder / _MAPPER
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        values = {name: tensor.float().numpy() for name, tensor in state.items()}
    except Exception as error:
        # whatever unpickling a damaged or hostile file may raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: cannot be read as a mapper's weights: {first_line}") from None
    config = _read_json(folder / _MAPPER_CONFIG) if (folder / _MAPPER_CONFIG).is_file() else {}
    kind = config.get("metadata_features", "both")
    features = tuple(kind) if isinstance(kind, list) else _METADATA_FEATURES.get(kind, ())
    names = {"w1": "net.0.weight", "b1": "net.0.bias", "w2": "net.2.weight", "b2": "net.2.bias"}
    if set(values) != set(names.values()):
        raise InputError(f"{path}: a mapper has {', '.join(names.values())}; this has {', '.join(sorted(values))}")
    metadata: dict[str, Any] = {
        "pyps.mapper.type": "affine-mlp",
        "pyps.mapper.features": list(features),
        "pyps.mapper.hidden_dim": int(values["net.0.bias"].size),
        **{f"pyps.mapper.{short}": values[name].ravel() for short, name in names.items()},
    }
    try:
        mapper = Mapper.from_metadata(metadata)
    except InputError as error:
        raise InputError(f"{path}: {error} (metadata_features: {kind})") from None
    assert mapper
    return mapper


def write_checkpoint(folder: Path, lora: Lora, alpha: float, mapper: Mapper | None, base_name: str) -> None:
    """A PEFT LoRA directory, and the mapper beside it, as read_checkpoint reads them: all of it or nothing.
    The folder must not exist. Raises InputError."""
    partial = folder.with_name(f"{folder.name}.part")
    try:
        if folder.exists():
            raise InputError(f"{folder} exists: give the name of a new folder")
        partial.mkdir(parents=True)
        _write(partial, lora, alpha, mapper, base_name)
        partial.rename(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, lora: Lora, alpha: float, mapper: Mapper | None, base_name: str) -> None:
    if lora:
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
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    if mapper:
        names = {"net.0.weight": "w1", "net.0.bias": "b1", "net.2.weight": "w2", "net.2.bias": "b2"}
        state = {name: torch.from_numpy(getattr(mapper, short).copy()) for name, short in names.items()}
        torch.save(state, folder / _MAPPER)
        kind = {features: name for name, features in _METADATA_FEATURES.items()}.get(mapper.features)
        config = {"hidden_dim": len(mapper.b1), "metadata_features": kind or list(mapper.features)}
        (folder / _MAPPER_CONFIG).write_text(json.dumps(config, indent=2))


def merge(checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
    """Their weighted average, matrix by matrix (A with A, B with B), as the published checkpoint was made. Weights are
    scaled to a sum of 1. Raises InputError if they differ in shape."""
    total = sum(weights)
    if len(weights) != len(checkpoints) or any(w < 0 for w in weights) or not 0 < total < math.inf:
        raise InputError(f"{len(checkpoints)} checkpoints need as many weights, none negative, not all 0")
    first, *others = checkpoints
    for other in others:
        if {m: (a.shape, b.shape) for m, (a, b) in other.lora.items()} != {
            m: (a.shape, b.shape) for m, (a, b) in first.lora.items()
        }:
            raise InputError("checkpoints of other modules or ranks cannot be averaged")
        if (other.mapper is None) != (first.mapper is None):
            raise InputError("one of the checkpoints has no mapper: they cannot be averaged")
        if other.alpha != first.alpha:
            raise InputError(f"checkpoints of other alpha ({first.alpha:g}, {other.alpha:g}) cannot be averaged")
        if other.mapper and first.mapper and other.mapper.features != first.mapper.features:
            raise InputError("their mappers have other inputs: they cannot be averaged")

    def average(values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        if len({v.shape for v in values}) > 1:
            raise InputError("their mappers are of other sizes: they cannot be averaged")
        mean = sum(np.float64(w / total) * v for w, v in zip(weights, values, strict=True))
        return np.asarray(mean, np.float32)

    lora = {
        m: (average([c.lora[m][0] for c in checkpoints]), average([c.lora[m][1] for c in checkpoints]))
        for m in first.lora
    }
    mapper = None
    if first.mapper:
        mappers = [c.mapper for c in checkpoints if c.mapper]
        w1, b1, w2, b2 = (average([getattr(m, name) for m in mappers]) for name in ("w1", "b1", "w2", "b2"))
        mapper = Mapper(first.mapper.features, w1, b1, w2, b2)
    dropped = [name for c in checkpoints for name in c.dropped]
    return Checkpoint(lora, first.alpha, mapper, dropped, [n for c in checkpoints for n in c.notes])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a JSON object")
    return values
