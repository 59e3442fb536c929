"""pyps convert: real PEFT checkpoints, the published layout among them, to GGUF and back; and those that cannot be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from support.oracle import Oracle
from support.tiny import write_adapter, write_model
from test_cli import pyps
from test_oracle import MODELS
from test_train_synthesis import check_the_runtime

from pyps.adapters.adapter import Adapter
from pyps.convert.gguf import from_gguf, read_base, to_gguf
from pyps.convert.lora import read_adapter
from pyps.convert.peft import read_checkpoint
from pyps.engine.model import Model
from pyps.errors import InputError
from pyps.train.cache_mapper import CacheMapper
from pyps.train.synthesis import Synthesis

ALL = ["q_proj", "k_proj", "v_proj", "o_proj"]


def trained(folder: Path, name: str, **config: Any) -> tuple[Path, Synthesis]:
    """A twin, and a LoRA and a mapper on it with random weights."""
    path = write_model(folder / f"{name}.gguf", **MODELS[name])
    base = Oracle(path, write_adapter(folder / "unused.gguf", lora=False))._base
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM"} | config
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    mapper = CacheMapper()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [*mapper.parameters(), *(p for p in model.parameters() if p.requires_grad)]:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return path, Synthesis(model, mapper)


def save(folder: Path, synthesis: Synthesis, *, embeddings: bool = False) -> Path:
    """Write a checkpoint in the published layout and return its folder."""
    synthesis.model.save_pretrained(str(folder / "judger_lora"), save_embedding_layers=embeddings)
    names = {"inner": "net.0", "outer": "net.2"}
    state = {names[n.split(".")[0]] + "." + n.split(".")[1]: p.data for n, p in synthesis.mapper.named_parameters()}
    torch.save(state, folder / "cache_mapper.pt")
    (folder / "cache_mapper_config.json").write_text('{"hidden_dim": 32, "metadata_features": "both"}')
    return folder


def compare(path: Path, adapter_path: Path, synthesis: Synthesis, tolerance: float = 2e-4) -> None:
    model = Model.load(path)
    adapter = Adapter(adapter_path, model)
    assert not adapter.warnings
    check_the_runtime(model, adapter, synthesis, tolerance)
    model.close()


def test_the_published_layout(tmp_path: Path) -> None:
    """Qwen3, the embedding matrices saved with it, in step_checkpoints/latest: runs, and is what PyTorch computes."""
    path, synthesis = trained(tmp_path, "qwen3")
    save(tmp_path / "c" / "step_checkpoints" / "latest", synthesis, embeddings=True)
    out = tmp_path / "a.gguf"
    process = pyps("convert", str(tmp_path / "c"), "--base", str(path), "-o", str(out), "--type", "f32")
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == str(out)
    assert "left out 2 tensors that are no LoRA: base_model.model.lm_head.weight" in process.stderr
    compare(path, out, synthesis)
    model = Model.load(path)
    assert Adapter(out, model).layout == "paper"
    model.close()
    stock = llama_cpp.Llama(str(path), lora_path=str(out), n_ctx=64, verbose=False)  # an ordinary LoRA, to others
    completion = stock.create_completion("a", max_tokens=2)
    assert isinstance(completion, dict)
    assert completion["usage"]["completion_tokens"] == 2
    stock.close()


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
def test_peft_directories(tmp_path: Path, name: str) -> None:
    """q and k reordered where llama.cpp does so; fused layers; feed-forward layers."""
    targets = ["qkv_proj", "o_proj"] if name == "phi3" else [*ALL, "gate_proj", "up_proj", "down_proj"]
    path, synthesis = trained(tmp_path, name, target_modules=targets)
    checkpoint = save(tmp_path / "c", synthesis)
    to_gguf([checkpoint], tmp_path / "a.gguf", path, layout="shared", type="f32")
    # llama.cpp looks Gemma's GELU up in a table of half-precision numbers
    compare(path, tmp_path / "a.gguf", synthesis, 1e-3 if name == "gemma3" else 2e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"q_proj": 8, "layers.1.self_attn.v_proj": 2}},
        {"alpha_pattern": {"k_proj": 3}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 8}},
    ],
)
def test_ranks_and_alphas_that_differ_between_layers(tmp_path: Path, config: dict[str, Any]) -> None:
    path, synthesis = trained(tmp_path, "llama", **config)
    to_gguf([save(tmp_path / "c", synthesis)], tmp_path / "a.gguf", path, layout="shared", type="f32")
    compare(path, tmp_path / "a.gguf", synthesis)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_there_and_back(tmp_path: Path, kind: str) -> None:
    path, synthesis = trained(tmp_path, "llama")
    checkpoint = save(tmp_path / "c", synthesis)
    first, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    to_gguf([checkpoint], first, path, layout="shared", in_order=True, type=kind)
    (note,) = from_gguf(first, tmp_path / "back", path)
    assert note.endswith("to convert it back, add --layout shared --in-order")
    peft.PeftConfig.from_pretrained(str(tmp_path / "back"))
    to_gguf([tmp_path / "back"], again, path, layout="shared", type=kind)
    shape = read_base(path).shape
    _, want = read_adapter(first, shape)
    _, got = read_adapter(again, shape)
    tolerance = {"f32": 0, "f16": 0, "bf16": 0, "q8_0": 1e-3}[kind]
    original = read_checkpoint(checkpoint).lora
    assert want.keys() == got.keys() == original.keys()
    for module in want:
        for x, y, z in zip(want[module], got[module], original[module], strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)
            np.testing.assert_allclose(x, z, rtol=0.01, atol=2e-3)
    model = Model.load(path)
    adapters = [Adapter(p, model) for p in (first, again)]
    for name in ("w1", "b1", "w2", "b2"):
        one, other = (getattr(a.mapper, name) for a in adapters)
        assert (one == other).all()
    assert adapters[0].in_order
    assert not adapters[1].in_order
    model.close()


def test_averages(tmp_path: Path) -> None:
    path, synthesis = trained(tmp_path, "llama")
    one = save(tmp_path / "one", synthesis)
    with torch.no_grad():
        for parameter in synthesis.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    other = save(tmp_path / "other", synthesis)
    out = tmp_path / "a.gguf"
    sources = [str(one), str(other)]
    process = pyps("convert", *sources, "--base", str(path), "-o", str(out), "--type", "f32", "--weights", "3,1")
    assert process.returncode == 0, process.stderr
    _, merged = read_adapter(out, read_base(path).shape)
    original = read_checkpoint(one)
    for module, (a, b) in original.lora.items():
        np.testing.assert_allclose(merged[module][0], a + 0.25, atol=1e-6)
        np.testing.assert_allclose(merged[module][1], b + 0.25, atol=1e-6)
    model = Model.load(path)
    mapper = Adapter(out, model).mapper
    assert mapper
    assert original.mapper
    np.testing.assert_allclose(mapper.w1, original.mapper.w1 + 0.25, atol=1e-6)
    model.close()
    with pytest.raises(InputError, match="as many weights"):
        to_gguf([one, other], out, path, layout="paper", weights=[1.0])
    with pytest.raises(InputError, match="none negative, not all 0"):
        to_gguf([one, other], out, path, layout="paper", weights=[0.0, 0.0])


def test_a_mapper_alone_and_a_lora_alone(tmp_path: Path) -> None:
    path, synthesis = trained(tmp_path, "llama")
    checkpoint = save(tmp_path / "c", synthesis)
    notes = to_gguf([checkpoint / "judger_lora"], tmp_path / "a.gguf", path, layout="paper")
    assert notes == [], "a mapper beside the LoRA directory is found"
    (checkpoint / "cache_mapper.pt").rename(tmp_path / "cache_mapper.pt")
    notes = to_gguf([checkpoint], tmp_path / "lora.gguf", path, layout="paper")
    assert "there is no mapper" in notes[0]
    (tmp_path / "alone").mkdir()
    (tmp_path / "cache_mapper.pt").rename(tmp_path / "alone" / "cache_mapper.pt")
    notes = to_gguf([tmp_path / "alone"], tmp_path / "mapper.gguf", path, layout="paper")
    assert notes == ["there is no LoRA, only a mapper"]
    model = Model.load(path)
    assert Adapter(tmp_path / "mapper.gguf", model).lora is None
    assert Adapter(tmp_path / "lora.gguf", model).mapper is None
    model.close()


def break_mapper(folder: Path, **changes: Any) -> None:
    state = torch.load(folder / "cache_mapper.pt", weights_only=True) | changes
    torch.save({k: v for k, v in state.items() if v is not None}, folder / "cache_mapper.pt")


def break_weights(folder: Path, name: str, tensor: torch.Tensor) -> None:
    path = folder / "judger_lora" / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path) | {name: tensor}, path)


def break_config(folder: Path, **changes: Any) -> None:
    path = folder / "judger_lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: break_config(f, use_dora=True), "this is DoRA"),
        (lambda f: break_config(f, bias="all"), "trained with biases"),
        (lambda f: break_config(f, lora_bias=True), "a LoRA with biases"),
        (lambda f: break_config(f, peft_type="VERA"), "this is 'VERA'; only LoRA"),
        (lambda f: break_weights(f, f"{Q}.lora_magnitude_vector", torch.ones(3)), "a kind of LoRA that llama.cpp"),
        (lambda f: break_weights(f, f"{Q}.lora_A.weight", torch.ones(4, 5)), "5 inputs"),
        (lambda f: break_weights(f, f"{Q}.lora_A.weight", torch.ones(3, 5)), "incomplete or misshapen"),
        (lambda f: break_weights(f, f"{Q}.lora_A.weight", torch.full((4, 64), np.nan)), "not finite"),
        (lambda f: break_weights(f, "base_model.model.model.vision.0.x.lora_A.weight", torch.ones(4, 5)), "incomplete"),
        (lambda f: break_weights(f, f"{Q}.lora_A.weight", torch.full((4, 64), 1e5)), "too large for f16"),
        (lambda f: break_mapper(f, **{"net.0.weight": torch.ones(32, 2)}), "w1 must be"),
        (lambda f: break_mapper(f, **{"net.2.bias": torch.full((4,), np.inf)}), "not finite"),
        (lambda f: break_mapper(f, **{"net.2.bias": None}), "a mapper has"),
        (lambda f: (f / "cache_mapper.pt").write_bytes(b"PK\x03\x04"), "cannot be read as a mapper"),
        (lambda f: (f / "cache_mapper_config.json").write_text("{"), "cache_mapper_config.json: cannot be read"),
        (
            lambda f: (f / "cache_mapper_config.json").write_text('{"metadata_features": "new"}'),
            "metadata_features: new",
        ),
        (lambda f: (f / "judger_lora" / "adapter_model.safetensors").write_bytes(b"1234567890"), "is damaged"),
        (lambda f: (f / "judger_lora" / "adapter_model.safetensors").unlink(), "missing"),
        (lambda f: (f / "judger_lora" / "adapter_config.json").write_text("[]"), "must be a JSON object"),
    ],
)
def test_what_cannot_be_converted(tmp_path: Path, spoil: Any, message: str) -> None:
    path, synthesis = trained(tmp_path, "llama")
    checkpoint = save(tmp_path / "c", synthesis)
    spoil(checkpoint)
    with pytest.raises(InputError, match=message):
        to_gguf([checkpoint], tmp_path / "out" / "a.gguf", path, layout="paper")
    assert not list((tmp_path / "out").glob("*"))


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("hostile"),)


def test_no_program_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synthesis = trained(tmp_path, "llama")
    checkpoint = save(tmp_path / "c", synthesis)
    torch.save(Hostile(), checkpoint / "cache_mapper.pt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be read as a mapper"):
        to_gguf([checkpoint], tmp_path / "a.gguf", path, layout="paper")
    assert not Path("hostile").exists()


@pytest.mark.parametrize("back", [False, True])
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: bool) -> None:
    path, synthesis = trained(tmp_path, "llama")
    checkpoint = save(tmp_path / "c", synthesis)
    adapter = tmp_path / "a.gguf"
    to_gguf([checkpoint], adapter, path, layout="paper")
    before = sorted(tmp_path.iterdir())

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", interrupt)
    monkeypatch.setattr("pyps.convert.peft.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        if back:
            from_gguf(adapter, tmp_path / "back", path)
        else:
            to_gguf([checkpoint], tmp_path / "b.gguf", path, layout="paper")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("back", [False, True])
def test_a_full_disk_is_the_machines_fault(tmp_path: Path, back: bool) -> None:
    """A limit on file sizes stands for the full disk: the same error at the same place."""
    path, synthesis = trained(tmp_path, "llama")
    checkpoint = save(tmp_path / "c", synthesis)
    adapter = tmp_path / "a.gguf"
    to_gguf([checkpoint], adapter, path, layout="paper")
    before = sorted(tmp_path.iterdir())
    call = (
        f"from_gguf(Path({str(adapter)!r}), Path({str(tmp_path / 'back')!r}), base)"
        if back
        else f"to_gguf([Path({str(checkpoint)!r})], Path({str(tmp_path / 'b.gguf')!r}), base, layout='paper')"
    )
    program = (
        "import resource; from pathlib import Path; from pyps.convert.gguf import from_gguf, to_gguf\n"
        f"base = Path({str(path)!r})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        f"{call}\n"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "MachineError" in process.stderr, process.stderr
    assert f"{tmp_path / ('back' if back else 'b.gguf')}: cannot be written" in process.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_mistakes(tmp_path: Path) -> None:
    path, synthesis = trained(tmp_path, "llama")
    checkpoint = save(tmp_path / "c", synthesis)
    other = write_model(tmp_path / "qwen3.gguf", **MODELS["qwen3"] | {"n_layers": 1})
    out = tmp_path / "a.gguf"
    for sources, base, message in (
        ([tmp_path / "none"], path, "no such folder"),
        ([tmp_path], path, "neither a LoRA"),
        ([checkpoint], other, "has no model.layers.1"),
        ([checkpoint], tmp_path / "unused.gguf", "not a language model"),
        ([checkpoint], checkpoint / "cache_mapper.pt", "not a GGUF file"),
    ):
        with pytest.raises(InputError, match=message):
            to_gguf(sources, out, base, layout="paper")
    with pytest.raises(InputError, match="is a folder"):
        to_gguf([checkpoint], tmp_path, path, layout="paper")
    to_gguf([checkpoint], out, path, layout="paper")
    with pytest.raises(InputError, match="exists: give the name of a new folder"):
        from_gguf(out, tmp_path, path)
    with pytest.raises(InputError, match="not an adapter"):
        from_gguf(path, tmp_path / "x", path)
    assert pyps("convert", str(checkpoint), "-o", str(out), "--weights", "a,b").returncode == 2


def test_an_adapter_for_other_weights_is_noticed(tmp_path: Path) -> None:
    path, synthesis = trained(tmp_path, "llama")
    to_gguf([save(tmp_path / "c", synthesis)], tmp_path / "a.gguf", path, layout="paper")
    model = Model.load(write_model(tmp_path / "other.gguf", **MODELS["llama"] | {"seed": 5}))
    assert "was trained on other weights" in Adapter(tmp_path / "a.gguf", model).warnings[0]
    model.close()
