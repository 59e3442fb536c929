"""What `pyps run` shows to people: live columns on a terminal, plain text into a pipe."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pyps.engine.find import Progress as Report
from pyps.forkjoin.events import (
    AnswerToken,
    BranchDone,
    BranchResult,
    BranchToken,
    Done,
    Event,
    Result,
    ToolCall,
    ToolCalled,
)
from pyps.forkjoin.slots import Slots

_PANEL_WIDTH = 36  # narrowest column in which text reads well


class Display(Protocol):
    """Shows events as they come."""

    def show(self, event: Event) -> None: ...
    def close(self) -> None: ...


def summary(result: Result) -> str:
    """One line: what was saved."""
    t, n = result.timing_ms, result.tokens
    if result.mode == "text":
        return f"read {n.prefilled:,} tokens; first token after {t.ttft:,.0f} ms, {t.total / 1e3:.1f} s in all"
    line = (
        f"joined {n.joined:,} tokens in {t.join:,.0f} ms, read {n.prefilled:,}; "
        f"first token after {t.ttft:,.0f} ms, {t.total / 1e3:.1f} s in all"
    )
    if result.compare:
        c = result.compare
        line += (
            f". From text: read {c.tokens.prefilled:,}; first token after {c.timing_ms.ttft:,.0f} ms "
            f"({c.timing_ms.ttft / max(t.ttft, 1e-3):.1f} times as long)"
        )
    return line


def _called(call: ToolCall) -> str:
    """One line: a tool call, and what came of it."""
    arguments = call.arguments
    if isinstance(arguments, dict):
        arguments = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"> {call.name}({arguments}): {_line(call.result)[:200]}\n"


def _told(branch: BranchResult) -> str:
    """A branch's calls, and its text."""
    return "".join(map(_called, branch.calls)) + branch.text


def _line(text: str) -> str:
    return " ".join(text.split())


def _remark(branch: BranchResult) -> str:
    if branch.tokens == 0:
        return "said nothing: joined as empty"
    return f"{branch.tokens} tokens" + (", cut at its limit" if branch.finish_reason == "length" else "")


class PlainDisplay:
    """Text without control codes. Branches appear whole, in order, when the last one is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._branches: dict[int, BranchResult] = {}
        self._mode: str | None = None

    def show(self, event: Event) -> None:
        if isinstance(event, BranchDone):
            self._branches[event.branch] = event.result
        elif isinstance(event, ToolCalled) and event.branch is None:
            self._begin_answer(event.mode)
            self._write(_called(event.call))
        elif isinstance(event, AnswerToken):
            self._begin_answer(event.mode)
            self._write(event.text)
        elif isinstance(event, Done):
            if self._mode is None:
                self._branches = dict(enumerate(event.result.branches))
                self._show_branches()
            self._write("\n\n" if self._mode else "")
            if event.result.interrupted:
                self._write("interrupted: this is what there is\n")
            self._write(summary(event.result) + "\n")

    def close(self) -> None:
        pass

    def _begin_answer(self, mode: str) -> None:
        """Before the first of an answer: what it is, and the branches if nothing was said yet."""
        if self._mode == mode:
            return
        if self._mode is None:
            self._show_branches()
        else:
            self._write("\n\n")
        self._mode = mode
        self._write("[answer]\n" if mode == "cache" else "[answer from text]\n")

    def _show_branches(self) -> None:
        for _, branch in sorted(self._branches.items()):
            title = f"[{branch.name}] {branch.prompt}".strip()
            self._write(f"{title} ({_remark(branch)})\n{_told(branch)}\n\n")

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


class LiveDisplay:
    """Branches side by side in panels that follow their text; then the answer, streamed."""

    def __init__(self, console: Console, prompts: list[str]) -> None:
        self._console = console
        self._titles = [prompt or f"sample {i + 1}" for i, prompt in enumerate(prompts)]
        self._texts = ["" for _ in prompts]
        self._results: dict[int, BranchResult] = {}
        self._live: Live | None = Live(console=console, refresh_per_second=12, get_renderable=self.panels)
        self._live.start()
        self._mode: str | None = None
        self._word = ""  # streamed, but not yet printed
        self._column = 0

    def panels(self, whole: bool = False) -> Table:
        """The branches side by side: what fits on the screen, or the whole texts."""
        columns = max(1, min(len(self._texts), self._console.width // _PANEL_WIDTH))
        rows = -(-len(self._texts) // columns)
        width = self._console.width // columns
        # all rows must fit on the screen: Live cannot redraw what has scrolled away
        height = max(3, (self._console.height - 2) // rows)
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        panels = [self._panel(i, width, None if whole else height) for i in range(len(self._texts))]
        for start in range(0, len(panels), columns):
            grid.add_row(*panels[start : start + columns])
        return grid

    def _panel(self, i: int, width: int, height: int | None) -> Panel:
        text = Text(self._texts[i].strip())
        if height is not None:
            lines = text.wrap(self._console, width - 4)
            text = Text("\n").join(list(lines)[-(height - 2) :])
        result = self._results.get(i)
        return Panel(
            text,
            title=Text(self._titles[i]),
            title_align="left",
            subtitle=Text(_remark(result)) if result else None,
            subtitle_align="right",
            border_style="green" if result else "dim",
        )

    def show(self, event: Event) -> None:
        if isinstance(event, BranchToken):
            self._texts[event.branch] += event.text
        elif isinstance(event, ToolCalled) and event.branch is not None:
            self._texts[event.branch] += _called(event.call)
        elif isinstance(event, ToolCalled):
            self._begin_answer(event.mode)
            self._stream(_called(event.call))
        elif isinstance(event, BranchDone):
            self._results[event.branch] = event.result
            self._texts[event.branch] = _told(event.result)
        elif isinstance(event, AnswerToken):
            self._begin_answer(event.mode)
            self._stream(event.text)
        elif isinstance(event, Done):
            self._end_live()
            self._stream("\n\n")
            if event.result.interrupted:
                self._console.print(Text("interrupted: this is what there is", style="yellow"))
            self._console.print(Text(summary(event.result), style="bold"))

    def _begin_answer(self, mode: str) -> None:
        """Before the first of an answer: what it is, and the branches if nothing was said yet."""
        if self._mode == mode:
            return
        self._end_live()
        if self._mode is not None:
            self._stream("\n\n")
        self._mode = mode
        self._console.rule("answer" if mode == "cache" else "answer from text", align="left")

    def _stream(self, text: str) -> None:
        """Print text as it comes, whole words to a line: a word is held back until its end is known."""
        *complete, self._word = re.split(r"(\s)", self._word + text)
        for part in complete:
            width = cell_len(part)
            if part != "\n" and self._column + width > self._console.width:
                self._console.print()
                self._column = 0
                part = part.lstrip()
            self._console.print(Text(part), end="", soft_wrap=True)
            self._column = 0 if part == "\n" else self._column + width

    def _end_live(self) -> None:
        """Replace the panels that follow by panels with the whole texts."""
        if self._live:
            self._live.transient = True
            self._live.stop()
            self._live = None
            self._console.print(self.panels(whole=True))

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None


@contextmanager
def progress_bar(console: Console) -> Iterator[Report]:
    """A report function (see models.Progress) that draws a bar on a terminal, and plain lines elsewhere."""
    if not console.is_terminal:
        said: set[str] = set()

        def say(what: str, _fraction: float | None) -> None:
            if what not in said:
                said.add(what)
                console.print(what, highlight=False, soft_wrap=True)

        yield say
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)

        def update(what: str, fraction: float | None) -> None:
            bar.update(task, description=what, visible=True, total=1 if fraction is not None else None)
            if fraction is not None:
                bar.update(task, completed=fraction)

        yield update


def show_slots(console: Console, slots: Slots) -> None:
    """A file of branches: what it is, and the beginning of each."""
    console.print(
        f"{len(slots.branches)} branches of {slots.model} ({slots.arch}); {len(slots.tokens):,} cells of "
        f"{len(slots.layers)} layers, {slots.kv_type}, {slots.n_bytes / 1e6:,.1f} MB",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("name", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("instruction", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("text", no_wrap=True, overflow="ellipsis", max_width=max(console.width - 64, 16))
    for b in slots.branches:
        # not markup: a text may have brackets
        table.add_row(f"{b.tokens:,}", Text(_line(b.name)), Text(_line(b.prompt)), Text(_line(b.text)))
    console.print(table)


def show_evaluation(console: Console, found: dict[str, Any]) -> None:
    """The object that `pyps eval --json` prints, as tables for people."""
    modes = found["modes"]
    table = Table(box=None, pad_edge=False)
    for name in ("", "right", "95 %", "KL", "KL first", "agreement", "ms"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for mode, m in modes.items():
        right = ["", ""]
        if m["accuracy"] is not None:
            right = [f"{m['accuracy']:.1%}", "{:.0%} to {:.0%}".format(*m["accuracy_95"])]
        table.add_row(
            mode, *right, f"{m['kl']:.3f}", f"{m['kl_first']:.3f}", f"{m['agreement']:.0%}", f"{m['ttft_ms']:.0f}"
        )
    adapter = f", adapter {found['adapter']}" if found["adapter"] else ""
    console.print(
        f"{found['model']}{adapter}, {found['layout']} layout, {found['examples']} examples",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)
    families = list(modes["text"]["families"])
    for key, title, form in (("accuracy", "right", "{:.0%}"), ("kl", "KL", "{:.3f}")):
        table = Table(box=None, pad_edge=False)
        table.add_column(f"\n{title}", no_wrap=True)
        for family in families:
            table.add_column(f"\n{family}", justify="right", no_wrap=True)
        for mode, m in modes.items():
            values = [m["families"][f][key] for f in families]
            table.add_row(mode, *("" if v is None else form.format(v) for v in values))
        console.print(table)


def _ms(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def show_bench(console: Console, found: dict[str, Any]) -> None:
    """The object that `pyps bench --json` prints, as a table for people."""
    m, rows = found["machine"], found["rows"]
    adapter = ", with its adapter" if found["adapter"] else ""
    rates = ""
    if "read_gb_s" in m:
        rates = f" (read {m['read_gb_s']:.0f} GB/s, do {m['compute_gflop_s']:,.0f} GFLOP/s)"
    for line in (
        f"{found['model']}{adapter}, {found['layout']} layout, {found['kv_type']}, task of {found['task']} tokens",
        f"{m['cpu']}, {m['threads']} threads{rates}, llama-cpp-python {m['llama_cpp_python']}",
        f"Medians of {found['repeat']}",
        "",
        "Time to first token, ms",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    names = "branches", "prompt", "text", "cache", "ratio", "spread", "join", "floor", "bound", "cache/floor", "K-shift"
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        low, high = r["ratio_spread"]
        table.add_row(
            f"{r['branches']} x {r['tokens']}",
            str(r["prompt"]),
            f"{r['text_ms']:,.0f}",
            _ms(r["cache_ms"]),
            f"{r['ratio']:.1f}",
            f"{low:.1f}-{high:.1f}",
            f"{r['join_share']:.0%}",
            _ms(r["floor_ms"]),
            _or_dash(r["floor_bound_ms"]),
            f"{r['floor_ratio']:.2f}",
            _or_dash(r["kshift_ms"]),
        )
    console.print(table)
    console.print("\nBranches decoding, tokens/s", highlight=False)
    table = Table(box=None, pad_edge=False)
    for name in ("branches", "in one batch", "bound", "one by one", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in {(r["branches"], r["tokens"]): r for r in rows}.values():
        table.add_row(
            f"{r['branches']} x {r['tokens']}",
            f"{r['batch_tokens_s']:,.0f}",
            _or_dash(r["batch_bound_tokens_s"]),
            f"{r['single_tokens_s']:,.0f}",
            f"{r['batch_gain']:.2f}",
        )
    console.print(table)
    text = f"\nA joined cell takes {found['cell_bytes']:,} bytes"
    if found["peak_mb"] is not None:
        text += (
            f"; a process that does the last row's branches and synthesizer needs {found['peak_mb']:,.0f} MB, the "
            f"model file's {found['model_mb']:,.0f} MB included"
        )
    console.print(text, highlight=False, soft_wrap=True)
