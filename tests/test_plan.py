"""The plan of a fork-join: prompts, cells and refusals, without a context."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from support.tiny import write_model

from pyps import Branch, InputError, RefusedError, Sampling
from pyps.engine.model import Model
from pyps.forkjoin.plan import Plan, Setting, make_plan
from pyps.forkjoin.request import Options, Request
from pyps.forkjoin.synthesis import ContextOptions

TASK = "Which database?"
SAMPLING = Sampling(max_tokens=20, seed=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model.load(write_model(tmp_path_factory.mktemp("plan") / "tiny.gguf"))
    yield model
    model.close()


@pytest.fixture
def setting(model: Model) -> Iterator[Setting]:
    yield Setting(model=model, adapter=None, layout="shared", options=ContextOptions(), n_ctx=None, why_not_joinable="")
    assert not list(model.contexts), "a plan is made without contexts"


def planned(setting: Setting, *branches: str | Branch, **options: Any) -> Plan:
    return make_plan(Request(task=TASK, branches=branches, **{"sampling": SAMPLING, **options}), setting, seed=1)


def test_options_are_the_fields_of_a_request() -> None:
    """They are described once, in Request; Options only tells type checkers about them."""
    types = get_type_hints(Request)
    names = [f.name for f in fields(Request) if f.name not in ("task", "branches")]
    assert list(get_type_hints(Options)) == names
    assert {name: types[name] for name in names} == get_type_hints(Options)


def test_seeds_names_and_cells(setting: Setting) -> None:
    plan = planned(setting, "a", Branch("b", name="second", sampling=Sampling(max_tokens=50, seed=3)), "c")
    assert plan.seed == 7
    assert [b.name for b in plan.branches] == ["branch-1", "second", "branch-3"]
    assert [b.assignment.sampling.seed for b in plan.branches] == [7, 3, 9]
    assert [b.max_output for b in plan.branches] == [20, 50, 20]
    assert plan.branch_cells == len(plan.prefix) + max(len(b.prompt) + b.max_output for b in plan.branches)
    answer = plan.answer
    assert answer is not None
    assert answer.assignment.sampling.seed == 7
    assert answer.cells == plan.branch_point + 90 + len(answer.prompt)
    assert answer.after == 20
    assert plan.branch_point == len(plan.prefix)
    assert planned(replace(setting, layout="paper"), "a").branch_point == 0


def test_room_comes_after_the_answer(setting: Setting) -> None:
    answer = planned(setting, "a", room=100).answer
    assert answer is not None
    assert answer.after == 120


def test_a_branch_with_a_task_of_its_own_keeps_what_it_has_in_common(setting: Setting) -> None:
    plan = planned(
        setting, "a", Branch("a", task="Which colour?"), Branch("a", system="Be brief."), Branch("a", task=TASK)
    )
    n = len(plan.prefix)
    text = [setting.model.text([*plan.prefix[: b.fork_point], *b.prompt]) for b in plan.branches]
    assert [b.fork_point == n for b in plan.branches] == [True, False, False, True]
    assert plan.branches[1].fork_point > plan.branches[2].fork_point
    assert "Which colour?" in text[1]
    assert TASK not in text[1]
    assert "Be brief." in text[2]
    assert TASK in text[2]
    assert text[3] == text[0]
    assert plan.branch_cells >= max(b.fork_point + len(b.prompt) + b.max_output for b in plan.branches)


@pytest.mark.parametrize(
    ("branches", "options", "message"),
    [
        ([], {}, "there are no branches"),
        (["x"] * 257, {}, "257 branches are too many"),
        (["x"], {"task": " "}, "the task is empty"),
        (["x"], {"task": []}, "the task is empty"),
        (["x"], {"task": 5}, "must be a text or a list of messages, not int"),
        (["x"], {"task": [{"role": "user"}]}, "content of message 1 must be a text, not NoneType"),
        (["x"], {"task": [{"role": "robot", "content": "a"}]}, "message 1 has the role 'robot'"),
        (["x"], {"task": ["a"]}, "message 1 must be an object"),
        (["x"], {"task": [{"role": "user", "content": "a", "tool_calls": []}]}, "has 'tool_calls'"),
        (
            ["x"],
            {"task": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            "message 2 is a system message",
        ),
        ([Branch("x", task="")], {}, "the task is empty"),
        (["x"], {"mode": "other"}, "mode 'other' does not exist"),
        (["x"], {"mode": "text", "compare": True}, "compare and keep are for cache synthesis"),
        (["x"], {"room": -1}, "there cannot be room for -1 tokens"),
        (["x"], {"sampling": Sampling(max_tokens=3000)}, "a branch may need .* was trained on 2,048"),
        ([Branch("x", joined="nothing")], {}, "joined must be one of"),  # type: ignore[arg-type]
        (["x"], {"join": "nothing"}, "only Branches can be joined"),
        (["x"], {"save": Path("/nowhere/x")}, "there is no folder /nowhere"),
    ],
)
def test_what_is_wrong_is_found_before_any_work(
    setting: Setting, branches: list[str | Branch], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(Request(**{"task": TASK, "branches": branches, **options}), setting, seed=1)


def test_limits_and_refusals(setting: Setting) -> None:
    with pytest.raises(InputError, match=r"the synthesizer may need .* the limit given is 90"):
        planned(replace(setting, n_ctx=90), "a", "b", "c")
    refused = replace(setting, why_not_joinable="caches of 'x' models cannot be joined: so it is")
    with pytest.raises(RefusedError, match=r"so it is\. Text mode"):
        planned(refused, "a")
    assert planned(refused, "a", mode="text").answer
    with pytest.raises(RefusedError):
        make_plan(Request(task=TASK, branches=["a"]), refused, seed=1, answer=False)
