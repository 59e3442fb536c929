"""Files of examples, the built-in families, and builders for other data sets."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_cli import pyps

from pyps.data.example import Example, read_examples, write_examples
from pyps.data.facts import split
from pyps.data.families import FAMILIES, build
from pyps.data.topics import TOPICS
from pyps.errors import InputError
from pyps.measure.evaluate import read_suite

GOOD: dict[str, Any] = {"task": "Who?", "branches": [{"text": "It was Ann."}], "target": "Ann."}


def test_mistakes_in_a_file_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    for bad, message in (
        ("{", "line 3: Invalid JSON"),
        ("{}", "line 3: task: Field required"),
        (json.dumps(GOOD | {"branches": []}), "line 3: branches: List should have at least 1 item"),
        (json.dumps(GOOD | {"branches": [{"text": ""}]}), "line 3: branches.0.text: String should have"),
        (json.dumps(GOOD | {"answr": "x"}), "line 3: answr: there is no such key: answr"),
    ):
        path.write_text(f"{json.dumps(GOOD)}\n\n{bad}\n")
        with pytest.raises(InputError, match=message):
            read_examples([path])
    path.write_text("\n")
    with pytest.raises(InputError, match="no examples"):
        read_examples([path])


def test_there_and_back(tmp_path: Path) -> None:
    rng = random.Random(1)
    examples = [build(family, False, rng) for family in (*FAMILIES, "open")]
    path = tmp_path / "new" / "d.jsonl"
    assert write_examples(path, examples) == len(examples)
    assert read_examples([path]) == examples
    with pytest.raises(InputError, match="nothing in the data"):
        write_examples(path, [])
    assert read_examples([path]) == examples
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("It is Oslo, of course.", True),
        ("it is OSLO", True),
        ("Osloites live there", False),
        ("Rome", False),
        ("Oslo or Rome", False),
    ],
)
def test_what_is_right(reply: str, right: bool) -> None:
    assert Example(**GOOD, answer=["Oslo"], wrong=["Rome"]).is_right(reply) is right


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families(family: str) -> None:
    """Right answers are right and can be read from the branches; held-out examples share nothing with the others."""
    seen: dict[bool, set[str]] = {False: set(), True: set()}
    for held_out in (False, True):
        rng = random.Random(3)
        for _ in range(300):
            e = build(family, held_out, rng)
            assert e.family == family
            assert e.target, e
            assert e.is_right(e.target), e
            assert len(e.branches) > 1
            if family != "contradiction":
                texts = " ".join(b.text or "" for b in e.branches)
                assert all(a.lower() in texts.lower() for a in e.answer), e
            seen[held_out] |= {e.task, *(b.prompt for b in e.branches if b.prompt)}
    assert len(seen[False]) > 30
    assert not seen[False] & seen[True]


def test_topics_are_split() -> None:
    training, held_out = (split(TOPICS, flag) for flag in (False, True))
    assert len(training) > 40
    assert len(held_out) > 10
    assert not {t for t, _ in training} & {t for t, _ in held_out}


def test_the_suite_is_what_the_families_give() -> None:
    rng = random.Random("suite")
    assert read_suite() == [build(family, True, rng) for _ in range(40) for family in FAMILIES]


def run(tmp_path: Path, rows: list[Any], *words: str) -> list[Example]:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = pyps("data", words[0], str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), *words[1:])
    assert done.returncode == 0, done.stderr
    examples = read_examples([tmp_path / "out.jsonl"])
    assert done.stdout == f"{tmp_path / 'out.jsonl'}: {len(examples)} examples\n"
    return examples


def test_exposure(tmp_path: Path) -> None:
    def say(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    dialogue = [say("system", "Be kind."), say("user", "Q1"), say("assistant", "A1"), say("user", "Q2")]
    dialogue += [say("assistant", "I look."), say("tool", "42"), say("assistant", "A2"), say("user", "Q3")]
    short = [say("user", "Q1"), say("assistant", "A1")]
    (one,) = run(
        tmp_path, [{"chat": [*dialogue, say("assistant", "A3")]}, {"chat": short}], "exposure", "--messages", "chat"
    )
    assert (one.task, one.system, one.synthesize, one.target) == ("Q1", "Be kind.", "Q3", "A3")
    assert [(b.prompt, b.text) for b in one.branches] == [("", "A1"), ("Q2", "I look.\n42\nA2")]


def test_aggregation(tmp_path: Path) -> None:
    rows = [{"question": f"Q{i}", "context": f"C{i}", "answers": {"text": [f"A{i}", "B"]}} for i in range(9)]
    examples = run(tmp_path, rows, "aggregation", "--others", "2")
    assert len(examples) == 9
    for i, e in enumerate(examples):
        assert (e.task, e.target, e.answer) == (f"Q{i}", f"A{i}", [f"A{i}"])
        assert len(e.branches) == 3
        assert f"C{i}" in [b.text for b in e.branches]
    several = [{"question": "Q", "docs": [{"text": "one"}, {"text": "two"}], "right": "R"}]
    (one,) = run(tmp_path, several, "aggregation", "--documents", "docs", "--answer", "right")
    assert [b.text for b in one.branches] == ["one", "two"]
    assert one.target == "R"


def test_distillation(tmp_path: Path) -> None:
    one, two = run(tmp_path, [{"prompt": "P1"}, {"prompt": " "}, {"prompt": "P2"}], "distillation", "--branches", "2")
    assert (one.task, two.task) == ("P1", "P2")
    assert len(one.branches) == 2
    assert one.branches[0].text is None
    assert one.target is None


def test_mistakes_in_data_sets(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "P"}\n')
    for words, message in (
        (["distillation", str(path), str(out), "--task", "x"], "no field 'x'; they have prompt"),
        (["exposure", str(path), str(out), "--messages", "prompt"], "is not a dialogue"),
        (["distillation", str(tmp_path / "no.jsonl"), str(out)], "cannot be read as a data set"),
        (["distillation", str(path), str(tmp_path)], "is a folder: name the file of examples to write"),
    ):
        done = pyps("data", *words)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not out.exists()
    path.write_text('{"prompt": \n')
    assert "cannot be read as a data set" in pyps("data", "distillation", str(path), str(out)).stderr
