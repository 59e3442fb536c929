"""The adapter that comes with pyps: found, fitting, what PyTorch says it is, and better than none."""

import json
from pathlib import Path

import llama_cpp
import yaml
from test_cli import pyps
from test_train_synthesis import check_the_runtime

from pyps import ForkJoin
from pyps.adapters.adapter import Adapter
from pyps.convert.gguf import read_base
from pyps.engine.find import AUTO, find_adapter, requantise
from pyps.engine.model import Model
from pyps.train.config import TrainConfig, read_config
from pyps.train.trainer import _build, load_adapter

MODELS = Path(__file__).parent.parent / "models"
SHIPPED = MODELS / "smollm2-135m-instruct.gguf"


def test_it_is_used_by_default_with_the_default_model_only(smollm2_path: Path) -> None:
    found = find_adapter(AUTO, "smollm2")
    assert found
    assert found.read_bytes() == SHIPPED.read_bytes()
    assert find_adapter(AUTO, str(smollm2_path)) is None
    assert find_adapter(None, "smollm2") is None
    with ForkJoin.from_pretrained() as fj:
        assert fj.adapter
        assert fj.adapter.lora
        assert fj.adapter.mapper
        assert not fj.adapter.warnings
        assert fj.layout == fj.adapter.layout == "shared"
    with ForkJoin.from_pretrained(layout="paper") as fj:
        assert fj.adapter
        assert "trained for the shared layout" in fj.adapter.warnings[0]
    words = ["run", "Hi", "--branches", "2", "--max-tokens", "2", "--json"]
    assert json.loads(pyps(*words).stdout)["adapter"] == str(found)
    assert json.loads(pyps(*words, "--adapter", "none").stdout)["adapter"] is None


def test_the_runtime_computes_what_pytorch_does_with_it(tmp_path: Path, smollm2_path: Path) -> None:
    """On the default model with its weights in F32: Q8_0 kernels round activations, which hides everything else."""
    path = tmp_path / "f32.gguf"
    requantise(smollm2_path, path, llama_cpp.LLAMA_FTYPE_ALL_F32)
    synthesis, shape = _build(TrainConfig(data=[path], output=tmp_path), path, "llama")
    assert shape == read_base(path).shape
    load_adapter(synthesis, SHIPPED, shape)
    model = Model.load(path)
    adapter = Adapter(SHIPPED, model)
    assert not adapter.warnings
    check_the_runtime(model, adapter, synthesis, 2e-3)
    model.close()


def test_it_is_better_than_none() -> None:
    """Two examples of each family of the built-in suite; all of it is in models/README.md."""
    found = json.loads(pyps("eval", "--limit", "2", "--json").stdout)
    modes = found["modes"]
    assert modes["cache, adapter"]["kl"] < 0.8 * modes["cache"]["kl"]
    assert modes["cache, adapter"]["accuracy"] > modes["cache"]["accuracy"]


def test_how_it_was_made() -> None:
    """The config beside it is one that this version reads, and the card says what `pyps eval` found."""
    for config in (MODELS / f"smollm2-135m-instruct-{n}.yaml" for n in (1, 2)):
        assert read_config(config).layout == "shared"
        assert yaml.safe_load(config.read_text())["base"] == "smollm2"
    card = (MODELS / "README.md").read_text()
    assert "make adapter" in card
    assert "pyps eval" in card
