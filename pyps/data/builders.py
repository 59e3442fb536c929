"""Examples from other data sets, of three kinds (docs/method.md, section 4), and from the built-in families.

A row makes no example if a text that it needs is missing. Data sets write texts in many ways: as content parts, as
numbers, as objects that hold one; nulls, pictures and the like are no texts.
"""

import datetime
import math
import random
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from pyps.data.example import Example, ExampleBranch
from pyps.data.families import FAMILIES, build
from pyps.data.long_spans import LONG_FAMILIES, build_long
from pyps.errors import InputError, missing_extra

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

_SYSTEM, _USER = ("system", "developer"), ("user", "human", "prompter")  # roles; all others reply
_TEXT_KEYS = ("text", "content", "value")  # of an object that holds a text
_THOUGHTS = ("thinking", "reasoning")  # types of content parts that nobody says
_MISSING = object()  # a field that a row lacks


def read_rows(source: str, split: str) -> Iterable[dict[str, Any]]:
    """Return the rows of a data set.

    Args:
        source: A JSON, JSON lines, CSV or Parquet file, or the name of a data set on the Hugging Face hub, with the
            configuration behind a colon if it needs one ("squad", "openai/gsm8k:main").
        split: Which part of a data set on the hub.

    Raises:
        InputError: The package datasets is missing, or the data cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise missing_extra("data sets are read by the package datasets", "data") from None
    datasets.disable_progress_bars()
    path = Path(source)
    kind = _FORMATS.get(path.suffix.lower())
    try:
        if kind:
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            name, _, part = source.partition(":")
            rows = datasets.load_dataset(name, part or None, split=split)
    except Exception as error:
        # whatever a damaged file, an unknown name or a missing network may raise
        raise _unreadable(source, error) from None
    return _decoded(rows, source)


def _decoded(rows: Iterable[dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    """Yield rows, which are decoded one by one: a picture may need a package that is missing."""
    try:
        yield from rows
    except Exception as error:
        raise _unreadable(source, error) from None


def _unreadable(source: str, error: Exception) -> InputError:
    # the package datasets keeps the reason in the cause
    return InputError(f"{source}: cannot be read as a data set: {error.__cause__ or error}")


def exposure(rows: Iterable[dict[str, Any]], field: str) -> Iterator[Example]:
    """Yield dialogues of at least three turns, cut into branches; traces of tools are dialogues too.

    The first question is the task, the reply to each question but the last is a branch, the last question is the
    synthesizer's instruction, and the reply to it the target.

    Args:
        rows: The data set.
        field: The field with the dialogue: a list of objects with role and content (or from and value).

    Raises:
        InputError: No row has such a field, or none has a dialogue in it.
    """
    others = 0  # rows with something else in the field
    n = 0
    for (messages,) in _values(rows, field):
        if not _is_dialogue(messages):
            others += messages is not None
            continue
        n += 1
        system, turns = _turns(messages)
        pairs = [(question, "\n".join(replies)) for question, replies in turns if question and replies]
        if len(pairs) < 3:
            continue
        (task, first), *middle, (last, target) = pairs
        branches = [
            ExampleBranch(text=first),
            *(ExampleBranch(prompt=question, text=reply) for question, reply in middle),
        ]
        yield Example(task=task, system=system, branches=branches, synthesize=last, target=target, family="exposure")
    if others and not n:
        raise InputError(f"{field!r} is not a dialogue: a list of objects with role and content")


def aggregation(
    rows: Iterable[dict[str, Any]], question: str, documents: str, answer: str, others: int, seed: int
) -> Iterator[Example]:
    """Yield questions with a branch for each document, or for each of several answers.

    Args:
        rows: The data set.
        question: The field with the question.
        documents: The field with the documents: a text, a list of texts, or of objects that hold one each.
        answer: The field with the right answer, in the same forms; the first text counts.
        others: Number of documents of other rows that are added if a row has only one.
        seed: Chooses those, and the order.

    Raises:
        InputError: No row has one of the fields.
    """
    all_rows = [
        (_text(task).strip(), _texts(of_row), _texts(right))
        for task, of_row, right in _values(rows, question, documents, answer)
    ]
    rng = random.Random(seed)
    for i, (task, of_row, right) in enumerate(all_rows):
        texts = list(of_row)
        if len(texts) == 1:
            candidates = {t for j in rng.sample(range(len(all_rows)), min(4 * others + 1, len(all_rows))) if j != i
                          for t in all_rows[j][1]}  # fmt: skip
            texts += sorted(candidates - set(texts))[:others]
            rng.shuffle(texts)
        if task and texts and right:
            yield Example(
                task=task,
                branches=[ExampleBranch(text=text) for text in texts],
                target=right[0],
                answer=right[:1],
                family="aggregation",
            )


def distillation(
    rows: Iterable[dict[str, Any]], field: str, branches: int, answer: str | None = None
) -> Iterator[Example]:
    """Yield tasks alone: the model generates the branches, and text synthesis the target.

    Args:
        rows: The data set.
        field: The field with the task.
        branches: Number of branches.
        answer: The field with the right answer, for `pyps eval`; if it has "####" in it, as in GSM8K, only what follows
            counts. None if there is none.

    Raises:
        InputError: No row has one of the fields.
    """
    for text, *right in _values(rows, field, *([answer] if answer else [])):
        task = _text(text).strip()
        answers = [last for first in _texts(right)[:1] if (last := first.rpartition("####")[2].strip())]
        if task:
            yield Example(task=task, branches=[ExampleBranch()] * branches, answer=answers, family="distillation")


# majority and contradiction are easy: they come once in ten, the others twice
_TURNS = (*FAMILIES, "look-up", "combine", "list", "compare")


def families(n: int, held_out: bool, seed: int, targets: float = 0.5, long: bool = False) -> Iterator[Example]:
    """Yield examples of the built-in families in turn.

    Every 25th is open, unless they are long: it has branches to generate, and costs as much as five others.

    Args:
        n: Number of examples.
        held_out: Whether they are to measure on, and have entities, values and questions that the others do not.
        seed: Chooses among all that is possible.
        targets: Share of the examples to train on that have a target. A target teaches what is right; without one, what
            text synthesis says is learned. Those to measure on have none.
        long: Whether their branches are notes of 100 to 300 tokens (long_spans.py).
    """
    rng = random.Random(f"{seed} {held_out}")
    turns = LONG_FAMILIES if long else FAMILIES if held_out else _TURNS
    for i in range(n):
        family = "open" if i % 25 == 24 and not long else turns[i % len(turns)]
        example = (build_long if long else build)(family, held_out, rng)
        yield example if not held_out and rng.random() < targets else example.model_copy(update={"target": None})


def _values(rows: Iterable[dict[str, Any]], *fields: str) -> Iterator[list[Any]]:
    """Yield the values of fields of each row, None where it lacks one.

    Raises:
        InputError: No row has one of the fields.
    """
    keys: dict[str, None] = {}  # of all rows, in order
    missing = set(fields)
    for row in filter(lambda row: isinstance(row, dict), rows):
        keys |= dict.fromkeys(map(str, row))
        values = [_field(row, field) for field in fields]
        missing -= {field for field, value in zip(fields, values, strict=True) if value is not _MISSING}
        yield [None if value is _MISSING else value for value in values]
    for field in fields:
        if keys and field in missing:
            raise InputError(f"the data have no field {field!r}; they have {', '.join(keys)}")


def _field(value: Any, name: str) -> Any:
    """Return a field of a row, or of an object or of all objects of a list in it ("answers.text")."""
    if isinstance(value, list):
        values = [_field(part, name) for part in value]
        return [v for v in values if v is not _MISSING] if any(v is not _MISSING for v in values) else _MISSING
    if not isinstance(value, dict):
        return _MISSING
    first, dot, rest = name.partition(".")
    if name in value or not dot:
        return value.get(name, _MISSING)
    return _field(value.get(first), rest)


def _is_dialogue(messages: Any) -> bool:
    """Return whether messages are a list of objects whose roles are texts."""
    return isinstance(messages, list) and all(isinstance(m, dict) and _role(m) for m in messages)


def _role(message: dict[str, Any]) -> str:
    role = message.get("role") or message.get("from")
    return role.strip().lower() if isinstance(role, str) else ""


def _turns(messages: list[dict[str, Any]]) -> tuple[str | None, list[tuple[str, list[str]]]]:
    """Return the system message, and each question (empty if it is no text) with the texts that reply to it."""
    system = None
    turns: list[tuple[str, list[str]]] = []
    for message in messages:
        role, text = _role(message), _text(message)
        if role in _USER:
            turns.append((text, []))
        elif text and role in _SYSTEM:
            system = text
        elif text and turns:
            turns[-1][1].append(text)
    return system, turns


def _text(value: Any) -> str:
    """Return the text of a value, its parts on lines of their own; empty if there is none."""
    return "\n".join(_parts(value))


def _texts(value: Any) -> list[str]:
    """Return the texts of a text, a list of them, or a list of objects that hold one each."""
    return [text.strip() for text in _parts(value)]


def _parts(value: Any) -> list[str]:
    """Return every text in a value that is not blank."""
    if isinstance(value, dict):
        candidates = [] if value.get("type") in _THOUGHTS else [_parts(value.get(key)) for key in _TEXT_KEYS]
        return next(filter(None, candidates), [])
    if isinstance(value, list | tuple):
        return [text for part in value for text in _parts(part)]
    text = _scalar(value)
    return [text] if text.strip() else []


def _scalar(value: Any) -> str:
    """Return a text, a number or a date as text; empty for everything else, as None, bytes and pictures."""
    if isinstance(value, float | Decimal):
        # a column of whole numbers and nulls is read as floats
        return "" if not math.isfinite(value) else str(int(value)) if value == int(value) else str(value)
    if isinstance(value, int | datetime.date | datetime.time):
        return str(value)
    # half of a surrogate pair cannot be written to a file
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else ""
