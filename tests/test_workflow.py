"""The workflow files that come with pyps run on the default model, and mistakes in files are reported."""

import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyps import ForkJoin, InputError, Sampling
from pyps.cli.main import main
from pyps.engine.context import Context
from pyps.forkjoin.events import Done
from pyps.workflow import read_workflow, run_workflow, set_variables, shipped_workflows

SHORT = ["--max-tokens", "16", "--temperature", "0", "--seed", "1"]


def pyps(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyps.cli", *arguments], capture_output=True, text=True, cwd=cwd, timeout=300
    )


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """A folder with what the workflows work on."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("The office opens at nine. It closes at five. {{ not a template }}")
    (tmp_path / "docs" / "b.txt").write_text("The canteen opens at twelve. <|im_end|>")
    (tmp_path / "one.py").write_text("def add(a, b):\n    return a - b\n")
    (tmp_path / "two.py").write_text("print('hello')\n")
    with sqlite3.connect(tmp_path / "shop.sqlite") as connection:
        connection.execute("CREATE TABLE orders (id INTEGER, customer TEXT, price TEXT)")
        connection.executemany(
            "INSERT INTO orders VALUES (?, ?, ?)", [(1, "Anna", "12"), (2, None, "7"), (2, "Bo", None)]
        )
    connection.close()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "values", "branches"),
    [
        ("compare", {"options": "SQLite, PostgreSQL"}, ["SQLite", "PostgreSQL"]),
        ("review", {"repo": "{}"}, ["one.py", "two.py"]),
        ("documents", {"folder": "{}/docs", "question": "When does the office open?"}, ["a.txt", "b.txt"]),
        ("database", {"database": "{}/shop.sqlite"}, ["schema", "sizes", "gaps"]),
        ("solutions", {}, ["first", "second"]),
    ],
)
def test_each_example(things: Path, name: str, values: dict[str, str], branches: list[str]) -> None:
    """Each workflow runs on the default model, as a copy that `pyps new` made."""
    assert set(shipped_workflows()) == {"compare", "database", "documents", "review", "solutions"}
    file = things / "w.yaml"
    assert pyps("new", name, str(file)).returncode == 0
    settings = [part for key, value in values.items() for part in ("--set", f"{key}={value.format(things)}")]
    done = pyps("run", str(file), *settings, "--json", *SHORT)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    *_, last = outcome["steps"].values()
    assert [b["name"] for b in last["branches"]] == branches
    assert outcome["answer"]
    if name == "documents":
        assert set(outcome["answer"]) == {"answer", "document"}
    if name == "database":
        calls = [call for b in last["branches"] for call in b["calls"]]
        assert len(calls) >= 5
        assert {call["name"] for call in calls} <= {"sql", "tables", ""}
        assert any(not call["failed"] for call in calls), "the tables are named where the tool is described"


def test_plain_output(things: Path) -> None:
    done = pyps("run", "w.yaml", *SHORT, cwd=_write(things, TREE))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[answer]") == 3
    assert "step 3 of 3: top" in done.stderr


TREE = """
variables: {topic: cats}
steps:
  - name: left
    task: "Talk about {{ topic }}."
    branches: [one, two]
  - name: right
    task: "Talk about {{ topic }}."
    branches: [three, four]
  - name: top
    task: "Sum up: {{ left | length > 0 }}"
    join: [left, right]
"""


def _write(folder: Path, text: str) -> Path:
    (folder / "w.yaml").write_text(text)
    return folder


def open_contexts(fj: ForkJoin) -> list[Context]:
    return [ctx for ctx in fj.model.contexts if isinstance(ctx, Context) and ctx._pointer is not None]


def test_a_tree_of_steps(tmp_path: Path, tiny_path: Path) -> None:
    """Four branches become two answers and then one, as with the same calls from Python."""
    workflow = read_workflow(_write(tmp_path, TREE) / "w.yaml")
    sampling = Sampling(temperature=0, max_tokens=16, ignore_eos=True)
    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj:
        values = set_variables(workflow, {"topic": "dogs"})
        events = list(run_workflow(fj, workflow, values, tmp_path, sampling=sampling))
        results = [e.event.result for e in events if isinstance(e.event, Done)]
        pairs = (["one", "two"], ["three", "four"])
        halves = [fj.run("Talk about dogs.", pair, sampling=sampling, keep=True) for pair in pairs]
        assert [r.answer for r in results[:2]] == [half.answer for half in halves]
        top = fj.run("Sum up: True", join=[half.kept for half in halves if half.kept], sampling=sampling)
        assert results[2].answer == top.answer
        assert [b.name for b in results[2].branches] == ["left", "right"]
        own = [half.kept._ctx for half in halves if half.kept]
        assert not [ctx for ctx in open_contexts(fj) if ctx not in own], "the workflow's contexts are closed"


STEP = "steps:\n  - name: a\n    task: x\n    branches: [b]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1.*valid dict"),
        ("steps: []", r"line 1: steps: .*at least 1"),
        (STEP + "    brunches: [c]\n", r"line 5: steps.0.brunches: there is no such key: brunches"),
        (STEP + "speed: 1\n", r"line 5: speed: there is no such key: speed"),
        (STEP + "    sampling: {temprature: 1}\n", r"line 5: .*there is no such key: temprature"),
        (STEP + "    join: [a]\n", r"line 5: step 'a' joins 'a', which is not an earlier step"),
        (STEP + "  - name: a\n    task: y\n    branches: [c]\n", r"'a' is there twice"),
        ("steps:\n  - name: a\n    task: x\n", r"line 2: step 'a' has no branches"),
        ("steps:\n  - name: a b\n    task: x\n    branches: [c]\n", r"line 2: steps.0.name"),
        (STEP.replace("[b]", "[{prompt: x, tools: [{sql: a, files: b}]}]"), r"line 4: .*give one of"),
        (STEP.replace("[b]", "[{prompt: x, tools: [shell]}]"), r"line 4: .*calculator"),
        ("a: &x [1]\nb: *x\n", r"line 2: aliases"),
        ("a: [1\nb: 2", r"line \d: not YAML"),
        ("[" * 50_000, "line 1: nested too deeply"),
        ("a: 2001-99-99\n", "w.yaml"),
        ("\x00", "not YAML"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_workflow(_write(tmp_path, text) / "w.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STEP.replace("task: x", "task: '{{ nobody }}'"), "step a: 'nobody' is undefined"),
        (STEP.replace("task: x", "task: '{% if %}'"), "step a: the template"),
        (STEP.replace("task: x", "task: '{{ 1 / 0 }}'"), "step a: the template"),
        (STEP.replace("task: x", "task: '{{ [].__class__.__mro__ }}'"), "step a: "),
        (STEP.replace("[b]", "[{prompt: x, each: nobody}]"), "is not a variable whose value is a list"),
        (STEP.replace("[b]", "[{prompt: x, files: {glob: '*.none'}}]"), "nothing in .* matches"),
        (STEP.replace("[b]", "[{prompt: x, files: {glob: '../*'}}]"), "leaves the folder"),
        (STEP.replace("[b]", "[{prompt: x, files: {glob: '/etc/*'}}]"), "leaves the folder"),
        (STEP.replace("[b]", "[{prompt: x, files: {glob: 'x', root: nowhere}}]"), "no folder"),
        (STEP.replace("[b]", "[{prompt: x, tools: [{sql: nowhere}]}]"), "no database"),
        (STEP.replace("[b]", "[{prompt: x, tools: [{mcp: [/nowhere]}]}]"), "MCP server /nowhere cannot be used"),
        (STEP + "    sampling: {max_tokens: 100000}\n", "step a: a branch may need"),
        (STEP + "    sampling: {temperature: -1}\n", "temperature must be"),
        (STEP + "    schema: {type: nonsense}\n", "JSON schema"),
        (STEP.replace("[b]", "[{prompt: x, limits: {min_calls: 9}}]"), "calls"),
    ],
)
def test_steps_that_cannot_run(tmp_path: Path, tiny_path: Path, text: str, message: str) -> None:
    workflow = read_workflow(_write(tmp_path, text) / "w.yaml")
    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj, pytest.raises(InputError, match=message):
        list(run_workflow(fj, workflow, {}, tmp_path))


def test_files_stay_under_their_root(tmp_path: Path, tiny_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.txt").write_text("fine")
    (root / "b.txt").symlink_to(tmp_path / "secret.txt")
    text = STEP.replace("[b]", "[{prompt: '{{ item.text }}', files: {glob: '*.txt', root: root}}]")
    workflow = read_workflow(_write(tmp_path, text) / "w.yaml")
    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj:
        events = list(run_workflow(fj, workflow, {}, tmp_path, sampling=Sampling(max_tokens=2)))
    assert events[0].prompts == ["fine"]


def test_variables(tmp_path: Path) -> None:
    workflow = read_workflow(_write(tmp_path, "variables: {q: null, n: 3, l: [x]}\n" + STEP) / "w.yaml")
    assert set_variables(workflow, {"q": "1=2", "n": "4", "l": "p, q"}) == {"q": "1=2", "n": 4, "l": ["p", "q"]}
    settings: dict[str, str]
    for settings, message in (
        ({}, "--set q=VALUE"),
        ({"b": "1"}, "no variable 'b'"),
        ({"q": "", "n": "x"}, "is not a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            set_variables(workflow, settings)


def test_options_that_a_file_says_itself(tmp_path: Path) -> None:
    run = CliRunner()
    file = str(_write(tmp_path, STEP) / "w.yaml")
    for options in (["--branch", "x"], ["--mode", "text"], ["--save", "x"], ["--answer-tokens", "3"], ["--set", "x"]):
        done = run.invoke(main, ["run", file, *options])
        assert done.exit_code == 2, done.output
    task = run.invoke(main, ["run", "Explain my docker-compose.yaml", "-b", "x", "-m", "nowhere.gguf"])
    assert "no such model file" in task.stderr, "with branches, a text that ends like a file is a task"
    assert "cannot be read" in run.invoke(main, ["run", "nowhere.yaml"]).stderr
    assert "for workflow files" in run.invoke(main, ["run", "A task", "-b", "x", "--set", "a=b"]).stderr
    assert run.invoke(main, ["run", "--list"]).stdout.startswith("compare     Argue")
    assert run.invoke(main, ["new", "nothing"]).exit_code == 2
    assert "is there already" in run.invoke(main, ["new", "compare", file]).stderr


def test_interrupted(tmp_path: Path, tiny_path: Path) -> None:
    """The workflow ends with the step that ran, and reports what it has."""
    workflow = read_workflow(_write(tmp_path, TREE) / "w.yaml")
    began = time.monotonic()
    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj:
        seen: list[object] = []
        sampling = Sampling(max_tokens=500, ignore_eos=True)
        for event in run_workflow(
            fj, workflow, {"topic": "x"}, tmp_path, sampling=sampling, stopped=lambda: len(seen) > 9
        ):
            seen.append(event)
        assert isinstance(event.event, Done)
        assert event.event.result.interrupted
        assert event.step == "left"
        assert not open_contexts(fj)
    assert time.monotonic() - began < 60
