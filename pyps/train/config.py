"""The configuration of a training run: a YAML file, which is saved beside the adapter."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pyps.adapters.format import LayoutName
from pyps.adapters.mapper import FEATURES
from pyps.errors import InputError, first_of


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LoraConfig(_Strict):
    """The LoRA (docs/method.md, section 3).

    Attributes:
        rank: Its rank.
        alpha: Its matrices are scaled by alpha / rank.
        targets: The linear modules that have one.
    """

    rank: int = Field(16, ge=1, le=512)
    alpha: int = Field(32, ge=1)
    targets: list[str] = Field(["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)


class MapperConfig(_Strict):
    """The cache mapper (docs/method.md, section 2).

    Attributes:
        features: Its inputs, some of pyps.adapters.mapper.FEATURES in their order.
        hidden: Width of its MLP.
    """

    features: list[Literal["length", "num_agents", "layer"]] = Field(["length", "num_agents", "layer"], min_length=1)
    hidden: int = Field(32, ge=1, le=4096)

    @field_validator("features")
    @classmethod
    def _in_order(cls, features: list[str]) -> list[str]:
        # the runtime refuses an adapter with others: better before the training than after
        if features != [f for f in FEATURES if f in features]:
            raise ValueError(f"must be some of {', '.join(FEATURES)}, in this order")
        return features


class TrainConfig(_Strict):
    """The configuration of a training run.

    Attributes:
        base: The model, as `pyps run --model` takes it. Its weights are dequantised, so that the adapter fits the file
            that it will run on.
        data: Files of examples. They are used in a shuffled order, again and again, for `steps` steps.
        held_out: Files of examples to measure on; `data` should have none of their entities.
        output: The folder to write to.
        start: An adapter file (GGUF) to go on from, which must have the same `lora` and `mapper`; "auto" for the one
            that comes with pyps for this base; None to begin with nothing.
        layout: The prompts' layout; written into the adapter.
        in_order: Whether joined spans stand one after the other, as their texts would, instead of all beginning at the
            branch point, as in the paper; written into the adapter.
        kl: Weight of the KL divergence from the distribution of text synthesis.
        ce: Weight of the cross-entropy of the target.
        steps: Steps of the optimizer.
        batch_size: Examples in each step.
        lr_lora: Peak learning rate of the LoRA. Both rates rise over `warmup` steps and then fall to a tenth.
        lr_mapper: Peak learning rate of the mapper.
        warmup: Steps until the peak.
        save_every: Steps between checkpoints, and between measurements on `held_out`.
        dtype: Type of the base's weights.
        seed: Of the order of the examples and the first values of the parameters.
        lora: The LoRA's shape.
        mapper: The mapper's shape.
    """

    base: str = "smollm2"
    data: list[Path] = Field(min_length=1)
    held_out: list[Path] = []
    output: Path
    start: Path | Literal["auto"] | None = None
    layout: LayoutName = "shared"
    in_order: bool = False
    kl: float = Field(1.0, ge=0)
    ce: float = Field(0.0, ge=0)
    steps: int = Field(400, ge=1)
    batch_size: int = Field(8, ge=1)
    lr_lora: float = Field(5e-4, gt=0)
    lr_mapper: float = Field(2.5e-3, gt=0)
    warmup: int = Field(20, ge=0)
    save_every: int = Field(50, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    lora: LoraConfig = LoraConfig()
    mapper: MapperConfig = MapperConfig()


def read_config(path: Path) -> TrainConfig:
    """Read a configuration; relative paths in it begin at its folder.

    Raises:
        InputError: The file cannot be read, or something in it is wrong.
    """
    try:
        config = TrainConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {error}") from None
    except ValidationError as error:
        loc, message = first_of(error)
        keys = ".".join(map(str, loc))
        raise InputError(f"{path}: {keys + ': ' if keys else ''}{message}") from None
    if config.kl == config.ce == 0:
        raise InputError(f"{path}: kl and ce are both 0: there is nothing to learn from")
    folder = path.parent.resolve()  # absolute, so that the saved configuration means the same everywhere
    paths: dict[str, Any] = {
        "data": [folder / p for p in config.data],
        "held_out": [folder / p for p in config.held_out],
    }
    paths["start"] = folder / config.start if isinstance(config.start, Path) else config.start
    return config.model_copy(update={**paths, "output": folder / config.output})
