"""What `pyps run` shows to people: live columns on a terminal, plain text into a pipe."""

import re
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pyps.agents.tools import ToolCall
from pyps.cli.common import literal, visible
from pyps.forkjoin.branches import BranchResult
from pyps.forkjoin.events import AnswerToken, BranchDone, BranchToken, Done, Event, Result, ToolCalled

_PANEL_WIDTH = 36  # narrowest column in which text reads well


class Display(Protocol):
    """What shows the events of a run as they come."""

    def show(self, event: Event) -> None:
        """Show an event."""

    def close(self) -> None:
        """End the display, whether or not the run came to its end."""


def summary(result: Result) -> str:
    """Return one line on what was joined and read, and how long it took."""
    t, n = result.timing_ms, result.tokens
    if result.mode == "text":
        return f"read {n.prefilled:,} tokens; first token after {t.ttft:,.0f} ms, {t.total / 1e3:.1f} s in all"
    again = f", read {n.again:,} of {n.joined + n.again:,} again ({result.reading})" if n.again else ""
    line = (
        f"joined {n.joined:,} tokens in {t.join:,.0f} ms{again}, read {n.prefilled:,}; "
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
    """Return one line on a tool call and its result."""
    arguments = call.arguments
    if isinstance(arguments, dict):
        arguments = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"> {call.name}({arguments}): {one_line(call.result)[:200]}\n"


def _calls_and_text(branch: BranchResult) -> str:
    """Return a branch's calls and its text."""
    return "".join(map(_called, branch.calls)) + branch.text


def one_line(text: str) -> str:
    """Return a text without its line breaks."""
    return " ".join(text.split())


def _remark(branch: BranchResult) -> str:
    if branch.error is not None:
        return f"failed: {branch.error}"
    if branch.tokens == 0:
        return "said nothing: joined as empty"
    return f"{branch.tokens} tokens" + (", cut at its limit" if branch.finish_reason == "length" else "")


class PlainDisplay:
    """Plain text. Branches appear whole, in order, when the last one is done.

    A file and a pipe get what was generated as it is; a terminal that cannot draw panels gets it visible.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shows = visible if console.file.isatty() else str
        self._branches: dict[int, BranchResult] = {}
        self._mode: str | None = None

    def show(self, event: Event) -> None:
        """Show an event."""
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
        """Do nothing: all is written already."""

    def _begin_answer(self, mode: str) -> None:
        """Write, before an answer begins, which one it is, and the branches if they have not been written."""
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
            self._write(f"{title} ({_remark(branch)})\n{_calls_and_text(branch)}\n\n")

    def _write(self, text: str) -> None:
        self._console.file.write(self._shows(text))
        self._console.file.flush()


class LiveDisplay:
    """Branches side by side in panels that follow their texts; then the answer as it comes."""

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
        """Return the branches side by side: as much as fits on the screen, or the whole texts."""
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
        text = literal(self._texts[i].strip())
        if height is not None:
            lines = text.wrap(self._console, width - 4)
            text = Text("\n").join(list(lines)[-(height - 2) :])
        result = self._results.get(i)
        return Panel(
            text,
            title=literal(self._titles[i]),
            title_align="left",
            subtitle=literal(_remark(result)) if result else None,
            subtitle_align="right",
            border_style="green" if result else "dim",
        )

    def show(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, BranchToken):
            self._texts[event.branch] += event.text
        elif isinstance(event, ToolCalled) and event.branch is not None:
            self._texts[event.branch] += _called(event.call)
        elif isinstance(event, ToolCalled):
            self._begin_answer(event.mode)
            self._stream(_called(event.call))
        elif isinstance(event, BranchDone):
            self._results[event.branch] = event.result
            self._texts[event.branch] = _calls_and_text(event.result)
        elif isinstance(event, AnswerToken):
            self._begin_answer(event.mode)
            self._stream(event.text)
        elif isinstance(event, Done):
            self._end_live()
            self._stream("\n\n")
            if event.result.interrupted:
                self._console.print(Text("interrupted: this is what there is", style="yellow"))
            self._console.print(literal(summary(event.result), "bold"))

    def _begin_answer(self, mode: str) -> None:
        """Write, before an answer begins, which one it is, and the branches if they have not been written."""
        if self._mode == mode:
            return
        self._end_live()
        if self._mode is not None:
            self._stream("\n\n")
        self._mode = mode
        self._console.rule("answer" if mode == "cache" else "answer from text", align="left")

    def _stream(self, text: str) -> None:
        """Print text as it comes, whole words to a line: a word is held back until its end is known."""
        *complete, self._word = re.split(r"(\s)", self._word + visible(text))
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
        """Stop following the branches."""
        if self._live:
            self._live.stop()
            self._live = None
