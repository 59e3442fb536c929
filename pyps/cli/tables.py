"""Tables for people: files of branches, and what measurements found."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from pyps.cli.common import literal
from pyps.cli.display import one_line
from pyps.forkjoin.slots import Slots

if TYPE_CHECKING:
    from pyps.measure.reports import BenchReport, BenchRow, EvaluationReport, JobRow, Median, ModeScores, StepRow


def show_slots(console: Console, slots: Slots) -> None:
    """Print what a file of branches is, and the beginning of each branch."""
    _print(
        console,
        f"{len(slots.branches)} branches of {slots.model} ({slots.arch}); {len(slots.tokens):,} cells of "
        f"{len(slots.layers)} layers, {slots.kv_type}, {slots.n_bytes / 1e6:,.1f} MB",
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("name", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("instruction", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("text", no_wrap=True, overflow="ellipsis", max_width=max(console.width - 64, 16))
    for branch in slots.branches:
        texts = (literal(one_line(text)) for text in (branch.name, branch.prompt, branch.text))
        table.add_row(f"{branch.tokens:,}", *texts)
    console.print(table)


def show_evaluation(console: Console, report: "EvaluationReport") -> None:
    """Print the scores of each mode, over all examples and by family."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "right", "95 %", "than text", "95 %", "KL", "KL first", "agreement", "read", "ms"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, mode in report.modes.items():
        right = interval = more = more_interval = ""
        if mode.accuracy is not None and mode.accuracy_95 is not None:
            low, high = mode.accuracy_95
            right, interval = f"{mode.accuracy:.1%}", f"{low:.0%} to {high:.0%}"
        if mode.difference is not None and mode.difference_95 is not None and name != "text":
            low, high = mode.difference_95
            more, more_interval = f"{mode.difference:+.1%}", f"{low:+.0%} to {high:+.0%}"
        measures = (f"{mode.kl:.3f}", f"{mode.kl_first:.3f}", f"{mode.agreement:.0%}", f"{mode.again:.0%}")
        table.add_row(literal(name), right, interval, more, more_interval, *measures, f"{mode.ttft_ms:.0f}")
    adapter = f", adapter {report.adapter}" if report.adapter else ""
    _print(console, f"{report.model}{adapter}, {report.layout} layout, {report.examples} examples")
    _print(console, f"read again: {report.reading}")
    console.print(table)
    _show_families(console, report.modes, "accuracy", "right", "{:.0%}")
    _show_families(console, report.modes, "kl", "KL", "{:.3f}")


def _show_families(console: Console, modes: "dict[str, ModeScores]", field: str, title: str, form: str) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column(f"\n{title}", no_wrap=True)
    for family in modes["text"].families:
        table.add_column(literal(f"\n{family}"), justify="right", no_wrap=True)
    for name, mode in modes.items():
        values = [getattr(scores, field) for scores in mode.families.values()]
        table.add_row(literal(name), *("" if value is None else form.format(value) for value in values))
    console.print(table)


def show_bench(console: Console, report: "BenchReport") -> None:
    """Print what was measured and where, and the rows in two tables."""
    m = report.machine
    adapter = ", with its adapter" if report.adapter else ""
    rates = ""
    if m.read_gb_s is not None and m.compute_gflop_s is not None:
        rates = f" (read {m.read_gb_s:.0f} GB/s, do {m.compute_gflop_s:,.0f} GFLOP/s)"
    _print(
        console,
        f"{report.model}{adapter}, {report.layout} layout, {report.kv_type}, task of {report.task} tokens",
        f"{m.cpu}, {m.threads} threads{rates}, llama-cpp-python {m.llama_cpp_python}",
        f"Medians of {report.repeat}" + (f"; read again: {report.reading}" if report.reading else ""),
        "",
        "Time to first token, ms",
    )
    console.print(_times(report.rows))
    _print(console, "", "Branches decoding, tokens/s")
    console.print(_rates(report.rows))
    if report.jobs:
        _print(
            console,
            "",
            f"The whole job, with an answer of {report.jobs[0].answer} tokens, ms (kernels: {report.kernels})",
        )
        console.print(_jobs(report.jobs))
        _print(console, "", "Its first token after the branches' last, ms")
        console.print(_first_tokens(report.jobs))
    if report.steps:
        _print(console, "", f"A token of each of some sequences of {report.steps[0].cells} cells, ms")
        console.print(_steps(report.steps))
    text = f"\nA joined cell takes {report.cell_bytes:,} bytes"
    if report.peak_mb is not None:
        text += (
            f"; a process that does the last row's branches and synthesizer needs {report.peak_mb:,.0f} MB, the "
            f"model file's {report.model_mb:,.0f} MB included"
        )
    _print(console, text)


def _times(rows: "Sequence[BenchRow]") -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    names = "branches", "prompt", "text", "cache", "ratio", "spread", "join", "floor", "bound", "cache/floor", "K-shift"
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.branches} x {row.tokens}",
            str(row.prompt),
            f"{row.text_ms.value:,.0f}",
            _ms(row.cache_ms.value),
            f"{row.ratio.value:.1f}",
            f"{row.ratio.least:.1f}-{row.ratio.most:.1f}",
            f"{row.join_share.value:.0%}",
            _ms(row.floor_ms.value),
            _or_dash(row.floor_bound_ms),
            f"{row.floor_ratio.value:.2f}",
            _or_dash(row.kshift_ms.value if row.kshift_ms else None),
        )
    return table


def _rates(rows: "Sequence[BenchRow]") -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("branches", "in one batch", "bound", "one by one", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in {(row.branches, row.tokens): row for row in rows}.values():  # the prompt makes no difference here
        table.add_row(
            f"{row.branches} x {row.tokens}",
            f"{row.batch_tokens_s.value:,.0f}",
            _or_dash(row.batch_bound_tokens_s),
            f"{row.single_tokens_s.value:,.0f}",
            f"{row.batch_gain.value:.2f}",
        )
    return table


def _jobs(rows: "Sequence[JobRow]") -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("branches", "job", "kernels off", "ratio", "call after call", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.branches} x {row.tokens}",
            f"{row.ours_ms.value:,.0f}",
            f"{row.off_ms.value:,.0f}",
            _with_spread(row.off_ratio),
            f"{row.calls_ms.value:,.0f}",
            _with_spread(row.calls_ratio),
        )
    return table


def _first_tokens(rows: "Sequence[JobRow]") -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("branches", "first token", "kernels off", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.branches} x {row.tokens}",
            _ms(row.ours_first_ms.value),
            _ms(row.off_first_ms.value),
            _with_spread(row.first_ratio),
        )
    return table


def _steps(rows: "Sequence[StepRow]") -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("sequences", "step", "tokens/s", "kernels off", "tokens/s", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.sequences),
            _ms(row.step_ms.value),
            f"{row.sequences / row.step_ms.value * 1e3:,.0f}",
            _ms(row.off_ms.value),
            f"{row.sequences / row.off_ms.value * 1e3:,.0f}",
            _with_spread(row.off_ratio),
        )
    return table


def _with_spread(ratio: "Median") -> str:
    return f"{ratio.value:.2f} ({ratio.least:.1f}-{ratio.most:.1f})"


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(literal(line), soft_wrap=True)


def _ms(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
