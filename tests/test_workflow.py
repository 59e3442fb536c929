"""The workflow files that come with pyps run on the default model, and mistakes in files are reported."""

import copy
import json
import math
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
from pyps.workflow.file import Number, ToolSpec
from pyps.workflow.run import _environment, _render

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
        (STEP.replace("[b]", "[{prompt: x, tools: [{sql: a, env: {A: b}}]}]"), r"line 4: .*env is for mcp"),
        (STEP.replace("[b]", "[{prompt: x, tools: [{env: {A: b}}]}]"), r"line 4: .*give one of"),
        (STEP.replace("[b]", "[{prompt: x, tools: [{mcp: [a], env: {'A=B': c}}]}]"), r"line 4: .*env.A=B"),
        (STEP.replace("[b]", "[{prompt: x, tools: [{mcp: [a], env: {A: [c]}}]}]"), r"line 4: .*env.A"),
        (STEP.replace("[b]", "[{prompt: x, tools: [shell]}]"), r"line 4: .*calculator"),
        ("a: &x [1]\nb: *x\n", r"line 2: aliases"),
        ("a: [1\nb: 2", r"line \d: not YAML"),
        ("[" * 50_000, "line 1: nested too deeply"),
        (STEP + "a: 2001-99-99\n", "line 5: .*no such key: a"),
        ("\x00", "not YAML"),
        (STEP + "    branches: [c]\n", "line 5: branches is there twice: line 4 has it already"),
        (STEP + STEP, "line 5: steps is there twice: line 1"),
        ("variables: {a: 1, 'a': 2}\n" + STEP, "line 1: a is there twice"),
        ("variables:\n  1: x\n  '1': y\n" + STEP, "line 3: 1 is there twice: line 2"),
        (STEP + "    schema: {properties: {a: {}, b: {}, a: {}}}\n", "line 5: a is there twice"),
        (STEP.replace("[b]", "[{prompt: x, name: y, prompt: z}]"), "line 4: prompt is there twice"),
        ("<<: {description: x}\n" + STEP, "line 1: .*no such key: <<"),
        ("a: !!int x\n", "line 1: the tag .*int is not possible for 'x'"),
        ("a: !!bool yes\n", "line 1: the tag .*bool is not possible for 'yes'"),
        ("a: !!binary aGk=\n", "line 1: the tag .*binary is not possible"),
        ("\na: !!set {b}\n", "line 2: the tag .*set is not possible"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1: the tag .*os.system is not possible"),
        ("a: !mine x\n", "line 1: the tag !mine is not possible"),
        ("? [a]\n: b\n", "line 1: a key must be a text"),
        ("a: 1\n---\nb: 2\n", "line 2: not YAML"),
        (STEP + "    tools: true\n", "line 5: steps.0.tools: nothing here is true or false"),
        (STEP + "    sampling: {max_tokens: true}\n", "line 5: .*nothing here is true or false"),
        (STEP + "    sampling: {max_tokens: yes}\n", "line 5: steps.0.sampling.max_tokens"),
        (STEP + "    sampling: {max_tokens: 1:30}\n", "line 5: steps.0.sampling.max_tokens"),
        ("variables:\n  a: {b: 1}\n" + STEP, "line 2: variables.a: a variable is a text, a number"),
        ("variables:\n  a: [true]\n" + STEP, "line 2: variables.a: a variable is a text, a number"),
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
        (
            STEP.replace("[b]", "[{prompt: x, tools: [{mcp: [a], env: {A: '${NO_SUCH_VARIABLE}'}}]}]"),
            "your environment has no variable NO_SUCH_VARIABLE",
        ),
        (STEP.replace("[b]", "[{prompt: x, tools: [calculator, calculator]}]"), "2 of them are called calculator"),
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


@pytest.mark.parametrize(
    "text",
    ["NO", "no", "yes", "Y", "n", "on", "OFF", "12:30", "1:30.5", "190:20:30", "0555567", "007", "00", "-012", "08",
     "1_000", "0b101", "2001-12-14", "2001-12-14 21:59:43", "=", "<<", "0x", "0o8", "1.2.3", "1e", "+", ".", "v1",
     "TrUe", "nil", "inf", "nan", "1,000", "00.5"],
)  # fmt: skip
def test_what_yaml_1_2_calls_a_text(tmp_path: Path, text: str) -> None:
    workflow = read_workflow(_write(tmp_path, f"variables:\n  x: {text}\n{STEP}") / "w.yaml")
    assert workflow.variables == {"x": text}
    assert set_variables(workflow, {"x": "SE"}) == {"x": "SE"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("5", 5), ("-3", -3), ("+49123", 49123), ("0x1F", 31), ("0o17", 15), ("-0", 0), ("1.10", 1.1),
     ("1.", 1.0), (".5", 0.5), ("1e3", 1000.0), ("12e03", 12000.0), ("-2.50", -2.5), ("0.0", 0.0), ("+.5e-1", 0.05),
     (".inf", math.inf), ("-.INF", -math.inf), ("9" * 5000, math.inf)],
)  # fmt: skip
def test_numbers_keep_their_texts(tmp_path: Path, text: str, value: float) -> None:
    """They are numbers where numbers belong, and as they are written where texts belong."""
    step = f"  - {{name: a, task: {text}, branches: [{text}, {{each: [{text}], prompt: x}}]}}\n"
    workflow = read_workflow(_write(tmp_path, f"variables: {{x: {text}, l: [{text}]}}\nsteps:\n{step}") / "w.yaml")
    values = copy.deepcopy(workflow.variables)
    assert values == {"x": value, "l": [text]}
    assert _render("a", values, "{{ x }} {{ x ~ '' }} {{ '%s' % x }}") == f"{text} {text} {text}"
    assert _render("a", values, "{{ x + 1 }}") == str(value + 1)
    first, second = workflow.steps[0].branches
    assert (workflow.steps[0].task, first.prompt, second.each) == (text, text, [text])
    assert str(set_variables(workflow, {"x": "120"})["x"]) == "120"


def test_numbers_of_options_and_schemas_are_numbers(tmp_path: Path) -> None:
    text = STEP + "    sampling: {temperature: .5, max_tokens: 1e2, top_k: 0x10, stop: [1.0, NO]}\n"
    text += "    schema: {properties: {NO: {enum: [no, 1.50, 0x10, true]}, 1: {maximum: 1.10}}}\n"
    step = read_workflow(_write(tmp_path, text) / "w.yaml").steps[0]
    options = step.sampling
    assert (options.temperature, options.max_tokens, options.top_k) == (0.5, 100, 16)
    assert options.stop == ["1.0", "NO"]
    schema = '{"properties": {"NO": {"enum": ["no", 1.5, 16, true]}, "1": {"maximum": 1.1}}}'
    assert json.dumps(step.json_schema) == schema


def test_the_environment_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    monkeypatch.setenv("MY_HOST", "example.org")
    spec = ToolSpec.model_validate(
        {
            "mcp": ["server"],
            "env": {
                "TOKEN": "${MY_TOKEN}",
                "URL": "https://${MY_HOST}/?t=${MY_TOKEN}",
                "MODE": "read-only",
                "PRICE": "$5 $MY_TOKEN ${} ${1} {{ answer }}",
                "VERSION": Number("1.10"),
            },
        }
    )
    assert _environment(spec.env) == {
        "TOKEN": "s3cret",
        "URL": "https://example.org/?t=s3cret",
        "MODE": "read-only",
        "PRICE": "$5 $MY_TOKEN ${} ${1} {{ answer }}",
        "VERSION": "1.10",
    }


def test_settings_of_the_kind_of_their_defaults(tmp_path: Path) -> None:
    text = "variables: {country: NO, version: 1.10, n: 3, on: true, q: ~}\n" + STEP
    workflow = read_workflow(_write(tmp_path, text) / "w.yaml")
    settings = {"country": "SE", "version": "1.20", "n": " 012", "on": "false", "q": "0555"}
    values = set_variables(workflow, settings)
    shown = _render("a", values, "{{ country }} {{ version }} {{ n }} {{ n + 1 }} {{ q }} {% if on %}on{% endif %}")
    assert shown == "SE 1.20 012 13 0555 "
    for wrong, message in (
        ({"on": "yes"}, "variable on: 'yes' is not true or false"),
        ({"n": "1.5"}, "variable n: '1.5' is not a whole number"),
        ({"version": "NO"}, "variable version: 'NO' is not a number"),
    ):
        with pytest.raises(InputError, match=message):
            set_variables(workflow, {"q": "x", **wrong})


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
