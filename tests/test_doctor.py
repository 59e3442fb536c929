"""pyps doctor: what it says about a model is what happens with it."""

import json
from pathlib import Path

import llama_cpp
import pytest
from support.tiny import write_model
from test_cli import pyps

from pyps.engine.context import Context
from pyps.engine.model import Model
from pyps.engine.tuned import Tuned, default_threads, tuned
from pyps.measure.doctor import _fastest, examine


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found out here, while other things run, is not for the user to keep."""
    monkeypatch.setenv("PYPS_CACHE", str(tmp_path / "cache"))


def test_a_model_that_can_be_joined(smollm2_path: Path) -> None:
    done = pyps("doctor", str(smollm2_path), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"]["arch"] == "llama"
    assert report["model"]["layers"] == 30
    assert set(report["model"]["kv_types"].values()) == {""}


def test_what_suits_the_machine_is_kept_and_used(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.load(tiny_path)
    assert tuned(model) == Tuned(default_threads(), 512)
    model.close()
    done = pyps("doctor", str(tiny_path))
    assert done.returncode == 0, done.stderr
    assert "cache mode        yes" in done.stdout
    (kept,) = (tmp_path / "cache" / "tuned").iterdir()
    found = Tuned(**json.loads(kept.read_text()))
    assert f"{found.threads} threads, {found.batch:,} tokens at once; used from now on" in done.stdout
    kept.write_text('{"threads": 3, "batch": 64}')
    model = Model.load(tiny_path)
    with Context(model, 256) as ctx:
        assert ctx.n_batch == 64
        assert llama_cpp.llama_n_threads(ctx.pointer) == 3
    with Context(model, 256, threads=1, n_batch=32) as ctx:
        assert ctx.n_batch == 32
        assert llama_cpp.llama_n_threads(ctx.pointer) == 1
    model.close()
    for damaged in ("", "[]", '{"threads": 0, "batch": 64}', '{"threads": 1}', '{"threads": "x", "batch": 1}'):
        kept.write_text(damaged)
        model = Model.load(tiny_path)
        assert tuned(model) == Tuned(default_threads(), 512)
        model.close()


def test_the_fastest_is_another_only_if_it_surely_is() -> None:
    assert _fastest(2, {1, 2, 4}, lambda n: {1: 2.0, 2: 1.0, 4: 0.97}[n]) == 2
    assert _fastest(2, {1, 2, 4}, lambda n: {1: 2.0, 2: 1.0, 4: 0.5}[n]) == 4


def test_a_model_that_cannot(tmp_path: Path) -> None:
    done = pyps("doctor", str(write_model(tmp_path / "m.gguf", "mamba")))
    assert done.returncode == 0, done.stderr
    assert "cache mode        no: caches of 'mamba' models cannot be joined: it keeps a recurrent state" in done.stdout


def test_what_is_missing_is_said(tiny_path: Path, tmp_path: Path) -> None:
    report = examine(tiny_path).model
    assert report is not None
    assert "q8_0" in report.kv_types["q8_0"]
    assert report.kv_types["f16"] == ""
    assert "ChatML" in report.chat
    broken = examine(write_model(tmp_path / "m.gguf", tokenizer__chat_template="{{ nonsense(")).model
    assert broken is not None
    assert "chat template failed" in broken.chat


def test_without_a_model_and_with_a_wrong_one() -> None:
    done = pyps("doctor")
    assert done.returncode == 0
    assert "threads" in done.stdout
    assert "model" not in done.stdout
    assert pyps("doctor", "nowhere.gguf").returncode == 2


@pytest.mark.parametrize("arch", ["jamba", "deepseek2", "qwen2vl", "gpt2", "hunyuan-dense", "bert", "t5"])
def test_every_refusal_is_named(tmp_path: Path, arch: str) -> None:
    report = examine(write_model(tmp_path / "m.gguf", arch)).model
    assert report is not None
    assert f"'{arch}'" in report.joinable
