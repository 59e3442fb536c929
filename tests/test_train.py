"""pyps train: from a file of examples to an adapter that runs, and everything that can be wrong on the way."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import pyps
from tiny import write_model

from pyps import ForkJoin, Sampling
from pyps.errors import InputError
from pyps.model import Model
from pyps.train.config import read_config
from pyps.train.countries import FAMILIES, build, read_countries
from pyps.train.data import read_examples, tokenize
from pyps.train.trainer import ADAPTER, CHECKPOINT, LOG, Trainer

EXAMPLES: list[dict[str, Any]] = [
    {"task": "Who?", "branches": [{"text": "It was Ann."}, {"text": "It was not Bob."}], "target": "Ann."},
    {"task": "Where?", "branches": [{"prompt": "Look.", "text": "In Rome.", "name": "eye"}], "target": "Rome."},
    {"task": "When?", "branches": [{"text": "In May."}, {"text": "Late."}, {"text": "At noon."}]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "m.gguf")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(e) + "\n" for e in EXAMPLES))
    return tmp_path


def config(folder: Path, **changes: Any) -> Path:
    values = {
        "base": str(folder / "m.gguf"),
        "data": ["data.jsonl"],
        "held_out": ["data.jsonl"],
        "output": "run",
        "steps": 6,
        "batch_size": 2,
        "save_every": 3,
        "warmup": 1,
        "ce": 0.5,
        "lora": {"rank": 4, "alpha": 8},
        **changes,
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / LOG).read_text().splitlines()]


def test_it_learns_and_what_it_writes_runs(folder: Path) -> None:
    Trainer(read_config(config(folder, steps=30, lr_lora=1e-2, kl=0, ce=1, save_every=30))).run()
    first, last = (entry["held_out"] for entry in (log(folder)[0], log(folder)[-1]))
    assert last["ce"] < 0.5 * first["ce"]
    with ForkJoin.from_pretrained(str(folder / "m.gguf"), adapter=folder / "run" / ADAPTER) as fj:
        assert fj.layout == "shared"
        assert fj.adapter and fj.adapter.lora and fj.adapter.mapper and not fj.adapter.warnings
        result = fj.run("Who?", ["a", "b"], sampling=Sampling(max_tokens=4, ignore_eos=True))
        assert result.tokens.joined == 8 and result.answer


def test_an_interrupted_run_ends_as_one_that_was_not(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    Trainer(read_config(config(folder))).run()
    whole = (folder / "run" / ADAPTER).read_bytes(), log(folder)
    for name in (ADAPTER, CHECKPOINT, LOG):
        (folder / "run" / name).unlink()

    asked = iter([False, False, True, True])
    trainer = Trainer(read_config(config(folder)))
    trainer.run(lambda: next(asked))
    assert trainer.step < 6
    again = Trainer(read_config(config(folder)))
    assert again.step == trainer.step
    again.run()
    assert (folder / "run" / ADAPTER).read_bytes() == whole[0]
    assert log(folder) == whole[1]


def test_the_command(folder: Path) -> None:
    done = pyps("train", str(config(folder, steps=2)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "run" / ADAPTER)
    assert "step 2/2" in done.stderr and "held out after 2 steps" in done.stderr
    assert sorted(p.name for p in (folder / "run").iterdir()) == [ADAPTER, CHECKPOINT, "config.yaml", LOG]
    other = pyps("train", str(config(folder, steps=3)))
    assert other.returncode == 2
    assert "holds a run with another config" in other.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stpes": 3}, "stpes: Extra inputs are not permitted"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1"),
        ({"layout": "other"}, "layout: Input should be 'shared' or 'paper'"),
        ({"kl": 0, "ce": 0}, "there is nothing to learn from"),
        ({"data": []}, "data: List should have at least 1 item"),
        ({"data": ["missing.jsonl"]}, "missing.jsonl: cannot be read"),
        ({"base": "missing.gguf"}, "missing.gguf"),
        ({"lora": {"targets": ["nothing"]}}, "lora.targets"),
        ({"mapper": {"features": ["layer", "length"]}}, "mapper.features: .*in this order"),
        ({"mapper": {"features": []}}, "mapper.features: List should have at least 1 item"),
    ],
)
def test_mistakes_in_a_config(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Trainer(read_config(config(folder, **changes)))


def test_a_base_that_transformers_cannot_read_and_a_damaged_checkpoint(folder: Path) -> None:
    write_model(folder / "other.gguf", "hunyuan-dense")
    with pytest.raises(InputError, match="Transformers cannot read this 'hunyuan-dense' model"):
        Trainer(read_config(config(folder, base=str(folder / "other.gguf"), output="other")))
    path = config(folder, steps=1)
    (folder / "run").mkdir()
    (folder / "run" / CHECKPOINT).write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match="the checkpoint is damaged"):
        Trainer(read_config(path))


def test_mistakes_in_data_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    good = json.dumps(EXAMPLES[0])
    for bad, message in (
        ("{", "line 3: Invalid JSON"),
        ("{}", "line 3: task: Field required"),
        (json.dumps(EXAMPLES[0] | {"branches": []}), "line 3: branches: List should have at least 1 item"),
        (json.dumps(EXAMPLES[0] | {"branches": [{"text": ""}]}), "line 3: branches.0.text: String should have"),
        (json.dumps(EXAMPLES[0] | {"answr": "x"}), "line 3: answr: Extra inputs"),
    ):
        path.write_text(f"{good}\n\n{bad}\n")
        with pytest.raises(InputError, match=message):
            read_examples([path])
    path.write_text("\n")
    with pytest.raises(InputError, match="no examples"):
        read_examples([path])


def test_examples_are_laid_out_as_the_runtime_does(folder: Path) -> None:
    model = Model.load(folder / "m.gguf")
    examples = read_examples([folder / "data.jsonl"])
    first, second, third = tokenize(model, "shared", examples)
    assert first.branch_point == len(first.prefix) > 0
    assert first.answer == [*model.tokenize("Ann."), model.end_of_turn]
    pasted = b"".join(map(model.piece, second.pasted)).decode()
    assert "[eye]\nIn Rome." in pasted
    assert third.answer, "generated by text synthesis"
    assert next(tokenize(model, "paper", examples)).branch_point == 0
    model.close()


def test_the_examples_about_countries() -> None:
    countries = read_countries()
    assert len(countries) > 200
    for family in FAMILIES:
        example = build(family, countries, False, random.Random(1))
        assert example.family == family
        assert example.answer in (example.target or "")
        assert any(example.answer in b.text for b in example.branches)


def test_the_walk_through(folder: Path) -> None:
    """docs/train.md's commands and config, in a smaller form."""
    text = (Path(__file__).parent.parent / "docs" / "train.md").read_text()
    assert "python -m pyps.train.countries examples" in text
    words = [sys.executable, "-m", "pyps.train.countries", "examples", "--train", "6", "--held-out", "3"]
    subprocess.run(words, cwd=folder, check=True, capture_output=True)
    values = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    path = config(folder, **values | {"base": str(folder / "m.gguf"), "steps": 1})
    assert pyps("train", str(path)).returncode == 0
    (folder / "own.jsonl").write_text(" ".join(text.split("```json")[1].split("```")[0].split("\n")))
    assert read_examples([folder / "own.jsonl"])[0].target == "The capital of Peru is Lima."
