"""The commands that run: run, new and slots."""

import contextlib
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from pyps.cli.common import (
    Interrupt,
    NameValue,
    adapter_option,
    is_terminal,
    json_option,
    kv_type_option,
    layout_option,
    literal,
    model_option,
    print_json,
    progress_bar,
    read_option,
    show_warnings,
    threads_option,
    visible,
)
from pyps.cli.display import Display, LiveDisplay, PlainDisplay
from pyps.cli.tables import show_slots
from pyps.engine.sampling import Sampling
from pyps.errors import InputError
from pyps.files import check_writable, whole
from pyps.forkjoin import Branch, ForkJoin
from pyps.forkjoin.chat import Chat
from pyps.forkjoin.events import Done, Event, Mode, Result
from pyps.forkjoin.reading import Read
from pyps.forkjoin.slots import load_slots, read_slots
from pyps.prompts.layout import DEFAULT_SYNTHESIZE
from pyps.workflow import (
    StepEvent,
    Workflow,
    outcome,
    read_workflow,
    run_workflow,
    set_variables,
    shipped_workflows,
)

_DEFAULTS = Sampling()
_CHAT_ROOM = 2048  # tokens
_MAX_TASK = 1 << 24  # characters

_SAMPLING_OPTIONS = (
    click.option(
        "--max-tokens",
        type=int,
        default=_DEFAULTS.max_tokens,
        show_default=True,
        help="Most tokens of each branch.",
    ),
    click.option(
        "--temperature",
        type=float,
        default=_DEFAULTS.temperature,
        show_default=True,
        help="With 0, the most likely token is always taken.",
    ),
    click.option("--top-k", type=int, default=_DEFAULTS.top_k, show_default=True, help="0 turns it off."),
    click.option("--top-p", type=float, default=_DEFAULTS.top_p, show_default=True, help="1 turns it off."),
    click.option("--min-p", type=float, default=_DEFAULTS.min_p, show_default=True, help="0 turns it off."),
    click.option(
        "--repeat-penalty",
        type=float,
        default=_DEFAULTS.repeat_penalty,
        show_default=True,
        help="This keeps small models out of loops; 1 turns it off.",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End a branch at this text. It may be repeated."),
    click.option(
        "--seed", type=int, help="Branches take consecutive seeds from here. Without it, seeds are new each time."
    ),
)

# a workflow file has its own keys for what these options say
_NOT_FOR_WORKFLOWS = {
    "file",
    "instructions",
    "samples",
    "files",
    "save",
    "chats",
    "system",
    "synthesize",
    "mode",
    "answer_tokens",
}


def _sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of Sampling to a command, which gets one argument `sampling` from them."""

    @functools.wraps(command)
    def with_sampling(
        *arguments: Any,
        max_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repeat_penalty: float,
        stop: tuple[str, ...],
        seed: int | None,
        **options: Any,
    ) -> None:
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            seed=seed,
            max_tokens=max_tokens,
            stop=stop,
        )
        command(*arguments, sampling=sampling, **options)

    for option in reversed(_SAMPLING_OPTIONS):
        option(with_sampling)
    return with_sampling


def _list_workflows(ctx: click.Context, _parameter: click.Parameter, requested: bool) -> None:
    if requested and not ctx.resilient_parsing:
        for name, path in shipped_workflows().items():
            click.echo(f"{name:12}{read_workflow(path).description}")
        ctx.exit()


@click.command()
@click.argument("task", required=False)
@click.option(
    "--set",
    "values",
    type=NameValue(),
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a variable of a workflow file. It may be repeated.",
)
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_workflows,
    help="List the workflows that come with pyps, for pyps new.",
)
@click.option(
    "--file",
    "-f",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Read the task from a file; '-' is standard input.",
)
@click.option(
    "--branch",
    "-b",
    "instructions",
    multiple=True,
    metavar="TEXT",
    help="Add a branch with this instruction. It may be repeated.",
)
@click.option(
    "--branches",
    "-n",
    "samples",
    type=int,
    metavar="N",
    help="Let N branches sample the task itself, instead of --branch.",
)
@click.option(
    "--join",
    "-j",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Join the branches of a file that --save wrote, too. It may be repeated.",
)
@click.option(
    "--save", type=click.Path(path_type=Path), metavar="FILE", help="Keep the branches with their caches in a file."
)
@click.option("--chat", "chats", is_flag=True, help="Go on talking with the synthesizer, in front of the caches.")
@click.option("--system", metavar="TEXT", help="The system message. Without it, the model's own is used.")
@click.option(
    "--synthesize", metavar="TEXT", default=DEFAULT_SYNTHESIZE, show_default=True, help="The synthesizer's instruction."
)
@model_option
@adapter_option
@click.option(
    "--mode",
    type=click.Choice(["cache", "text"]),
    default="cache",
    show_default=True,
    help="Answer from the branches' caches, or from their pasted texts.",
)
@layout_option
@read_option
@click.option("--compare", is_flag=True, help="Answer from the branches' texts as well.")
@_sampling_options
@click.option(
    "--answer-tokens", type=int, metavar="N", help="Most tokens of the answer. Without it, as many as --max-tokens."
)
@click.option(
    "--ctx",
    "n_ctx",
    type=int,
    metavar="CELLS",
    help="Most cells that a sequence may use. Without it, as many as the job needs.",
)
@threads_option
@kv_type_option
@json_option
@click.pass_context
def run(
    ctx: click.Context,
    *,
    task: str | None,
    values: tuple[tuple[str, str], ...],
    file: Path | None,
    instructions: tuple[str, ...],
    samples: int | None,
    files: tuple[Path, ...],
    save: Path | None,
    chats: bool,
    system: str | None,
    synthesize: str,
    model: str,
    adapter: str | None,
    mode: Mode,
    layout: str | None,
    read: Read,
    compare: bool,
    sampling: Sampling,
    answer_tokens: int | None,
    n_ctx: int | None,
    threads: int | None,
    kv_type: str,
    as_json: bool,
) -> None:
    """Run branches on TASK in parallel, then answer from all of them. TASK may also be a workflow file (.yaml).

    \b
    pyps run "Which database should a small desktop app use?" \\
        --branch "Argue for SQLite." --branch "Argue for PostgreSQL."
    pyps run "What is 17 * 23?" --branches 4
    pyps run "What do they agree on?" --join notes.pyps --join other.pyps
    pyps run review.yaml --set repo=.
    """  # noqa: D301 (click's mark for lines that stay as they are is a backspace)
    workflow = None
    # a task may end like a file's name ("Explain docker-compose.yaml"): with branches, only a file that is there counts
    alone = not (instructions or samples is not None or files)
    if task is not None and Path(task).suffix in (".yaml", ".yml") and (alone or os.path.isfile(task)):
        _check_alone(ctx)
        workflow = read_workflow(Path(task))
        variables = set_variables(workflow, dict(values))
        if workflow.model and ctx.get_parameter_source("model") == ParameterSource.DEFAULT:
            model = workflow.model
    elif values:
        raise click.UsageError("--set is for workflow files")
    text, branches, slot_files = "", [], []
    if workflow is None:
        text = _read_task(task, file)
        branches = _branches(instructions, samples, bool(files))
        if save and not branches:
            raise InputError("--save keeps the branches that are generated: give some with --branch or --branches")
        slot_files = [read_slots(path) for path in files]
    if chats and (as_json or task == "-" or str(file) == "-" or (task is None and file is None)):
        raise click.UsageError("--chat reads what you say from standard input: not with --json, or a task from there")
    answer = replace(sampling, max_tokens=sampling.max_tokens if answer_tokens is None else answer_tokens, stop=())

    notes = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        with progress_bar(notes) as progress:
            if notes.is_terminal:
                progress(f"loading {model}", None)
            fj = stack.enter_context(
                ForkJoin.from_pretrained(
                    model,
                    progress=progress,
                    adapter=adapter,
                    layout=layout,
                    kv_type=kv_type,
                    n_ctx=n_ctx,
                    threads=threads,
                    read=read,
                )
            )
            interrupt = stack.enter_context(Interrupt())
            show_warnings(fj)
            # a model that has never been run is measured before its first step, which takes its time
            if workflow is not None:
                steps = run_workflow(
                    fj,
                    workflow,
                    variables,
                    Path(str(task)).parent,
                    compare=compare,
                    sampling=sampling,
                    stopped=interrupt.requested,
                )
                first = next(steps)
            else:
                joins = [load_slots(slots, fj.model, threads) for slots in slot_files]
                prompts = [result.prompt for join in joins for result in join.results] + [b.prompt for b in branches]
                events = fj.stream(
                    text,
                    branches,
                    join=joins,
                    system=system,
                    synthesize=synthesize,
                    mode=mode,
                    compare=compare,
                    sampling=sampling,
                    answer=answer,
                    save=save,
                    keep=chats,
                    room=_CHAT_ROOM if chats else 0,
                    stopped=interrupt.requested,
                )
        if workflow is not None:
            _show_workflow(workflow, chain([first], steps), as_json, notes)
        else:
            result = _show(events, prompts, as_json, notes)
            if save and result:
                notes.print(literal(f"the branches are kept in {save} ({save.stat().st_size / 1e6:.1f} MB)"))
            if chats and result and result.kept:
                _talk(Chat(fj, result.kept), answer, interrupt, notes)
    interrupt.exit_if_requested()


@click.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path), required=False)
def new(name: str, file: Path | None) -> None:
    """Copy the workflow NAME, one of pyps run --list, to FILE (NAME.yaml), so that you can change it."""
    shipped = shipped_workflows()
    if name not in shipped:
        raise InputError(f"there is no workflow {name!r}; there are: {', '.join(shipped)}")
    target = file or Path(f"{name}.yaml")
    if target.exists():
        raise InputError(f"{target} is there already: name another file")
    check_writable(target, "workflow file")
    with whole(target) as partial:
        shutil.copyfile(shipped[name], partial)
    click.echo(visible(f"{target}: try pyps run {target}"))


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead, with the whole texts.")
def slots(file: Path, as_json: bool) -> None:
    """Show what is in FILE, which pyps run --save wrote."""
    content = read_slots(file)
    if as_json:
        print_json(content.to_dict())
    else:
        show_slots(Console(), content)


def _check_alone(ctx: click.Context) -> None:
    """Raise UsageError for options that a workflow file takes the place of."""
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name in _NOT_FOR_WORKFLOWS and ctx.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise click.UsageError(f"{parameter.opts[0]} is not for workflow files: they say it themselves")


def _read_task(task: str | None, file: Path | None) -> str:
    if task is not None and file is not None:
        raise click.UsageError("give the task as an argument or with --file, not both")
    if task is not None and task != "-":
        return task
    try:
        if file is not None and str(file) != "-":
            with file.open(encoding="utf-8") as opened:
                return _bounded(opened.read(_MAX_TASK + 1))
        nobody = sys.stdin is None or (task is None and file is None and sys.stdin.isatty())
        text = "" if nobody else _bounded(sys.stdin.read(_MAX_TASK + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the task cannot be read: {error}") from None
    if not text:
        raise click.UsageError("give a task: as an argument, with --file, or on standard input")
    return text


def _bounded(text: str) -> str:
    if len(text) > _MAX_TASK:
        raise InputError(f"the task has more than {_MAX_TASK:,} characters: no model reads as much")
    return text


def _branches(instructions: tuple[str, ...], samples: int | None, joins: bool) -> list[Branch]:
    if instructions and samples is not None:
        raise click.UsageError("use --branch (instructions) or --branches (samples), not both")
    if samples is not None and samples < 1:
        raise click.UsageError("--branches must be at least 1")
    if not instructions and samples is None and not joins:
        raise click.UsageError("there are no branches: use --branch TEXT for each, --branches N, or --join FILE")
    return [Branch(text) for text in instructions] if instructions else [Branch()] * (samples or 0)


def _show(events: Iterator[Event], prompts: list[str], as_json: bool, notes: Console) -> Result | None:
    """Write everything that goes to standard output, and return the result.

    Args:
        events: What happens.
        prompts: The instructions of all branches, in their order.
        as_json: Whether only one JSON object is written, at the end.
        notes: Where a terminal sees that something is going on.
    """
    result = None
    console = Console()
    live = console.is_terminal and not as_json
    display: Display = LiveDisplay(console, prompts) if live else PlainDisplay(console)
    # while a pipe fills, or one object is prepared, a terminal at least sees that something is going on
    waiting = notes.status("running") if notes.is_terminal and not live else contextlib.nullcontext()
    try:
        with waiting:
            for event in events:
                if not as_json:
                    display.show(event)
                if isinstance(event, Done):
                    result = event.result
                    if as_json:
                        print_json(result.to_dict())
    finally:
        display.close()
    return result


def _show_workflow(workflow: Workflow, steps: Iterator[StepEvent], as_json: bool, notes: Console) -> None:
    """Write each step as a run of its own, under its name; or one object at the end."""
    results: dict[str, Result] = {}
    for name, group in groupby(steps, lambda step_event: step_event.step):
        first = next(group)
        notes.print(literal(f"step {first.index + 1} of {first.n}: {name}", "bold"))
        events = (_noted(step_event, results) for step_event in chain([first], group))
        if as_json:
            for _ in events:
                pass
        else:
            _show(events, first.prompts, False, notes)
    if as_json and results:
        print_json(outcome(workflow, results))


def _noted(step_event: StepEvent, results: dict[str, Result]) -> Event:
    """Return the event, and note the step's result if it is its last."""
    if isinstance(step_event.event, Done):
        results[step_event.step] = step_event.event.result
    return step_event.event


def _talk(chat: Chat, sampling: Sampling, interrupt: Interrupt, notes: Console) -> None:
    """Answer line by line, until there are no more; a line that cannot be answered is left out."""
    if is_terminal(sys.stdin):
        notes.print("go on; Ctrl-D ends the chat", style="dim", highlight=False)
    shows = visible if is_terminal(sys.stdout) else str
    while not interrupt.requested():
        try:
            line = interrupt.read_line("> ")
            if line is None:
                return
            if line.strip():
                for text in chat.say(line, sampling, interrupt.requested):
                    click.echo(shows(str(text)), nl=False)
                click.echo("\n")
        except InputError as error:
            click.echo(visible(f"pyps: {error}"), err=True)
