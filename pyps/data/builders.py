"""Examples from other data sets, of three kinds (docs/method.md, section 4), and from the built-in families."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pyps.data.example import Example, ExampleBranch
from pyps.data.families import FAMILIES, build
from pyps.data.long_spans import LONG_FAMILIES, build_long
from pyps.errors import InputError, missing_extra

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


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
    rows: Iterable[dict[str, Any]]
    try:
        if path.suffix in _FORMATS:
            rows = datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
        else:
            name, _, part = source.partition(":")
            rows = datasets.load_dataset(name, part or None, split=split)
    except Exception as error:
        # whatever a damaged file, an unknown name or a missing network may raise
        raise InputError(f"{source}: cannot be read as a data set: {error}") from None
    return rows


def exposure(rows: Iterable[dict[str, Any]], field: str) -> Iterator[Example]:
    """Yield dialogues of at least three turns, cut into branches; traces of tools are dialogues too.

    The first question is the task, the reply to each question but the last is a branch, the last question is the
    synthesizer's instruction, and the reply to it the target.

    Args:
        rows: The data set.
        field: The field with the dialogue: a list of objects with role and content (or from and value).

    Raises:
        InputError: A row has no such field, or something else in it.
    """
    for row in rows:
        system = None
        turns: list[tuple[str, list[str]]] = []
        for message in _dialogue(row, field):
            role, text = message.get("role") or message.get("from"), message.get("content") or message.get("value")
            if not text:
                continue
            if role == "system":
                system = text
            elif role in ("user", "human"):
                turns.append((text, []))
            elif turns:
                turns[-1][1].append(text)
        pairs = [(question, "\n".join(replies)) for question, replies in turns if replies]
        if len(pairs) < 3:
            continue
        (task, first), *others, (last, target) = pairs
        branches = [
            ExampleBranch(text=first),
            *(ExampleBranch(prompt=question, text=reply) for question, reply in others),
        ]
        yield Example(task=task, system=system, branches=branches, synthesize=last, target=target, family="exposure")


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
        InputError: A row lacks a field.
    """
    all_rows = list(rows)
    rng = random.Random(seed)
    for i, row in enumerate(all_rows):
        texts = _texts(_field(row, documents))
        if len(texts) == 1:
            candidates = {t for j in rng.sample(range(len(all_rows)), min(4 * others + 1, len(all_rows))) if j != i
                          for t in _texts(_field(all_rows[j], documents))}  # fmt: skip
            texts += sorted(candidates - set(texts))[:others]
            rng.shuffle(texts)
        right = _texts(_field(row, answer))
        if texts and right:
            yield Example(
                task=str(_field(row, question)),
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
        InputError: A row lacks a field.
    """
    for row in rows:
        task = str(_field(row, field)).strip()
        right = str(_field(row, answer)).rpartition("####")[2].strip() if answer else ""
        if task:
            yield Example(
                task=task,
                branches=[ExampleBranch()] * branches,
                answer=[right] if right else [],
                family="distillation",
            )


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


def _field(row: dict[str, Any], name: str) -> Any:
    """Return a field of a row, or of an object in it ("answers.text")."""
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise InputError(f"the data have no field {name!r}; they have {', '.join(map(str, row))}")
        value = value[part]
    return value


def _dialogue(row: dict[str, Any], field: str) -> list[dict[str, Any]]:
    messages = _field(row, field)
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{field!r} is not a dialogue: a list of objects with role and content")
    return messages


def _texts(value: Any) -> list[str]:
    """Return the texts of a text, a list of them, or a list of objects that hold one each."""
    if isinstance(value, dict):
        value = value.get("text") or value.get("content") or ""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if not isinstance(value, Sequence):
        return [str(value)]
    return [text for part in value for text in _texts(part)]
