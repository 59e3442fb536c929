"""Pictures, with matplotlib (the optional part "plot"); imported only by what draws one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyps.errors import InputError
from pyps.files import check_writable, whole
from pyps.measure.reports import BenchReport, EvaluationReport, Scores

_FORMATS = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Raise InputError if a picture cannot be saved there."""
    if path.suffix not in _FORMATS:
        raise InputError(f"{path}: pictures are PNG, SVG or PDF")
    check_writable(path, "picture")


def save(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all.

    Raises:
        InputError: The name is not one of a picture, or its folder is missing.
        MachineError: The disk fails.
    """
    check(path)
    with whole(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:])


def write(report: BenchReport | EvaluationReport, path: Path) -> None:
    """Draw a report into a file, as `save` writes it."""
    save(draw_bench(report) if isinstance(report, BenchReport) else draw_evaluation(report), path)


def draw_training(steps: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], batch_size: int) -> Figure:
    """Draw the losses of a training run, from its log's entries (train/report.py)."""
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


def draw_evaluation(report: EvaluationReport) -> Figure:
    """Draw the accuracy by family, and the KL to text synthesis, of each mode."""
    text = report.modes["text"]
    families = list(text.families)
    judged = [name for name in families if text.families[name].accuracy is not None]
    curve = [mode for name, mode in report.modes.items() if name.endswith("%")]
    figure = Figure(figsize=(15 if curve else 11, 4), layout="constrained")
    left, right, *more = figure.subplots(1, 3 if curve else 2, width_ratios=[3, 2, 2] if curve else [3, 2])
    if curve:
        _curve(more[0], report, curve)
    modes = {name: [mode.families[f] for f in judged] for name, mode in report.modes.items()}
    _bars(left, modes, judged, "accuracy")
    left.set_ylim(0, 1)
    left.set_title("right answers, with 95 % intervals", fontsize=10)
    others = {name: list(mode.families.values()) for name, mode in report.modes.items() if name != "text"}
    _bars(right, others, families, "kl", first_colour=1)
    right.set_title("KL to text synthesis, nats a token", fontsize=10)
    if judged:
        left.legend(fontsize=8, ncols=3)
    return figure


def _curve(axes: Axes, report: EvaluationReport, curve: Sequence[Scores]) -> None:
    """Draw the KL to text synthesis against the share of tokens that is read again."""
    axes.plot([mode.again for mode in curve], [mode.kl for mode in curve], "o-", color="C0", label="joined, read again")
    lines = {"cache": ("joined as it is", "C2"), "text, backwards": ("text, the last branch first", "C1")}
    for name, (label, colour) in lines.items():
        axes.axhline(report.modes[name].kl, linestyle="--", color=colour, label=label)
    axes.set_title("KL against the share read again", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_bench(report: BenchReport) -> Figure:
    """Draw how many times sooner the first token comes from caches, and where the time goes."""
    rows = report.rows
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    lines = dict.fromkeys((row.branches, row.prompt) for row in rows)
    for i, (branches, prompt) in enumerate(lines):
        line = sorted(
            (row for row in rows if (row.branches, row.prompt) == (branches, prompt)), key=lambda row: row.tokens
        )
        at = [row.tokens for row in line]
        left.plot(
            at, [row.ratio.value for row in line], "o-", color=f"C{i}", label=f"{branches} branches, prompt of {prompt}"
        )
        least, most = [row.ratio.least for row in line], [row.ratio.most for row in line]
        left.fill_between(at, least, most, color=f"C{i}", alpha=0.15)
    left.set_title("time to first token, text / cache", fontsize=10)
    left.set_xlabel("tokens of each branch")
    left.set_xticks(sorted({row.tokens for row in rows}))
    left.set_ylim(bottom=0)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    names = [f"{row.branches} x {row.tokens}\n+ {row.prompt}" for row in rows]
    joins = [row.join_ms.value for row in rows]
    right.bar(names, joins, label="join", color="C1")
    prompts = [row.cache_ms.value - row.join_ms.value for row in rows]
    right.bar(names, prompts, bottom=joins, label="synthesizer's prompt", color="C0")
    right.plot(names, [row.floor_ms.value for row in rows], "k_", markersize=18, label="floor")
    right.set_title("from caches to the first token, ms", fontsize=10)
    right.tick_params(axis="x", labelsize=8, rotation=90 if len(names) > 8 else 0)
    right.grid(axis="y", alpha=0.3)
    right.margins(y=0.2)
    right.legend(fontsize=8, ncols=3, loc="upper left")
    return figure


def _bars(
    axes: Axes, modes: dict[str, list[Scores]], families: Sequence[str], field: str, first_colour: int = 0
) -> None:
    """Draw a group of bars for each family, one bar for each mode; the scores are in the families' order."""
    width = 0.8 / max(len(modes), 1)
    for i, (mode, scores) in enumerate(modes.items()):
        at = [x + (i - (len(modes) - 1) / 2) * width for x in range(len(families))]
        values = [getattr(score, field) for score in scores]
        spread = None
        if field == "accuracy":
            ends = [score.accuracy_95 or (0.0, 1.0) for score in scores]
            spread = [
                [value - low for value, (low, _) in zip(values, ends, strict=True)],
                [high - value for value, (_, high) in zip(values, ends, strict=True)],
            ]
        axes.bar(at, values, width, yerr=spread, label=mode, color=f"C{i + first_colour}", error_kw={"linewidth": 0.7})
    axes.set_xticks(range(len(families)), families, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
