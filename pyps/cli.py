"""The command line. Mistakes of the user end with one clear line and exit code 2, failures with 1, Ctrl-C with 130."""

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import click
from rich.console import Console

import pyps
from pyps.context import KV_TYPES
from pyps.display import Display, LiveDisplay, PlainDisplay, progress_bar
from pyps.doctor import examine
from pyps.errors import InputError, PypsError
from pyps.events import Done, Event, Mode
from pyps.forkjoin import Branch, ForkJoin
from pyps.layout import DEFAULT_SYNTHESIZE, LAYOUTS
from pyps.models import DEFAULT_MODEL, find_model
from pyps.sampling import Sampling

_DEFAULTS = Sampling()


class _Command(click.Command):
    """Turns our exceptions into a line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except PypsError as error:
            click.echo(f"pyps: {error}", err=True)
            ctx.exit(2 if isinstance(error, InputError) else 1)
        except KeyboardInterrupt:
            click.echo("pyps: interrupted", err=True)
            ctx.exit(130)
        except MemoryError:
            click.echo("pyps: not enough memory", err=True)
            ctx.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(pyps.__version__, prog_name="pyps")
def main() -> None:
    """Fork-join on llama.cpp: branches in parallel, one answer straight from their KV caches."""


class _Interrupt:
    """The first Ctrl-C asks the run to end with what there is; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before = signal.getsignal(signal.SIGINT)

    def __enter__(self) -> "_Interrupt":
        signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@main.command(cls=_Command)
@click.argument("task", required=False)
@click.option(
    "--file",
    "-f",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Read the task from a file ('-': standard input).",
)
@click.option(
    "--branch",
    "-b",
    "instructions",
    multiple=True,
    metavar="TEXT",
    help="A branch's instruction; once for each branch.",
)
@click.option("--branches", "-n", "samples", type=int, metavar="N", help="Instead: N samples of the task itself.")
@click.option("--system", metavar="TEXT", help="System message. Default: the model's own.")
@click.option(
    "--synthesize", metavar="TEXT", default=DEFAULT_SYNTHESIZE, show_default=True, help="The synthesizer's instruction."
)
@click.option(
    "--model", "-m", default=DEFAULT_MODEL, show_default=True, help="A GGUF file, 'smollm2', or hf:OWNER/REPO:QUANT."
)
@click.option("--adapter", "-a", metavar="FILE", help="Adapter (GGUF) for the synthesizer.")
@click.option(
    "--mode",
    type=click.Choice(["cache", "text"]),
    default="cache",
    show_default=True,
    help="Answer from the branches' caches, or from their pasted texts.",
)
@click.option("--layout", type=click.Choice(LAYOUTS), help="Prompt layout. Default: the adapter's, or shared.")
@click.option("--compare", is_flag=True, help="Answer from the branches' texts as well.")
@click.option("--max-tokens", type=int, default=_DEFAULTS.max_tokens, show_default=True, help="Limit of each branch.")
@click.option("--answer-tokens", type=int, metavar="N", help="Limit of the answer. Default: as --max-tokens.")
@click.option(
    "--temperature",
    type=float,
    default=_DEFAULTS.temperature,
    show_default=True,
    help="0: always the most likely token.",
)
@click.option("--top-k", type=int, default=_DEFAULTS.top_k, show_default=True, help="0: off.")
@click.option("--top-p", type=float, default=_DEFAULTS.top_p, show_default=True, help="1: off.")
@click.option("--min-p", type=float, default=_DEFAULTS.min_p, show_default=True, help="0: off.")
@click.option(
    "--repeat-penalty", type=float, default=_DEFAULTS.repeat_penalty, show_default=True, help="Against loops; 1: off."
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End a branch at this text; may be repeated.")
@click.option("--seed", type=int, help="Branches take consecutive seeds from here. Default: a new one each time.")
@click.option(
    "--ctx", "n_ctx", type=int, metavar="CELLS", help="Most cells a sequence may use. Default: what the job needs."
)
@click.option("--threads", "-t", type=int, help="Default: the physical cores.")
@click.option(
    "--kv-type",
    metavar="TYPE",
    default="f16",
    show_default=True,
    help=f"Type of K and V in the caches: {', '.join(KV_TYPES)}; or one for K and one for V, as in q8_0/f16. The "
    "quantised ones are smaller and, on a CPU, slower.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def run(
    task: str | None,
    file: Path | None,
    instructions: tuple[str, ...],
    samples: int | None,
    system: str | None,
    synthesize: str,
    model: str,
    adapter: str | None,
    mode: Mode,
    layout: str | None,
    compare: bool,
    max_tokens: int,
    answer_tokens: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repeat_penalty: float,
    stop: tuple[str, ...],
    seed: int | None,
    n_ctx: int | None,
    threads: int | None,
    kv_type: str,
    as_json: bool,
) -> None:
    """Run branches on TASK in parallel, then answer from all of them.

    \b
    pyps run "Which database should a small desktop app use?" \\
        --branch "Argue for SQLite." --branch "Argue for PostgreSQL."
    pyps run "What is 17 * 23?" --branches 4
    """
    text = _read_task(task, file)
    branches = _branches(instructions, samples)
    sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed, max_tokens, stop)
    answer = replace(sampling, max_tokens=max_tokens if answer_tokens is None else answer_tokens, stop=())

    notes = Console(stderr=True)
    with progress_bar(notes) as report:
        if notes.is_terminal:
            report(f"loading {model}", None)
        fj = ForkJoin.from_pretrained(
            model, progress=report, adapter=adapter, layout=layout, kv_type=kv_type, n_ctx=n_ctx, threads=threads
        )
    with fj, _Interrupt() as interrupt:
        for warning in fj.adapter.warnings if fj.adapter else []:
            click.echo(f"pyps: warning: {warning}", err=True)
        events = fj.stream(
            text,
            branches,
            system=system,
            synthesize=synthesize,
            mode=mode,
            compare=compare,
            sampling=sampling,
            answer=answer,
            stopped=lambda: interrupt.asked,
        )
        _show(events, branches, as_json, notes)
    if interrupt.asked:
        sys.exit(130)


@main.command(cls=_Command)
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def doctor(model: str | None, as_json: bool) -> None:
    """What this machine, this build and MODEL can do, and why not.

    MODEL is a GGUF file, 'smollm2', or hf:OWNER/REPO:QUANT.
    """
    with progress_bar(Console(stderr=True)) as report:
        found = examine(find_model(model, report) if model else None)
    click.echo(found.to_json() if as_json else found.to_text())


@main.command(cls=_Command)
@click.argument("config", type=click.Path(path_type=Path))
def train(config: Path) -> None:
    """Train an adapter as CONFIG, a YAML file, says (needs pyps[train]).

    Writes adapter.gguf into the folder that CONFIG names. Interrupted or not, the same command goes on where it was.
    """
    try:
        from pyps.train.config import read_config
        from pyps.train.trainer import ADAPTER, Trainer
    except ImportError as error:
        raise InputError(f"training needs more packages ({error}): pip install 'pyps[train]'") from None
    trainer = Trainer(read_config(config), report=lambda line: click.echo(line, err=True))
    with _Interrupt() as interrupt:
        trainer.run(lambda: interrupt.asked)
    if interrupt.asked:
        click.echo(f"pyps: stopped after step {trainer.step}; the same command goes on from there", err=True)
        sys.exit(130)
    click.echo(trainer.config.output / ADAPTER)


def _show(events: Iterator[Event], branches: list[Branch], as_json: bool, notes: Console) -> None:
    """Everything that goes to standard output."""
    console = Console()
    live = console.is_terminal and not as_json
    display: Display = LiveDisplay(console, [b.prompt for b in branches]) if live else PlainDisplay(console)
    # while a pipe fills, or one object is prepared, a terminal at least sees that something is going on
    waiting = notes.status("running") if notes.is_terminal and not live else contextlib.nullcontext()
    try:
        with waiting:
            for event in events:
                if not as_json:
                    display.show(event)
                elif isinstance(event, Done):
                    click.echo(json.dumps(event.result.to_dict(), ensure_ascii=False, indent=2))
    finally:
        display.close()


def _read_task(task: str | None, file: Path | None) -> str:
    if task is not None and file is not None:
        raise click.UsageError("give the task as an argument or with --file, not both")
    if task is not None and task != "-":
        return task
    try:
        if file is not None and str(file) != "-":
            return file.read_text(encoding="utf-8")
        text = "" if task is None and file is None and sys.stdin.isatty() else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the task cannot be read: {error}") from None
    if not text:
        raise click.UsageError("give a task: as an argument, with --file, or on standard input")
    return text


def _branches(instructions: tuple[str, ...], samples: int | None) -> list[Branch]:
    if instructions and samples is not None:
        raise click.UsageError("use --branch (instructions) or --branches (samples), not both")
    if samples is not None and samples < 1:
        raise click.UsageError("--branches must be at least 1")
    if not instructions and samples is None:
        raise click.UsageError("there are no branches: use --branch TEXT for each, or --branches N")
    return [Branch(text) for text in instructions] if instructions else [Branch()] * (samples or 0)


if __name__ == "__main__":
    main()
