"""pyps doctor: what it says about a model is what happens with it."""

import json
from pathlib import Path

import pytest
from test_cli import pyps
from tiny import write_model

from pyps.doctor import examine


def test_a_model_that_can_be_joined(smollm2_path: Path) -> None:
    done = pyps("doctor", str(smollm2_path))
    assert done.returncode == 0, done.stderr
    assert "cache mode        yes" in done.stdout
    report = json.loads(pyps("doctor", "smollm2", "--json").stdout)
    assert report["model"]["arch"] == "llama"
    assert report["model"]["layers"] == 30
    assert set(report["model"]["kv_types"].values()) == {""}


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
