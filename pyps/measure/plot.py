"""Pictures, with matplotlib (pyps[plot]); imported only by what draws one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyps.errors import InputError

_FORMATS = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Raises InputError if a picture cannot be saved there."""
    if path.suffix not in _FORMATS:
        raise InputError(f"{path}: pictures are PNG, SVG or PDF")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written: no such folder, or not yours")


def save(figure: Figure, path: Path) -> None:
    """Whole or not at all. Raises InputError."""
    check(path)
    partial = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(partial, dpi=120, format=path.suffix[1:])
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def draw_training(steps: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], batch_size: int) -> Figure:
    """The losses of a run, from its log's entries (train/report.py)."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, title in (
        (left, "kl", "KL to text synthesis, nats a token"),
        (right, "ce", "cross-entropy of the target, nats a token"),
    ):
        values = [s[key] for s in steps]
        width = max(len(values) // 40, 1)
        recent = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
        smooth = [sum(r) / len(r) for r in recent]
        axes.plot([s["step"] * batch_size for s in steps], smooth, color="0.6", label="training")
        if held_out:
            at = [h["step"] * batch_size for h in held_out]
            axes.plot(at, [h["held_out"][key] for h in held_out], "o-", color="C0", label="held out")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("examples")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def draw_evaluation(modes: dict[str, Any]) -> Figure:
    """Accuracy by family, and KL to text synthesis, of each mode (evaluate.summarise)."""
    families = list(next(iter(modes.values()))["families"])
    judged = [f for f in families if next(iter(modes.values()))["families"][f]["accuracy"] is not None]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    _bars(left, modes, judged, "accuracy")
    left.set_ylim(0, 1)
    left.set_title("right answers, with 95 % intervals", fontsize=10)
    _bars(right, {m: v for m, v in modes.items() if m != "text"}, families, "kl", first_colour=1)
    right.set_title("KL to text synthesis, nats a token", fontsize=10)
    if judged:
        left.legend(fontsize=8, ncols=3)
    return figure


def draw_bench(rows: Sequence[dict[str, Any]]) -> Figure:
    """How many times sooner the first token comes from caches, and where the time goes (rows of bench.measure)."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    lines = dict.fromkeys((r["branches"], r["prompt"]) for r in rows)
    for i, (branches, prompt) in enumerate(lines):
        mine = sorted(
            (r for r in rows if (r["branches"], r["prompt"]) == (branches, prompt)), key=lambda r: r["tokens"]
        )
        at, ratios = [r["tokens"] for r in mine], [r["ratio"] for r in mine]
        left.plot(at, ratios, "o-", color=f"C{i}", label=f"{branches} branches, prompt of {prompt}")
        left.fill_between(at, *zip(*(r["ratio_spread"] for r in mine), strict=True), color=f"C{i}", alpha=0.15)
    left.set_title("time to first token, text / cache", fontsize=10)
    left.set_xlabel("tokens of each branch")
    left.set_xticks(sorted({r["tokens"] for r in rows}))
    left.set_ylim(bottom=0)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    names = [f"{r['branches']} x {r['tokens']}\n+ {r['prompt']}" for r in rows]
    right.bar(names, [r["join_ms"] for r in rows], label="join", color="C1")
    rest = [r["cache_ms"] - r["join_ms"] for r in rows]
    right.bar(names, rest, bottom=[r["join_ms"] for r in rows], label="synthesizer's prompt", color="C0")
    right.plot(names, [r["floor_ms"] for r in rows], "k_", markersize=18, label="floor")
    right.set_title("from caches to the first token, ms", fontsize=10)
    right.tick_params(axis="x", labelsize=8, rotation=90 if len(names) > 8 else 0)
    right.grid(axis="y", alpha=0.3)
    right.margins(y=0.2)
    right.legend(fontsize=8, ncols=3, loc="upper left")
    return figure


def _bars(axes: Axes, modes: dict[str, Any], families: Sequence[str], key: str, first_colour: int = 0) -> None:
    width = 0.8 / max(len(modes), 1)
    for i, (mode, measures) in enumerate(modes.items()):
        at = [x + (i - (len(modes) - 1) / 2) * width for x in range(len(families))]
        values = [measures["families"][f][key] for f in families]
        spread = None
        if key == "accuracy":
            ends = [measures["families"][f]["accuracy_95"] for f in families]
            spread = [
                [v - e[0] for v, e in zip(values, ends, strict=True)],
                [e[1] - v for v, e in zip(values, ends, strict=True)],
            ]
        axes.bar(at, values, width, yerr=spread, label=mode, color=f"C{i + first_colour}", error_kw={"linewidth": 0.7})
    axes.set_xticks(range(len(families)), families, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
