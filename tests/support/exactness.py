"""The page docs/exactness.md, from the distances that test_oracle.py measured."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_COLUMNS = (
    "model",
    "cache",
    "flash attention",
    "LoRA",
    "combinations",
    "logit error",
    "bound",
    "largest",
    "KL",
    "bound",
)

_HEAD = """\
# Exactness

Written by `make exact` (tests/test_oracle.py): the runtime against an independent PyTorch computation of
the method, on random-weight models and, as smollm2, on the default model with its weights in F32. Each row
has the worst of all combinations of unified cache or streams, prefix or none, equal or unequal branches,
mapper or none (a quarter of them for smollm2), over nine tokens of a prompt and twenty of an answer: root
mean square of the logits' errors, the largest of them, and mean KL divergence in nats. `cache` is the type
of K and V, or of K/V. The bounds are twice the error, and four times the KL, of the worst of eight sequences
in the same kind of cache without any join, read in batches of the same sizes; and 1e-5. (gemma3 is 1e-4 off
in f32, with a join and without: llama.cpp looks its GELU up in a table of half-precision numbers.)
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


def page(records: Sequence[Record]) -> str:
    """Return the page: a row for each model, cache type, flash attention and LoRA."""
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for r in records:
        groups[r.model, r.kv_type, "on" if r.flash_attn else "off", "on" if r.lora else "off"].append(r)
    rows = [f"| {' | '.join(_COLUMNS)} |", f"|{' --- |' * len(_COLUMNS)}"]
    for key, group in groups.items():
        plain = group[0].plain
        values = (
            max(r.joined.rms for r in group),
            2 * plain.rms + 1e-5,
            max(r.joined.worst for r in group),
            max(r.joined.kl for r in group),
            4 * plain.kl + 1e-10,
        )
        rows.append(f"| {' | '.join([*key, str(len(group)), *(f'{x:.1e}' for x in values)])} |")
    return "\n".join([_HEAD, *rows, "", f"{len(records)} combinations.", ""])
