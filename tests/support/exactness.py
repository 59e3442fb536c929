"""The page docs/exactness.md and the table docs/exactness.csv, from the distances that test_oracle.py measured."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

_HEAD = """\
# Exactness

`make exact` writes this page and [all its rows](exactness.csv), from tests/test_oracle.py. It compares the runtime
with an independent computation of the method in PyTorch, on models of random weights and, as smollm2, on the default
model with its weights in F32. The numbers are the distance between the logits of the two, over nine tokens of a
prompt and twenty of an answer: the root mean square of the errors, the largest error, and the mean KL divergence in
nats.

A row of the page has the worst of all models, with and without a LoRA. A row of the file has one model, and the worst
of all combinations of a unified cache or streams, a prefix or none, branches of equal or unequal length, and a mapper
or none (of a quarter of them for smollm2). `cache` is the type of K and V, or the types of K/V.

A bound is twice the error, and four times the KL, of the worst of sixteen sequences, eight with the LoRA, in the same
kind of cache without any join, read in batches of the same sizes by llama.cpp's own kernels, and 1e-5 (1e-10 for the
KL) more. `of its bound` is the greatest share of a bound that any row reaches: the test fails above 100 %. In f32 and
without flash attention, the errors are those of gemma3, which is 1e-4 off with a join and without: llama.cpp looks its
GELU up in a table of half-precision numbers. Everything but the bounds is computed with the [kernels](kernels.md) that
this machine uses.
"""


@dataclass(frozen=True)
class Distance:
    """Between the logits [tokens, vocab] of two computations: root mean square and largest difference, and mean KL."""

    rms: float
    worst: float
    kl: float


@dataclass(frozen=True)
class Record:
    """One combination that was run: how far it is from the oracle, and how far the model is without a join."""

    model: str
    kv_type: str
    flash_attn: bool
    lora: bool
    joined: Distance
    plain: Distance


@dataclass(frozen=True)
class Row:
    """The worst of a model's combinations with one cache type, flash attention and LoRA; a line of exactness.csv."""

    model: str
    cache: str
    flash_attention: str
    lora: str
    combinations: int
    logit_error: float
    logit_error_bound: float
    largest: float
    kl: float
    kl_bound: float


def rows_of(records: Iterable[Record]) -> list[Row]:
    """Return a row for each model, cache type, flash attention and LoRA, in the order of the records."""
    groups: dict[tuple[str, str, str, str], list[Record]] = defaultdict(list)
    for r in records:
        groups[r.model, r.kv_type, "on" if r.flash_attn else "off", "on" if r.lora else "off"].append(r)
    return [
        Row(
            *key,
            combinations=len(group),
            logit_error=max(r.joined.rms for r in group),
            logit_error_bound=2 * group[0].plain.rms + 1e-5,
            largest=max(r.joined.worst for r in group),
            kl=max(r.joined.kl for r in group),
            kl_bound=4 * group[0].plain.kl + 1e-10,
        )
        for key, group in groups.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """Return all rows as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(f.name for f in fields(Row))
    for row in rows:
        writer.writerow(f"{value:.1e}" if isinstance(value, float) else value for value in astuple(row))
    return text.getvalue()


def page(rows: Sequence[Row]) -> str:
    """Return the page: the worst for each cache type and flash attention."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.cache, row.flash_attention].append(row)
    columns = (
        "cache",
        "flash attention",
        "combinations",
        "logit error",
        "of its bound",
        "largest error",
        "KL",
        "of its bound",
    )
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for (cache, flash_attention), group in groups.items():
        values = (
            cache,
            flash_attention,
            str(sum(row.combinations for row in group)),
            f"{max(row.logit_error for row in group):.1e}",
            f"{max(row.logit_error / row.logit_error_bound for row in group):.0%}",
            f"{max(row.largest for row in group):.1e}",
            f"{max(row.kl for row in group):.1e}",
            f"{max(row.kl / row.kl_bound for row in group):.0%}",
        )
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join([_HEAD, *lines, "", f"These are {sum(row.combinations for row in rows):,} combinations.", ""])


def write_pages(records: Iterable[Record], folder: Path) -> None:
    """Write exactness.md and exactness.csv into the folder."""
    rows = rows_of(records)
    (folder / "exactness.md").write_text(page(rows), encoding="utf-8")
    (folder / "exactness.csv").write_text(table(rows), encoding="utf-8")
