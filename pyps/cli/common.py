"""What several commands share: exit codes, options and their types, foreign text, Ctrl-C, progress, and endings."""

import contextlib
import errno
import importlib
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click
import rich.progress
from rich.console import Console
from rich.text import Text

from pyps.adapters.format import LAYOUTS
from pyps.engine.context import KV_TYPES
from pyps.engine.find import AUTO, DEFAULT_MODEL, Progress
from pyps.errors import InputError, PypsError, missing_extra
from pyps.forkjoin import ForkJoin
from pyps.forkjoin.reading import check_read

if TYPE_CHECKING:
    from pyps.measure.reports import BenchReport, EvaluationReport


_MAX_LINE = 1 << 16  # characters: more than any chat has room for

# A terminal obeys control characters (C0, DEL and C1), and bidirectional controls make a line look like another one.
# Halves of surrogate pairs cannot be written at all. A carriage return before a line break does nothing.
_CONTROLS = re.compile(
    "\r(?=\n)|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""Return a text with its control characters as escapes (\x1b, \u202e), so that a terminal shows them.

    All text that is not pyps's own goes through here on its way to a terminal, and to messages and tables anywhere:
    what models, tools and files say, names, and what errors quote. What a pipe gets of a run is left as it is, since
    programs read it, and so is JSON.
    """
    return _CONTROLS.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character == "\r" and match.string[match.end() : match.end() + 1] == "\n":
        return ""
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def literal(text: str, style: str = "") -> Text:
    """Return a text for rich to print as it is: visible, and without markup, emoji codes and highlights."""
    return Text(visible(text), style)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a standard stream is a terminal; one that is closed, which is None, is not."""
    return stream is not None and stream.isatty()


class Group(click.Group):
    """A group whose commands end with one line on stderr and an exit code when something goes wrong.

    A mistake in the request ends with 2, a failure of the machine or of llama.cpp with 1, Ctrl-C with 130, SIGTERM with
    143 and SIGHUP with 129.
    """

    def invoke(self, ctx: click.Context) -> object:
        """Run the chosen command."""
        try:
            with _signals_as_ctrl_c():
                return super().invoke(ctx)
        except click.UsageError as error:
            message = error.format_message()
            if visible(message) == message:
                raise
            raise click.UsageError(visible(message), error.ctx) from None
        except PypsError as error:
            _fail(ctx, str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail(ctx, "terminated" if _ended_by else "interrupted", _exit_code())
        except MemoryError:
            _fail(ctx, "there is not enough memory", 1)
        except OSError as error:
            if error.errno == errno.EPIPE:  # click's own business
                raise
            _fail(ctx, str(error), 1)
        return None


def _fail(ctx: click.Context, message: str, exit_code: int) -> None:
    click.echo(visible(f"pyps: {message}"), err=True)
    ctx.exit(exit_code)


_ended_by: list[int] = []  # signals that came instead of Ctrl-C


@contextlib.contextmanager
def _signals_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM (kill, docker stop) and SIGHUP (a terminal that is gone) do what Ctrl-C does while the block runs.

    So temporary models and half files are removed, servers are stopped, and a training run saves where it is. What is
    ignored stays ignored, as nohup wants it.
    """
    _ended_by.clear()
    numbers = []
    if threading.current_thread() is threading.main_thread():
        numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _as_ctrl_c)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    _ended_by.append(number)
    # who handles Ctrl-C at the moment knows how: an exception would be lost while llama.cpp calls back, for instance
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # shells start what runs in the background with Ctrl-C ignored
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def _exit_code() -> int:
    return 128 + _ended_by[0] if _ended_by else 128 + signal.SIGINT


class Numbers(click.ParamType):  # type: ignore[type-arg]  # older versions of click have no arguments there
    """Whole numbers with commas between them."""

    name = "numbers"
    kind: Callable[[str], float] = int
    what = "whole numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the list of numbers."""
        if not isinstance(value, str):
            return value
        try:
            return [self.kind(number) for number in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of {self.what} with commas between them.", param, ctx)


class Weights(Numbers):
    """Numbers, which need not be whole, with commas between them."""

    name = "weights"
    kind = float
    what = "numbers"


class NameValue(click.ParamType):  # type: ignore[type-arg]  # older versions of click have no arguments there
    """A name and a value with an equals sign between them."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name and the value."""
        if not isinstance(value, str):
            return value
        name, sign, text = value.partition("=")
        if not sign:
            self.fail(f"{value!r} is not of the form NAME=VALUE.", param, ctx)
        return name.strip(), text


class Shares(Numbers):
    """Numbers between 0 and 1 with commas between them; there may be none."""

    name = "shares"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the list of shares."""
        if not isinstance(value, str):
            return value
        shares = [Share().convert(part, param, ctx) for part in value.split(",") if part.strip()]
        if "auto" in shares:
            self.fail("'auto' is no point of a curve: give numbers between 0 and 1.", param, ctx)
        return shares


class Share(click.ParamType):  # type: ignore[type-arg]  # as above
    """A number between 0 and 1, or "auto"."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or "auto"."""
        if value == "auto":
            return value
        try:
            share = float(value)
            check_read(share)
        except (ValueError, InputError):
            self.fail(f"{value!r} is neither a number between 0 and 1 nor 'auto'.", param, ctx)
        return share


def _none(_ctx: click.Context, _parameter: click.Parameter, adapter: str) -> str | None:
    return None if adapter == "none" else adapter


model_option = click.option(
    "--model",
    "-m",
    default=DEFAULT_MODEL,
    show_default=True,
    help="The model: a GGUF file, 'smollm2', or hf:OWNER/REPO:QUANT.",
)
adapter_option = click.option(
    "--adapter",
    "-a",
    metavar="FILE",
    default=AUTO,
    show_default=True,
    callback=_none,
    help="The synthesizer's adapter, a GGUF file. 'auto' takes the one that comes with pyps for the model, if there is "
    "one; 'none' takes none.",
)
layout_option = click.option(
    "--layout", type=click.Choice(LAYOUTS), help="The prompt layout. Without it, the adapter's is used, or shared."
)
read_option = click.option(
    "--read",
    type=Share(),
    default="auto",
    show_default=True,
    metavar="SHARE",
    help="In cache mode, the share of the branches' tokens that the synthesizer reads again: 0 to 1. 'auto' takes what "
    "the adapter was trained for, or else what the model was found to need (pyps doctor MODEL).",
)
threads_option = click.option(
    "--threads",
    "-t",
    type=int,
    help="Number of threads. Without it, pyps uses what pyps doctor found, or the physical cores.",
)
kv_type_option = click.option(
    "--kv-type",
    metavar="TYPE",
    default="f16",
    show_default=True,
    help=f"Type of K and V in the caches: {', '.join(KV_TYPES)}; or one for K and one for V, as in q8_0/f16. The "
    "quantised ones are smaller and, on a CPU, slower.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
plot_option = click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also draw a picture (PNG, SVG or PDF). This needs pyps-llama[plot].",
)


class Interrupt:
    """Ctrl-C during a job: the first one asks the job to end with what there is; a second one ends it at once.

    SIGTERM and SIGHUP do the same.
    """

    def __init__(self) -> None:
        self._requested = bool(_ended_by)  # one that came too early, while llama.cpp called back, has been lost
        self._handler_before = signal.getsignal(signal.SIGINT)

    def __enter__(self) -> "Interrupt":
        signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._handler_before)

    def requested(self) -> bool:
        """Return whether Ctrl-C was pressed."""
        return self._requested

    def exit_if_requested(self, message: str = "") -> None:
        """End the program with 130 if Ctrl-C was pressed (143 after SIGTERM), after a message if there is one."""
        if self._requested or _ended_by:
            if message:
                click.echo(f"pyps: {message}", err=True)
            sys.exit(_exit_code())

    def read_line(self, prompt: str) -> str | None:
        """Read a line from standard input; None at its end, at Ctrl-C, or where it is closed.

        Args:
            prompt: What a terminal shows before the line.

        Raises:
            InputError: The line is too long. All of it has been read.
        """
        if sys.stdin is None:
            return None
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a handler that returns would not end input()
        try:
            return input(prompt) if sys.stdin.isatty() else _read_bounded(sys.stdin)
        except (EOFError, KeyboardInterrupt):
            return None
        finally:
            signal.signal(signal.SIGINT, self._request)

    def _request(self, _signal: int, _frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True


def _read_bounded(stream: TextIO) -> str:
    """Return a line without its line break.

    Raises:
        EOFError: There are no more lines.
        InputError: The line is too long. All of it has been read.
    """
    line = part = stream.readline(_MAX_LINE + 1)
    if not line:
        raise EOFError
    while part and not part.endswith("\n"):
        part = stream.readline(_MAX_LINE)
    line = line.removesuffix("\n")
    if len(line) > _MAX_LINE:
        raise InputError(f"this line has more than {_MAX_LINE:,} characters: it is left out")
    return line


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """Yield a Progress function that draws a bar on a terminal, and writes each text once elsewhere."""
    if not console.is_terminal:
        written: set[str] = set()

        def write(what: str, _fraction: float | None) -> None:
            if what not in written:
                written.add(what)
                console.print(literal(what), soft_wrap=True)

        yield write
        return
    columns = (
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)

        def update(what: str, fraction: float | None) -> None:
            bar.update(task, description=visible(what), visible=True, total=1 if fraction is not None else None)
            if fraction is not None:
                bar.update(task, completed=fraction)

        yield update


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module whose packages the base installation may lack.

    Args:
        module: Its full name.
        extra: The optional part of pyps that has the packages.

    Raises:
        InputError: A package is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_extra(f"this needs more packages ({error})", extra) from None


def check_plot(plot: Path | None) -> None:
    """Raise InputError if a picture that is asked for cannot be drawn: before the work, not after it."""
    if plot:
        import_extra("pyps.measure.plot", "plot").check(plot)


def show_warnings(fj: ForkJoin) -> None:
    """Write what does not fit between the adapter and the model to stderr."""
    for warning in fj.adapter.warnings if fj.adapter else []:
        click.echo(visible(f"pyps: warning: {warning}"), err=True)


def print_json(value: object) -> None:
    """Print an object as people and programs can read it."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    if is_terminal(sys.stdout):
        # the same object: JSON escapes C0, and these are its escapes of the others
        text = _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    click.echo(text)


R = TypeVar("R", "BenchReport", "EvaluationReport")


def finish(
    report: R,
    show: Callable[[Console, R], None],
    *,
    plot: Path | None,
    as_json: bool,
    interrupt: Interrupt,
    progress: str,
) -> None:
    """End a measurement: draw it, print it, and exit as Interrupt says after Ctrl-C.

    Args:
        report: What was measured.
        show: Prints the report as tables for people.
        plot: Where the picture goes; None for no picture.
        as_json: Whether the report is printed as a JSON object instead.
        interrupt: Whether Ctrl-C was pressed.
        progress: How much of how many is done ("3 of 4 rows"), for the message after Ctrl-C.
    """
    if plot and not report.is_empty:
        import_extra("pyps.measure.plot", "plot").write(report, plot)
    if as_json:
        print_json(report.to_dict())
    elif not report.is_empty:
        show(Console(), report)
    interrupt.exit_if_requested(f"stopped after {progress}")
