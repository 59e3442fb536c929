"""`pyps train`, from a file of examples to an adapter that runs, and all that can go wrong on the way."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.tiny import write_model
from test_cli import pyps

from pyps import ForkJoin, Sampling
from pyps.data.example import Example, ExampleBranch, read_examples
from pyps.engine.model import Model
from pyps.errors import InputError
from pyps.train.config import read_config
from pyps.train.data import prepare
from pyps.train.report import PLOT, REPORT, read_log
from pyps.train.trainer import ADAPTER, CHECKPOINT, LOG, TOKENS, Trainer, _losses

EXAMPLES: list[dict[str, Any]] = [
    {"task": "Who?", "branches": [{"text": "It was Ann."}, {"text": "It was not Bob."}], "target": "Ann."},
    {"task": "Where?", "branches": [{"prompt": "Look.", "text": "In Rome.", "name": "eye"}], "target": "Rome."},
    {"task": "When?", "branches": [{"text": "In May."}, {"text": "Late."}, {"text": "At noon."}]},
    {"task": "Why?", "branches": [{}, {"prompt": "Guess."}]},
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
        assert fj.adapter
        assert fj.adapter.lora
        assert fj.adapter.mapper
        assert not fj.adapter.warnings
        result = fj.run("Who?", ["a", "b"], sampling=Sampling(max_tokens=4, ignore_eos=True))
        assert result.tokens.joined == 8
        assert result.answer


def test_an_interrupted_run_ends_as_one_that_was_not(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    Trainer(read_config(config(folder))).run()
    whole = (folder / "run" / ADAPTER).read_bytes(), log(folder)
    shutil.rmtree(folder / "run")

    answers = iter([False, False, True])
    trainer = Trainer(read_config(config(folder)))
    trainer.run(lambda: next(answers))
    assert trainer.step == 3
    assert list((folder / "run").glob("encoded-*"))
    again = Trainer(read_config(config(folder)))
    assert again.step == trainer.step
    again.run()
    assert (folder / "run" / ADAPTER).read_bytes() == whole[0]
    assert log(folder) == whole[1]


def test_going_on_from_an_adapter(folder: Path) -> None:
    Trainer(read_config(config(folder, steps=30, lr_lora=1e-2, kl=0, ce=1, save_every=30))).run()
    learned = log(folder)[-1]["held_out"]
    adapter = (folder / "run" / ADAPTER).rename(folder / "a.gguf")
    shutil.rmtree(folder / "run")
    Trainer(read_config(config(folder, steps=1, start="a.gguf", lora={"rank": 4, "alpha": 32}))).run()
    assert log(folder)[0]["held_out"] == pytest.approx(learned, rel=0.05)
    for changes, message in (
        ({"lora": {"rank": 8, "alpha": 8}}, "other layers or another rank"),
        ({"mapper": {"hidden": 8}}, "another size than mapper says"),
        ({"start": "m.gguf"}, "not an adapter"),
        ({"start": "no.gguf"}, "no such adapter file"),
        ({"start": "auto"}, "pyps has no adapter for"),
    ):
        with pytest.raises(InputError, match=message):
            Trainer(read_config(config(folder, **{"start": str(adapter), "output": "other", **changes})))
        shutil.rmtree(folder / "other")


def test_the_command(folder: Path) -> None:
    done = pyps("train", str(config(folder, steps=2)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "run" / ADAPTER)
    assert "step 2/2" in done.stderr
    assert "held out after 2 steps" in done.stderr
    files = [ADAPTER, CHECKPOINT, "config.yaml", LOG, REPORT, PLOT, TOKENS]
    assert sorted(p.name for p in (folder / "run").iterdir()) == files
    report = (folder / "run" / REPORT).read_text()
    assert "| held-out examples, after | 0 steps | 2 steps |" in report
    assert "batch_size: 2" in report
    assert (folder / "run" / PLOT).read_bytes().startswith(b"\x89PNG")
    other = pyps("train", str(config(folder, steps=3)))
    assert other.returncode == 2
    assert "holds a run with another config" in other.stderr


def test_a_full_disk_ends_a_run_with_one_line(folder: Path) -> None:
    """A limit on file sizes stands for the full disk: it is the same OSError, at the first file that is too large."""
    path = config(folder, steps=1)
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    command = limit + f"sys.argv[1:] = ['train', {str(path)!r}]; runpy.run_module('pyps.cli', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith(f"pyps: {folder / 'run' / CHECKPOINT}: cannot be written: File too large\n")
    files = {path.name for path in (folder / "run").iterdir()}
    assert files <= {"config.yaml", LOG, TOKENS}, "neither a checkpoint nor half of one"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stpes": 3}, "stpes: there is no such key: stpes"),
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


def test_examples_are_laid_out_as_the_runtime_does(folder: Path) -> None:
    model = Model.load(folder / "m.gguf")
    examples = read_examples([folder / "data.jsonl"])
    lines: list[str] = []
    path = folder / "tokens.jsonl"
    first, second, third, fourth = prepare(model, "shared", examples, path, lines.append)
    assert first.branch_point == len(first.prefix) > 0
    assert first.answer == [*model.tokenize("Ann."), model.end_of_turn]
    assert first.given
    pasted = b"".join(map(model.piece, second.pasted)).decode()
    assert "[eye]\nIn Rome." in pasted
    assert third.answer
    assert not third.given, "generated by text synthesis"
    assert all(output for _, output in fourth.branches), "generated by the model"
    assert lines[-1].endswith("4/4")

    whole = path.read_text()
    assert prepare(model, "shared", examples, path, lines.append) == [first, second, third, fourth]
    path.write_text("".join(whole.splitlines(keepends=True)[:3])[:-5])  # interrupted while it was written
    assert prepare(model, "shared", examples, path, lines.append)[0] == first
    assert prepare(model, "paper", examples, path, lines.append)[0].branch_point == 0, "others than were kept"
    model.close()


def test_losses_are_means_over_each_example() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    targets, example = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 0, 0, 1, 1])
    kl, ce, measures = _losses(student, teacher, targets, example, 2)
    each = [-float(student[i].log_softmax(-1)[t]) for i, t in enumerate(targets)]
    assert ce.tolist() == pytest.approx([sum(each[:3]) / 3, (each[3] + each[4]) / 2])
    p = teacher.softmax(-1)
    divergence = (p * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
    assert kl.tolist() == pytest.approx([float(divergence[:3].mean()), float(divergence[3:].mean())])
    assert measures.kl_first == pytest.approx(float(divergence[[0, 3]].mean()))


def test_more_branches_to_generate_than_sequences(folder: Path) -> None:
    model = Model.load(folder / "m.gguf")
    examples = [Example(task=f"Why {i}?", branches=[ExampleBranch()] * 90, target="So.") for i in range(3)]
    token_examples = prepare(model, "shared", examples, folder / "t.jsonl", lambda line: None)
    assert [len(t.branches) for t in token_examples] == [90] * 3
    model.close()


def test_half_a_line_of_a_log_is_left_out(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text('{"step": 1, "kl": 2.0}\n{"step": 2, "k')
    assert read_log(tmp_path / LOG) == ([{"step": 1, "kl": 2.0}], [])


def test_a_disk_without_room_for_what_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer(read_config(config(folder, steps=2))).run()
    with_room = log(folder)
    shutil.rmtree(folder / "run")
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    lines: list[str] = []
    Trainer(read_config(config(folder, steps=2)), lines.append).run()
    assert any("every step computes them anew" in line for line in lines)
    for one, other in zip(with_room, log(folder), strict=True):
        assert one.get("kl", 0) == pytest.approx(other.get("kl", 0), abs=1e-3), "kept as float16"


def test_two_processes_do_what_one_does(folder: Path) -> None:
    """Accelerate gives each process half of a batch, and averages the gradients."""
    one = config(folder, batch_size=4)
    Trainer(read_config(one)).run()
    want = log(folder)
    shutil.rmtree(folder / "run")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    done = subprocess.run([*launch, "-m", "pyps.cli", "train", str(one)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 6/6") == 1, "only one of them reports"
    for entry, other in zip(want, log(folder), strict=True):
        values, others = entry.get("held_out", entry), other.get("held_out", other)
        assert values == pytest.approx(others, abs=2e-3)


def test_the_walk_through(folder: Path) -> None:
    """The commands and the configuration of docs/train.md work, in a smaller form."""
    text = (Path(__file__).parent.parent / "docs" / "train.md").read_text()
    assert "pyps data families examples\n" in text
    assert pyps("data", "families", str(folder / "examples"), "--train", "7", "--held-out", "2").returncode == 0
    values = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    path = config(folder, **values | {"base": str(folder / "m.gguf"), "steps": 1})
    assert pyps("train", str(path)).returncode == 0
    (folder / "own.jsonl").write_text(" ".join(text.split("```json")[1].split("```")[0].split("\n")))
    assert read_examples([folder / "own.jsonl"])[0].target == "The capital of Peru is Lima."
