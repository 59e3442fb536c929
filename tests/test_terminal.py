"""What models, tools, files and names say is shown on a terminal, and never obeyed there."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from pyps.agents.tools import ToolCall
from pyps.cli.common import Group, Interrupt, literal, print_json, progress_bar, show_warnings, visible
from pyps.cli.display import Display, LiveDisplay, PlainDisplay
from pyps.cli.run import _talk
from pyps.cli.tables import show_evaluation
from pyps.engine.sampling import Sampling
from pyps.errors import InputError
from pyps.forkjoin.branches import BranchResult
from pyps.forkjoin.chat import Chat
from pyps.forkjoin.events import AnswerToken, BranchDone, BranchToken, Done, Event, Result, Timing, Tokens, ToolCalled
from pyps.measure.reports import EvaluationReport

C0 = [chr(i) for i in range(32) if chr(i) not in "\n\t"]
C1 = [chr(i) for i in range(0x7F, 0xA0)]
BIDI = list("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
SEQUENCES = [
    "\x1b[2J",  # clears the screen
    "\x1b]0;owned\x1b\\",  # sets the title
    "\x1b]52;c;ZXZpbA==\x07",  # writes the clipboard
    "\x1b]8;;http://evil\x1b\\",  # begins a link
    "\x9b31m",  # the same in C1
    "\x1bc",  # resets the terminal
    "\rfake",
    "\b\b\bfake",
    "\u202eexe.txt",
    "\x0e",  # line drawing from here on
]
MARKUP = ["[bold]", "[/]", "[/Q8]", "[link=http://evil]m[/link]", "[red]x[/red]", ":smile:", "[@click=app.bell]x[/]"]


@pytest.mark.parametrize("character", [*C0, *C1, *BIDI, *map(chr, (0x2028, 0xD800, 0xDCFF))])
def test_controls_are_visible(character: str) -> None:
    code = ord(character)
    escape = f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    assert visible(f"a{character}b{character}") == f"a{escape}b{escape}"
    assert literal(f"a{character}b").plain == f"a{escape}b"
    visible(character).encode()


@pytest.mark.parametrize(
    "text",
    ["", "plain", "two\nlines", "a\ttab", "naïve café", "日本語", "👩‍👩‍👧", "עברית", "a\u00a0b", "\\x1b", "[bold]"],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


def test_line_breaks_of_windows_are_line_breaks() -> None:
    assert visible("a\r\nb\rc\r") == "a\nb\\x0dc\\x0d"


class Terminal(io.StringIO):
    """A text that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def events(evil: str) -> list[Event]:
    """A run in which everything that is foreign is evil."""
    call = ToolCall(f"tool{evil}MARK", {"query": evil}, f"result{evil}MARK", False, 1.0)
    branch = BranchResult(f"name{evil}MARK", f"prompt{evil}MARK", f"text{evil}MARK", 3, "stop", (call,))
    failed = BranchResult("b", "", "", 0, "error", (), f"error{evil}MARK")
    result = Result(
        model=f"model{evil}MARK",
        adapter=None,
        mode="cache",
        layout="shared",
        seed=0,
        answer="",
        finish_reason="stop",
        branches=(branch, failed),
        tokens=Tokens(1, 1, 1, 1),
        timing_ms=Timing(),
        reading=f"reading{evil}MARK",
    )
    return [
        BranchToken(0, f"text{evil}MARK"),
        ToolCalled(0, call),
        BranchDone(0, branch),
        BranchDone(1, failed),
        ToolCalled(None, call),
        *(AnswerToken(character) for character in f"answer{evil}MARK"),
        AnswerToken(f" answer{evil}MARK"),
        Done(result),
    ]


def show(display: Display, evil: str) -> None:
    for event in events(evil):
        display.show(event)
    display.close()


@pytest.mark.parametrize("evil", [*SEQUENCES, *MARKUP])
def test_the_live_display(evil: str) -> None:
    file = Terminal()
    console = Console(file=file, force_terminal=True, width=300, height=60, color_system=None)
    display = LiveDisplay(console, [f"prompt{evil}MARK", ""])
    show(display, evil)
    screen = file.getvalue()
    # what rich draws itself has escape sequences, too, but none before the mark
    assert (f"{evil}MARK" in screen) == (evil in MARKUP)
    for foreign in ("prompt", "text", "result", "error", "answer", "reading"):
        shown = f"{foreign}{evil}MARK"
        # a result's line breaks become spaces
        assert visible(" ".join(shown.split()) if foreign == "result" else shown) in screen
    for sequence in ("\x1b[2J", "\x1b]", "\x9b", "\x1bc", "\b", "\u202e", "\x0e"):
        assert sequence not in screen


@pytest.mark.parametrize("evil", [*SEQUENCES, *MARKUP])
def test_the_plain_display(evil: str) -> None:
    """On a terminal that cannot draw everything is visible; a program that reads a pipe gets what was generated."""
    terminal, pipe = Terminal(), io.StringIO()
    show(PlainDisplay(Console(file=terminal, force_terminal=False)), evil)
    show(PlainDisplay(Console(file=pipe)), evil)
    assert f"text{evil}MARK" in pipe.getvalue()
    assert f"answer{evil}MARK" in pipe.getvalue()
    assert terminal.getvalue() == visible(pipe.getvalue())
    assert visible(terminal.getvalue()) == terminal.getvalue()


@pytest.mark.parametrize("evil", [*SEQUENCES, *MARKUP])
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_and_warnings(evil: str, terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    file = Terminal()
    with progress_bar(Console(file=file, force_terminal=terminal, width=200, color_system=None)) as progress:
        progress(f"loading {evil}MARK", None)
        progress(f"loading {evil}MARK", 0.5)
    assert f"loading {visible(evil)}MARK" in file.getvalue()
    show_warnings(cast(Any, SimpleNamespace(adapter=SimpleNamespace(warnings=[f"on {evil}MARK"]))))
    assert capsys.readouterr().err == f"pyps: warning: on {visible(evil)}MARK\n"


@pytest.mark.parametrize("evil", SEQUENCES)
@pytest.mark.parametrize("error", [InputError, OSError, click.UsageError, click.BadParameter])
def test_messages(evil: str, error: type[Exception]) -> None:
    def fail() -> None:
        raise error(f"there is no {evil}MARK")

    group = Group("pyps")
    group.add_command(click.Command("fail", callback=fail))
    result = CliRunner().invoke(group, ["fail"])
    assert f"there is no {visible(evil)}MARK" in result.stderr
    assert visible(result.stderr) == result.stderr
    assert result.exit_code == (1 if error is OSError else 2)


def test_options_that_do_not_exist() -> None:
    result = CliRunner().invoke(Group("pyps", commands=[click.Command("run")]), ["run", "--x\x1b[2J\u202e"])
    assert "No such option" in result.stderr
    assert "--x\\x1b[2J\\u202e" in result.stderr
    assert result.exit_code == 2


@pytest.mark.parametrize("evil", [*SEQUENCES, *MARKUP])
def test_tables(evil: str) -> None:
    """Families come from a file of examples, and names of models from theirs."""
    scores = SimpleNamespace(accuracy=0.5, kl=0.1)
    mode = SimpleNamespace(accuracy=None, accuracy_95=None, difference=None, difference_95=None, kl=0, kl_first=0)
    mode.__dict__.update(agreement=0, again=0, ttft_ms=1, families={f"family{evil}MARK": scores})
    report = SimpleNamespace(model=f"m{evil}MARK", adapter=f"a{evil}MARK", layout="shared", examples=1)
    report.__dict__.update(reading=f"r{evil}MARK", modes={"text": mode})
    file = io.StringIO()
    show_evaluation(Console(file=file, width=400), cast(EvaluationReport, report))
    for name in ("m", "a", "r", "family"):
        assert f"{name}{visible(evil)}MARK" in file.getvalue()
    assert visible(file.getvalue()) == file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_json(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe gets what it always got. On a terminal it is the same object, with more escapes."""
    value = {"a": "".join([*C0, *C1, *BIDI, "é\n"])}
    file = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    print_json(value)
    assert json.loads(file.getvalue()) == value
    if terminal:
        assert visible(file.getvalue()) == file.getvalue()
    else:
        assert file.getvalue() == json.dumps(value, ensure_ascii=False, indent=2) + "\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_chat(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def say(self, text: str, *_: object) -> list[str]:
            return [f"to {text.strip()}: ", *"\x1b[2J", "MARK"]

    file = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    with Interrupt() as interrupt:
        _talk(cast(Chat, Evil()), Sampling(), interrupt, Console(file=io.StringIO()))
    shown = "\\x1b[2JMARK" if terminal else "\x1b[2JMARK"
    assert file.getvalue() == f"to one: {shown}\n\nto two: {shown}\n\n"


def on_terminal(*arguments: str) -> str:
    """Run pyps on a terminal, and return all that it writes there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pyps.cli", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", "LINES": "40"},
    )
    os.close(theirs)
    screen = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not data:
            break
        screen += data
    os.close(ours)
    text = screen.decode("utf-8", "replace")
    assert process.wait(60) == 0, text
    return text


def test_the_commands_on_a_terminal(tmp_path: Path, tiny_path: Path) -> None:
    """Names of files are markup for rich, and sequences for a terminal, as texts are."""
    model = tmp_path / "m[" / "Q8]\x1b[2J.gguf"
    saved = tmp_path / "n[" / "x]\x1b[2J.pyps"
    for path in (model, saved):
        path.parent.mkdir()
    shutil.copyfile(tiny_path, model)
    branch = "x\x1b[2J\x1b[31mred\x1b]0;owned\x1b\\ [link=http://evil]m[/link]"
    options = ["--read", "0", "--max-tokens", "4", "--temperature", "0", "--save", str(saved), "--model", str(model)]
    run = on_terminal("run", "Go", "--branch", branch, *options)
    slots = on_terminal("slots", str(saved))
    for screen in (run, slots):
        assert "\x1b[2J" not in screen
        assert "\x1b[31mred" not in screen
        assert "\x1b]" not in screen
        assert "x\\x1b[2J\\x1b[31mred" in screen
    assert "n[/x]\\x1b[2J.pyps (" in run
    assert "1 branches of " in slots
    as_json = subprocess.run(
        [sys.executable, "-m", "pyps.cli", "slots", str(saved), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(as_json.stdout)["branches"][0]["prompt"] == branch
