"""What a training run is asked to do: a YAML file, saved beside what it makes."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pyps.adapters.format import LayoutName
from pyps.adapters.mapper import FEATURES
from pyps.errors import InputError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LoraConfig(_Strict):
    """METHOD, section 3."""

    rank: int = Field(16, ge=1, le=512)
    alpha: int = Field(32, ge=1)
    targets: list[str] = Field(["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)


class MapperConfig(_Strict):
    """METHOD, section 2."""

    features: list[Literal["length", "num_agents", "layer"]] = Field(["length", "num_agents", "layer"], min_length=1)
    hidden: int = Field(32, ge=1, le=4096)

    @field_validator("features")
    @classmethod
    def _in_order(cls, features: list[str]) -> list[str]:
        """The runtime refuses an adapter with others: better before the training than after."""
        if features != [f for f in FEATURES if f in features]:
            raise ValueError(f"must be some of {', '.join(FEATURES)}, in this order")
        return features


class TrainConfig(_Strict):
    """Attributes:
    base: what `pyps run --model` takes; the weights are dequantised, so an adapter fits what it will run on.
    data: files of examples (data.py), used in a shuffled order, again and again until `steps` are done.
    held_out: examples to measure on; none of their entities should be in data.
    output: the folder to write to.
    start: an adapter (GGUF) to go on from, trained with the same lora and mapper; "auto": the one that comes with pyps
        for this base; None: from nothing.
    layout: of the prompts; written into the adapter.
    in_order: whether joined spans stand one after the other, as their texts would, or all begin at the branch point, as
        in the paper (layout.place); written into the adapter.
    kl, ce: weights of the losses: KL divergence from the text synthesizer's distribution; cross-entropy of the target.
    steps, batch_size: of the optimizer, and examples in each.
    lr_lora, lr_mapper: peak learning rates; they rise over `warmup` steps and fall to a tenth.
    save_every: steps between checkpoints, and between measurements on held_out.
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
    """A YAML file; paths in it are relative to it. Raises InputError, naming what is wrong."""
    try:
        config = TrainConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if config.kl == config.ce == 0:
        raise InputError(f"{path}: kl and ce are both 0: there is nothing to learn from")
    here = path.parent.resolve()  # so that the saved config means the same from everywhere
    paths: dict[str, Any] = {"data": [here / p for p in config.data], "held_out": [here / p for p in config.held_out]}
    paths["start"] = here / config.start if isinstance(config.start, Path) else config.start
    return config.model_copy(update={**paths, "output": here / config.output})
