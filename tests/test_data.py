"""Files of examples, the built-in families, and builders for other data sets."""

import json
import random
import re
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from test_cli import pyps

from pyps.data import builders
from pyps.data.example import Example, read_examples, write_examples
from pyps.data.facts import split
from pyps.data.families import FAMILIES, bare, build, capitalised
from pyps.data.long_facts import LONG_DOMAINS, LongDomain
from pyps.data.long_spans import LONG_FAMILIES, build_long
from pyps.data.topics import TOPICS
from pyps.engine.model import Model
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


def read_long_suite() -> list[Example]:
    return read_examples([Path(str(files("pyps.data") / "suite_long.jsonl"))])


def test_the_long_suite_is_what_the_long_families_give() -> None:
    rng = random.Random("suite-long")
    assert read_long_suite() == [build_long(family, True, rng) for _ in range(40) for family in LONG_FAMILIES]


def contains(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


@pytest.mark.parametrize("family", LONG_FAMILIES)
def test_the_long_families(family: str) -> None:
    """As in the short ones, right answers are right, and nothing else is; no task gives an answer away."""
    tasks: dict[bool, set[str]] = {False: set(), True: set()}
    for held_out in (False, True):
        rng = random.Random(3)
        for _ in range(100):
            e = build_long(family, held_out, rng)
            assert e.family == family
            assert e.target, e
            assert e.is_right(e.target), e
            assert not e.is_right(e.task), e
            assert not any(contains(e.task, a) for a in e.answer), e
            assert not any(e.is_right(wrong) or e.is_right(f"{e.target} Or {wrong}.") for wrong in e.wrong), e
            assert len(e.branches) in ([4] if family == "list" else range(4, 9))
            if family in ("look-up", "combine", "compare", "best"):
                assert len(e.answer) + len(e.wrong) == len({*e.answer, *e.wrong}) == len(e.branches), e
            texts = [b.text or "" for b in e.branches]
            if family != "contradiction":
                assert all(sum(contains(text, a) for text in texts) == 1 for a in e.answer), e
            assert all(7 <= len(re.findall(r"[.](?: |$)", text)) <= 18 for text in texts), e
            tasks[held_out] |= {e.task, *(b.prompt for b in e.branches)}
    assert len(tasks[False]) > 30
    assert not tasks[False] & tasks[True]


def test_the_best_alone_meets_both_conditions() -> None:
    def number(text: str, unit: str) -> int:
        return int(re.findall(rf"(\d+) {unit}", text)[0])

    rng = random.Random(4)
    examples = [build_long("best", True, rng) for _ in range(400)]
    examples = [e for e in examples if re.search(r"less than \d+ degrees", e.task) and "dollars" in e.task]
    assert len(examples) > 5
    for e in examples:
        meets = [
            [number(b.text or "", unit) < number(e.task, unit) for unit in ("degrees", "dollars")] for b in e.branches
        ]
        best = [contains(b.prompt, e.answer[0]) for b in e.branches]
        assert [all(pair) for pair in meets] == best, e
        assert [True, False] in meets
        assert [False, True] in meets


def test_notes_are_long_spans(smollm2_path: Path) -> None:
    model = Model.load(smollm2_path)
    rng = random.Random(5)
    examples = read_long_suite() + [build_long(family, False, rng) for _ in range(40) for family in LONG_FAMILIES]
    for e in examples:
        assert all(100 <= len(model.tokenize(b.text or "")) <= 300 for b in e.branches), e
        assert len(model.tokenize(e.target or "")) < 64
    model.close()


@pytest.mark.parametrize("domain", LONG_DOMAINS, ids=lambda d: d.kind)
def test_fillers_say_nothing_that_is_asked_for(domain: LongDomain) -> None:
    values = chain.from_iterable(f.values for f in domain.fields.values())
    words = [*values, *map(bare, domain.entities), "yes"]
    for text in (*domain.fillers.openings, *domain.fillers.clauses):
        assert not any(contains(text, word) for word in words), text
        assert not re.search(r"\d", text)


def test_no_filler_comes_twice() -> None:
    """Neither in two branches of an example, nor in one that is held out and in one to train on."""
    fragments = [max(c.split("{e}"), key=len) for d in LONG_DOMAINS for c in d.fillers.clauses]
    seen: dict[bool, set[str]] = {False: set(), True: set()}
    for held_out in (False, True):
        rng = random.Random(6)
        for e in (build_long(family, held_out, rng) for _ in range(20) for family in LONG_FAMILIES):
            sentences = [s for b in e.branches for s in re.split(r"(?<=[.]) ", b.text or "")]
            fillers = [(s, f) for s in sentences for f in fragments if f in s or capitalised(f) in s]
            assert len({s for s, _ in fillers}) == len(fillers), e
            seen[held_out] |= {f for _, f in fillers}
    assert len(seen[True]) > 100
    assert not seen[False] & seen[True]


def test_long_examples_to_train_on() -> None:
    examples = list(builders.families(120, False, 0, targets=0.5, long=True))
    assert {e.family for e in examples} == set(LONG_FAMILIES)
    assert 40 < sum(e.target is None for e in examples) < 80
    assert all(e.target is None for e in builders.families(12, True, 0, long=True))


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
