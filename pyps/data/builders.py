"""Examples from what one has: the three kinds of METHOD, section 4, from any data set; and the built-in families."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pyps.data.example import Example, ExampleBranch
from pyps.data.families import FAMILIES, build
from pyps.errors import InputError

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_rows(source: str, split: str) -> Iterable[dict[str, Any]]:
    """The rows of a JSON, JSON lines, CSV or Parquet file, or of a data set on the Hugging Face hub ("squad",
    "openai/gsm8k:main"). Raises InputError."""
    try:
        import datasets
    except ImportError:
        raise InputError("data sets are read by the package datasets: pip install 'pyps-llama[data]'") from None
    datasets.disable_progress_bars()
    path = Path(source)
    try:
        if path.suffix in _FORMATS:
            return datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
        name, _, part = source.partition(":")
        return datasets.load_dataset(name, part or None, split=split)
    except Exception as error:
        # whatever a damaged file, an unknown name or a missing network may raise
        raise InputError(f"{source}: cannot be read as a data set: {error}") from None


def exposure(rows: Iterable[dict[str, Any]], field: str) -> Iterator[Example]:
    """Dialogues of at least three turns, tool traces among them, cut into branches: the first question is the task,
    what was said to each question is a branch, and the last question is the synthesizer's."""
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
        told = [(asked, "\n".join(said)) for asked, said in turns if said]
        if len(told) < 3:
            continue
        (task, first), *others, (last, target) = told
        branches = [ExampleBranch(text=first), *(ExampleBranch(prompt=asked, text=said) for asked, said in others)]
        yield Example(task=task, system=system, branches=branches, synthesize=last, target=target, family="exposure")


def aggregation(
    rows: Iterable[dict[str, Any]], question: str, documents: str, answer: str, others: int, seed: int
) -> Iterator[Example]:
    """A question, and a branch for each document, or for each of several answers. To a single document, those of
    `others` other rows are added."""
    all_rows = list(rows)
    rng = random.Random(seed)
    for i, row in enumerate(all_rows):
        texts = _texts(_field(row, documents))
        if len(texts) == 1:
            found = {t for j in rng.sample(range(len(all_rows)), min(4 * others + 1, len(all_rows))) if j != i
                     for t in _texts(_field(all_rows[j], documents))}  # fmt: skip
            texts += sorted(found - set(texts))[:others]
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
    """Tasks alone: the model generates the branches, and the text synthesizer the target. With the field of the answer,
    of which what follows "####" counts (GSM8K), they can be evaluated too."""
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


# the easy ones once in ten, the others twice
_TURNS = (*FAMILIES, "look-up", "combine", "list", "compare")


def families(n: int, held_out: bool, seed: int, targets: float = 0.5) -> Iterator[Example]:
    """The built-in ones, in turn; every 25th is open: with branches to generate, one costs as much as five others.
    Those to train on have a target in this share of cases: they teach what is right, the others what the text
    synthesizer says. Those to measure on have none."""
    rng = random.Random(f"{seed} {held_out}")
    turns = FAMILIES if held_out else _TURNS
    for i in range(n):
        family = "open" if i % 25 == 24 else turns[i % len(turns)]
        example = build(family, held_out, rng)
        yield example if not held_out and rng.random() < targets else example.model_copy(update={"target": None})


def _field(row: dict[str, Any], name: str) -> Any:
    """A field of a row, also of an object in it ("answers.text"). Raises InputError."""
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
    """Of a text, a list of them, or a list of objects that have one each."""
    if isinstance(value, dict):
        value = value.get("text") or value.get("content") or ""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if not isinstance(value, Sequence):
        return [str(value)]
    return [text for part in value for text in _texts(part)]
