"""Files of examples, the built-in families, and builders for other data sets."""

import datetime
import json
import random
import re
from decimal import Decimal
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import pyps

from pyps.data import builders
from pyps.data.example import Example, ExampleBranch, read_examples, write_examples
from pyps.data.facts import split
from pyps.data.families import FAMILIES, bare, build, capitalised
from pyps.data.long_facts import LONG_DOMAINS, LongDomain
from pyps.data.long_spans import LONG_FAMILIES, build_long
from pyps.data.topics import TOPICS
from pyps.engine.model import Model
from pyps.errors import InputError
from pyps.measure.evaluate import read_suite
from pyps.train.report import read_log

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


# what str.splitlines splits at, and what else a file may lose
ODD = [
    "\u2028",
    "\u2029",
    "\x85",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1d",
    "\x1e",
    "\r",
    "\n",
    "\r\n",
    "\ufeff",
    "\0",
    "\x1a",
    "\u200b",
]


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_odd_characters_go_there_and_back(odd: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    examples = [
        Example(
            task=text,
            branches=[ExampleBranch(prompt=text, text=text, name=text)],
            synthesize=text,
            target=text,
            answer=[text],
        )
        for text in (odd, f"In Rome.{odd}Near the river.", f"{odd}a{odd}{odd}")
    ]
    write_examples(path, examples)
    assert read_examples([path]) == examples
    lines = [json.dumps(GOOD | {"task": f"a{odd}b"}, ensure_ascii=False) for _ in range(2)]
    path.write_bytes("\n".join(lines).encode())
    assert [e.task for e in read_examples([path])] == [f"a{odd}b"] * 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1))
def test_what_is_written_can_be_read(tmp_path: Path, texts: list[str]) -> None:
    branches = [ExampleBranch(text=text, prompt=text) for text in texts]
    examples = [Example(task=t, branches=branches, system=t, target=t, answer=texts, program=t) for t in texts]
    assert write_examples(tmp_path / "d.jsonl", examples) == len(texts)
    assert read_examples([tmp_path / "d.jsonl"]) == examples


@pytest.mark.parametrize("encode", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\r\n\r\n", " \t\n", "\n\ufeff", "\n \ufeff\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_ways_to_write_json_lines(encode: str, end: str, last: bool, tmp_path: Path) -> None:
    tasks = ["a", "b\u2028", "c\x85d"]
    text = end.join(json.dumps(GOOD | {"task": task}, ensure_ascii=False) for task in tasks) + end * last
    (tmp_path / "d.jsonl").write_bytes(text.encode(encode))
    assert [e.task for e in read_examples([tmp_path / "d.jsonl"])] == tasks


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(GOOD).encode("utf-16"),
        json.dumps(GOOD).encode("utf-32"),
        b'{"task": "\xe9", "branches": [{}]}',
        b'{"task": "\\ud800", "branches": [{}]}',
        b'{"task": "\\udc00\\ud800", "branches": [{}]}',
        b'{"task": "\xed\xa0\x80", "branches": [{}]}',
        b'{"task": "a\nb", "branches": [{}]}',
        b"[" * 100_000,
        b'[{"task": "a", "branches": [{}]}]',
        b"null",
        b"\0\0\0\0",
        b'{"task": null, "branches": [{}]}',
        b'{"task": "a", "branches": [null]}',
        b'{"task": "a", "branches": [{"text": ["b"]}]}',
        b'{"task": "a", "branches": [{}], "answer": [5]}',
    ],
)
def test_what_is_no_example_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_examples([path])


@pytest.mark.parametrize("half", ["\ud800", "a\udc80b", "\udc00\ud800"], ids=ascii)
def test_halves_of_surrogate_pairs_are_refused(half: str, tmp_path: Path) -> None:
    """In a file and in an example; what a builder reads is replaced (test_texts_of_all_kinds)."""
    path = tmp_path / "d.jsonl"
    good = Example(**GOOD)
    for bad in (good.model_copy(update={"task": half}), good.model_copy(update={"answer": ["a", half]})):
        with pytest.raises(InputError, match="example 2: cannot be written as JSON"):
            write_examples(path, [good, bad])
    assert not list(tmp_path.iterdir())
    path.write_text(json.dumps(GOOD | {"task": half}))
    with pytest.raises(InputError, match="line 1: Invalid JSON"):
        read_examples([path])


def test_an_example_that_became_wrong_is_not_written(tmp_path: Path) -> None:
    for update, message in (
        ({"task": ""}, "example 1: task: String should have"),
        ({"branches": []}, "example 1: branches: List should have"),
        ({"branches": [ExampleBranch.model_construct(text="")]}, "example 1: branches.0.text: String should have"),
    ):
        with pytest.raises(InputError, match=message):
            write_examples(tmp_path / "d.jsonl", [Example(**GOOD).model_copy(update=update)])
    assert not list(tmp_path.iterdir())


def test_a_damaged_log_loses_only_its_damaged_lines(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [
        b'{"step": 1, "x": "a\xe2\x80\xa8b"}',
        b"\0\0",
        b"null",
        b"5",
        b"{}",
        b'{"kl": 1}',
        b"\xff",
        b"",
        b'{"step": 2, "k',
    ]
    log.write_bytes(b"\n".join(lines))
    assert read_log(log) == ([{"step": 1, "x": "a\u2028b"}], [])


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


TEXT_PART = {"type": "text", "text": "Q"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Q", "Q"),
        (" Q\n", "Q"),
        ([TEXT_PART], "Q"),
        ([TEXT_PART, {"type": "image_url", "image_url": {"url": "x"}}, TEXT_PART], "Q\nQ"),
        (["Q", None, "R"], "Q\nR"),
        (("Q",), "Q"),
        ({"text": "Q"}, "Q"),
        ({"content": [TEXT_PART]}, "Q"),
        ({"text": None, "content": "Q"}, "Q"),
        ({"text": {"value": "Q", "annotations": []}}, "Q"),
        ([{"type": "thinking", "thinking": "t"}, {"type": "reasoning", "text": "t"}, TEXT_PART], "Q"),
        ([{"type": "tool_result", "content": [TEXT_PART]}], "Q"),
        (42, "42"),
        (0, "0"),
        (42.0, "42"),
        (-0.5, "-0.5"),
        (1e300, str(int(1e300))),
        ({"text": 0}, "0"),
        (Decimal("2.50"), "2.50"),
        (True, "True"),
        (datetime.date(2024, 5, 12), "2024-05-12"),
        ("a\ud800b", "a\ufffdb"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\u2028Q\x85", "Q"),
        (None, ""),
        ("", ""),
        (" \n\u2028", ""),
        ([], ""),
        ([None, [None]], ""),
        ({}, ""),
        ({"text": None}, ""),
        ([{"type": "image"}], ""),
        (float("nan"), ""),
        (float("inf"), ""),
        (Decimal("NaN"), ""),
        (b"Q", ""),
        ({"bytes": b"x", "path": None}, ""),
        (object(), ""),
    ],
    ids=repr,
)
def test_texts_of_all_kinds(value: Any, text: str) -> None:
    """Wherever a builder looks for a text; a row without one makes no example."""
    others = {"task": "T", "docs": ["D", "E"], "right": "A"}

    def aggregate(**more: Any) -> list[Example]:
        return list(builders.aggregation([others | more], "task", "docs", "right", 0, 0))

    assert [e.task for e in builders.distillation([{"p": value}], "p", 2)] == [text] * bool(text)
    (one,) = builders.distillation([{"p": "P", "a": value}], "p", 2, "a")
    assert one.answer == [text.partition("\n")[0]] * bool(text)
    assert [e.task for e in aggregate(task=value)] == [text] * bool(text)
    assert [e.target for e in aggregate(right=value)] == [text.partition("\n")[0]] * bool(text)
    assert [[b.text for b in e.branches] for e in aggregate(docs=value)] == [text.split("\n")] * bool(text)
    turns = [{"role": role, "content": c} for c in (value, "Q2", "Q3") for role in ("user", "assistant")]
    assert [e.task.strip() for e in builders.exposure([{"m": turns}], "m")] == [text] * bool(text)


ROLES = [
    ("user", "assistant", "system"),
    ("human", "gpt", "system"),
    ("User", "ASSISTANT", "System"),
    (" user ", "bot", "developer"),
    ("prompter", "model", "DEVELOPER"),
    ("user", "function", "system"),
]


@pytest.mark.parametrize(("user", "other", "system"), ROLES)
@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value"), ("role", "text")])
def test_roles_of_all_kinds(user: str, other: str, system: str, role: str, content: str) -> None:
    chat = [(system, "S"), *((who, f"{t}{i}") for i in range(3) for who, t in ((user, "Q"), (other, "A")))]
    (one,) = builders.exposure([{"m": [{role: who, content: text} for who, text in chat]}], "m")
    assert (one.task, one.system, one.synthesize, one.target) == ("Q0", "S", "Q2", "A2")


def chat_of(*turns: Any) -> dict[str, Any]:
    return {"m": [turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]} for turn in turns]}


THREE = [(role, f"{role[0]}{i}") for i in range(3) for role in ("user", "assistant")]


def test_dialogues_with_gaps() -> None:
    """A question that is no text takes its replies with it; a reply that is none leaves the others."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    picture = {"role": "user", "content": [{"type": "image"}]}
    (one,) = builders.exposure([chat_of(*THREE, picture, ("assistant", "a cat"), call, ("tool", "42"))], "m")
    assert (one.task, one.synthesize, one.target) == ("u0", "u2", "a2")
    (one,) = builders.exposure([chat_of(("assistant", "Hi!"), *THREE[:1], call, *THREE[1:])], "m")
    assert [b.text for b in one.branches] == ["a0", "a1"]
    assert not list(builders.exposure([chat_of(*THREE[:-1]), chat_of(*THREE[1:]), chat_of(picture, *THREE[1:])], "m"))


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"m": None},
        {"m": []},
        {"m": "Q"},
        {"m": [None]},
        {"m": ["Q", "A"] * 3},
        {"m": {"role": "user", "content": "Q"}},
        {"m": 5},
        {"x": 1},
        None,
        chat_of(*((None, text) for _, text in THREE)),
        chat_of(*((5, text) for _, text in THREE)),
        chat_of(*(("", text) for _, text in THREE)),
        chat_of(*({"content": text} for _, text in THREE)),
        chat_of(*(("user", text) for _, text in THREE)),
        chat_of(*(("assistant", text) for _, text in THREE)),
        chat_of(*((role, None) for role, _ in THREE)),
        chat_of(*((role, " ") for role, _ in THREE)),
    ],
    ids=repr,
)
def test_rows_without_a_dialogue_are_left_out(row: Any) -> None:
    rows = [row, chat_of(*THREE), row]
    assert [e.task for e in builders.exposure(rows, "m")] == ["u0"]


def test_rows_without_a_field_are_left_out() -> None:
    rows: list[Any] = [
        {},
        None,
        {"q": None},
        {"q": "Q", "a": None},
        {"q": "Q", "a": {}},
        {"q": "Q", "a": []},
        {"a": "A"},
    ]
    rows += [{"q": "Q", "a": [{}, {"t": "A1"}]}, {"q": "Q", "a": {"t": ["A2", "A3"]}}, {"q": "Q", "a.t": "A4"}]
    assert [e.answer for e in builders.distillation(rows, "q", 1, "a.t")] == [[], [], [], ["A1"], ["A2"], ["A4"]]
    assert [e.target for e in builders.aggregation(rows, "q", "q", "a.t", 0, 0)] == ["A1", "A2", "A4"]
    for message, builder in (
        ("no field 'x'; they have q, a, a.t", builders.distillation(rows, "x", 1)),
        ("no field 'a.x'", builders.distillation(rows, "q", 1, "a.x")),
        ("no field 'x.t'", builders.aggregation(rows, "q", "x.t", "a.t", 0, 0)),
        ("no field 'q.a'", builders.exposure(rows, "q.a")),
        ("'q' is not a dialogue", builders.exposure(rows, "q")),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            list(builder)
    assert not list(builders.distillation([], "x", 1))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text()
            | st.text(st.characters(categories=["Cs"])),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(
                    st.sampled_from(["m", "q", "role", "from", "content", "text", "value", "type"]), inner
                )
                | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": inner}))
            ),
        )
    )
)
def test_no_row_is_a_traceback(tmp_path: Path, rows: list[Any]) -> None:
    rows = [*rows, *({"m": row, "q": row} for row in rows), {"m": [], "q": "Q"}]
    examples = [
        *builders.exposure(rows, "m"),
        *builders.aggregation(rows, "q", "m", "q", 1, 0),
        *builders.distillation(rows, "q", 1, "m"),
    ]
    write_examples(tmp_path / "d.jsonl", examples)
    assert read_examples([tmp_path / "d.jsonl"]) == examples


def test_files_with_nulls(tmp_path: Path) -> None:
    """What the package datasets makes of them: columns of one type, with nulls where a row has nothing."""
    rows = [
        {"q": "Q1", "a": 42},
        {"q": None, "a": 1},
        {"q": "Q2", "a": None},
        {"q": ["Q3", None], "a": "x"},
        {"a": 2.5},
    ]
    assert [(e.task, e.answer) for e in run(tmp_path, rows, "distillation", "--task", "q", "--answer", "a")] == [
        ("Q1", ["42"]), ("Q2", []), ("Q3", ["x"]),
    ]  # fmt: skip
    csv, out = tmp_path / "in.CSV", tmp_path / "out.jsonl"
    csv.write_bytes('\ufeffq,a\r\nQ1,42\r\n,1\r\n"Q\u20282",\r\n'.encode())
    assert pyps("data", "distillation", str(csv), str(out), "--task", "q", "--answer", "a").returncode == 0
    assert [(e.task, e.answer) for e in read_examples([out])] == [("Q1", ["42"]), ("Q\u20282", [])]


def test_a_row_that_cannot_be_decoded_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of sounds, for instance, needs a package of its own when a row is read."""
    import datasets

    def rows() -> Any:
        yield {"q": "Q"}
        raise ImportError("To support decoding audio data, please install 'torchcodec'.")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    with pytest.raises(InputError, match="sounds: cannot be read as a data set: To support decoding"):
        list(builders.distillation(builders.read_rows("sounds", "train"), "q", 1))


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
