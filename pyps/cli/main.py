"""The command line. Mistakes of the user end with one clear line and exit code 2, failures with 1, Ctrl-C with 130."""

import contextlib
import errno
import importlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import chain, groupby, product
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.console import Console

import pyps
from pyps.adapters.format import LAYOUTS
from pyps.cli.display import Display, LiveDisplay, PlainDisplay, progress_bar, show_bench, show_evaluation, show_slots
from pyps.engine.context import KV_TYPES
from pyps.engine.find import AUTO, DEFAULT_MODEL, Progress, find_model
from pyps.engine.positions import check_joinable
from pyps.engine.sampling import Sampling
from pyps.errors import InputError, PypsError
from pyps.forkjoin import Branch, ForkJoin
from pyps.forkjoin.chat import Chat
from pyps.forkjoin.events import Done, Event, Mode, Result
from pyps.forkjoin.slots import load_slots, read_slots
from pyps.measure.doctor import examine
from pyps.measure.shapes import SHAPES, write_shape
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

if TYPE_CHECKING:
    from pyps.data.example import Example

_DEFAULTS = Sampling()
_CHAT_ROOM = 2048  # tokens


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
        except OSError as error:
            if error.errno == errno.EPIPE:  # click's own business
                raise
            click.echo(f"pyps: {error}", err=True)  # a full disk, for one
            ctx.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(pyps.__version__, prog_name="pyps")
def main() -> None:
    """Fork-join on llama.cpp: branches in parallel, one answer straight from their KV caches."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # arguments and models can hold what is no Unicode (half a surrogate pair): better shown as ? than not at all
        sys.stdout.reconfigure(errors="replace")


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

    def read_line(self, prompt: str) -> str | None:
        """A line from standard input; None at its end, or at Ctrl-C."""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a handler that returns would not end input()
        try:
            return input(prompt)
        except (EOFError, KeyboardInterrupt):
            return None
        finally:
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


# options that several commands have
_model = click.option(
    "--model", "-m", default=DEFAULT_MODEL, show_default=True, help="A GGUF file, 'smollm2', or hf:OWNER/REPO:QUANT."
)
_adapter = click.option(
    "--adapter",
    "-a",
    metavar="FILE",
    default=AUTO,
    show_default=True,
    help="Adapter (GGUF) for the synthesizer; 'auto': the one that pyps has for the model, if any; 'none'.",
)
_layout = click.option("--layout", type=click.Choice(LAYOUTS), help="Prompt layout. Default: the adapter's, or shared.")
_threads = click.option("--threads", "-t", type=int, help="Default: what pyps doctor found, or the physical cores.")
_kv_type = click.option(
    "--kv-type",
    metavar="TYPE",
    default="f16",
    show_default=True,
    help=f"Type of K and V in the caches: {', '.join(KV_TYPES)}; or one for K and one for V, as in q8_0/f16. The "
    "quantised ones are smaller and, on a CPU, slower.",
)


def _list_workflows(ctx: click.Context, _parameter: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        for name, path in shipped_workflows().items():
            click.echo(f"{name:12}{read_workflow(path).description}")
        ctx.exit()


@main.command(cls=_Command)
@click.argument("task", required=False)
@click.option(
    "--set", "values", multiple=True, metavar="NAME=VALUE", help="A variable of a workflow file; may be repeated."
)
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_workflows,
    help="The workflows that come with pyps: see pyps new.",
)
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
@click.option(
    "--join",
    "-j",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Join the branches of a file that --save wrote, too; may be repeated.",
)
@click.option(
    "--save", type=click.Path(path_type=Path), metavar="FILE", help="Keep the branches with their caches in a file."
)
@click.option("--chat", "chats", is_flag=True, help="Go on talking with the synthesizer, in front of the caches.")
@click.option("--system", metavar="TEXT", help="System message. Default: the model's own.")
@click.option(
    "--synthesize", metavar="TEXT", default=DEFAULT_SYNTHESIZE, show_default=True, help="The synthesizer's instruction."
)
@_model
@_adapter
@click.option(
    "--mode",
    type=click.Choice(["cache", "text"]),
    default="cache",
    show_default=True,
    help="Answer from the branches' caches, or from their pasted texts.",
)
@_layout
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
@_threads
@_kv_type
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.pass_context
def run(
    ctx: click.Context,
    task: str | None,
    values: tuple[str, ...],
    file: Path | None,
    instructions: tuple[str, ...],
    samples: int | None,
    files: tuple[Path, ...],
    save: Path | None,
    chats: bool,
    system: str | None,
    synthesize: str,
    model: str,
    adapter: str,
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
    """Run branches on TASK in parallel, then answer from all of them. Or run TASK, a workflow file (.yaml).

    \b
    pyps run "Which database should a small desktop app use?" \\
        --branch "Argue for SQLite." --branch "Argue for PostgreSQL."
    pyps run "What is 17 * 23?" --branches 4
    pyps run "What do they agree on?" --join notes.pyps --join other.pyps
    pyps run review.yaml --set repo=.
    """
    workflow = None
    # a task may end like a file's name ("Explain docker-compose.yaml"): with branches, only a file that is there counts
    alone = not (instructions or samples is not None or files)
    if task is not None and Path(task).suffix in (".yaml", ".yml") and (alone or os.path.isfile(task)):
        _check_alone(ctx)
        workflow = read_workflow(Path(task))
        variables = set_variables(workflow, _pairs(values))
        if workflow.model and ctx.get_parameter_source("model") == ParameterSource.DEFAULT:
            model = workflow.model
    elif values:
        raise click.UsageError("--set is for workflow files")
    text, branches, slots = "", [], []
    if workflow is None:
        text = _read_task(task, file)
        branches = _branches(instructions, samples, bool(files))
        if save and not branches:
            raise InputError("--save keeps the branches that are generated: give some with --branch or --branches")
        slots = [read_slots(path) for path in files]
    if chats and (as_json or task == "-" or str(file) == "-"):
        raise click.UsageError("--chat reads what you say from standard input: not with --json, or a task from there")
    sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed, max_tokens, stop)
    answer = replace(sampling, max_tokens=max_tokens if answer_tokens is None else answer_tokens, stop=())

    notes = Console(stderr=True)
    with progress_bar(notes) as report:
        if notes.is_terminal:
            report(f"loading {model}", None)
        fj = ForkJoin.from_pretrained(
            model,
            progress=report,
            adapter=_chosen(adapter),
            layout=layout,
            kv_type=kv_type,
            n_ctx=n_ctx,
            threads=threads,
        )
    with fj, _Interrupt() as interrupt:
        _show_warnings(fj)
        if workflow is not None:
            steps = run_workflow(
                fj,
                workflow,
                variables,
                Path(str(task)).parent,
                compare=compare,
                sampling=sampling,
                stopped=lambda: interrupt.asked,
            )
            _show_workflow(workflow, steps, as_json, notes)
            sys.exit(130 if interrupt.asked else 0)
        joins = [load_slots(found, fj.model, threads) for found in slots]
        given = [result.prompt for join in joins for result in join.results]
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
            stopped=lambda: interrupt.asked,
        )
        result = _show(events, [*given, *(b.prompt for b in branches)], as_json, notes)
        if save and result:
            notes.print(f"the branches are kept in {save} ({save.stat().st_size / 1e6:.1f} MB)", highlight=False)
        if chats and result and result.kept:
            _talk(Chat(fj, result.kept), answer, interrupt, notes)
    if interrupt.asked:
        sys.exit(130)


@main.command(cls=_Command)
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path), required=False)
def new(name: str, file: Path | None) -> None:
    """Copy the workflow NAME, one of pyps run --list, to FILE (NAME.yaml), to be changed."""
    known = shipped_workflows()
    if name not in known:
        raise InputError(f"there is no workflow {name!r}; there are: {', '.join(known)}")
    target = file or Path(f"{name}.yaml")
    if target.exists():
        raise InputError(f"{target} is there already: name another file")
    partial = target.with_name(target.name + ".part")
    try:
        shutil.copyfile(known[name], partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    click.echo(f"{target}: try pyps run {target}")


@main.command(cls=_Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead, whole texts included.")
def slots(file: Path, as_json: bool) -> None:
    """What is in FILE, which pyps run --save wrote."""
    found = read_slots(file)
    if as_json:
        click.echo(json.dumps(found.to_dict(), ensure_ascii=False, indent=2))
    else:
        show_slots(Console(), found)


@main.command(cls=_Command)
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def doctor(model: str | None, as_json: bool) -> None:
    """What this machine, this build and MODEL can do, and why not.

    With MODEL, also the number of threads and the batch size that suit it here: tried, and used from then on.
    MODEL is a GGUF file, 'smollm2', or hf:OWNER/REPO:QUANT.
    """
    with progress_bar(Console(stderr=True)) as report:
        found = examine(find_model(model, report) if model else None, report)
    click.echo(found.to_json() if as_json else found.to_text())


def _show_warnings(fj: ForkJoin) -> None:
    for warning in fj.adapter.warnings if fj.adapter else []:
        click.echo(f"pyps: warning: {warning}", err=True)


def _chosen(adapter: str) -> str | None:
    return None if adapter == "none" else adapter


@main.command("eval", cls=_Command)
@click.argument("data", required=False)
@_model
@_adapter
@_layout
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only so many examples of each family.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    help="Limit of each answer, and of each branch that is generated.",
)
@click.option(
    "--run-code", is_flag=True, help="Run what the model wrote, where an example has tests: in a process with limits."
)
@_kv_type
@_threads
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead, every answer included.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw it too (PNG, SVG or PDF).")
def evaluate(
    data: str | None,
    model: str,
    adapter: str,
    layout: str | None,
    limit: int | None,
    max_tokens: int,
    run_code: bool,
    kv_type: str,
    threads: int | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """How good answers from caches are, beside answers from texts, on the same branches.

    Text synthesis, cache synthesis without adapter, with its parts and with all of it, and text synthesis with the
    LoRA: right answers, KL divergence from text synthesis, agreement, time to first token. On DATA, a file of examples
    (JSON lines, see docs/train.md) or 'humaneval', or else on the built-in suite: six families of questions.
    """
    from pyps.data.example import read_examples
    from pyps.data.humaneval import read_humaneval
    from pyps.measure import evaluate as ev

    plots = _needs_extra("pyps.measure.plot", "plot") if plot else None
    if plot and plots:
        plots.check(plot)  # before the work, not after
    if data is None:
        examples = ev.read_suite()
    else:
        examples = read_humaneval() if data == "humaneval" else read_examples([Path(data)])
    examples = _limited(examples, limit)
    with progress_bar(Console(stderr=True)) as report:
        path = _chosen(adapter)
        fj = ForkJoin.from_pretrained(model, progress=report, adapter=path, layout=layout, kv_type=kv_type)
        with fj, _Interrupt() as interrupt:
            _show_warnings(fj)
            outcomes = list(
                ev.evaluate(
                    fj.model,
                    fj.adapter,
                    examples,
                    fj.layout,
                    max_tokens=max_tokens,
                    run_code=run_code,
                    kv_type=kv_type,
                    threads=threads,
                    report=lambda n: report(f"evaluating {len(examples)} examples", n / len(examples)),
                    stopped=lambda: interrupt.asked,
                )
            )
            modes = ev.summarise(outcomes)
            found = {
                "model": fj.model.name,
                "adapter": str(fj.adapter.path) if fj.adapter else None,
                "layout": fj.layout,
                "examples": modes["text"]["examples"] if modes else 0,
                "modes": modes,
            }
    if plot and plots and modes:
        plots.save(plots.draw_evaluation(modes), plot)
    if as_json:
        answers = [asdict(o) for o in outcomes]
        click.echo(json.dumps(found | {"outcomes": answers}, ensure_ascii=False, indent=2))
    elif modes:
        show_evaluation(Console(), found)
    if interrupt.asked:
        click.echo(f"pyps: stopped after {found['examples']} of {len(examples)} examples", err=True)
        sys.exit(130)


@main.command(cls=_Command)
@_model
@click.option(
    "--shape",
    type=click.Choice(list(SHAPES)),
    help="Instead of a model: random weights of this size, on the disk while it lasts.",
)
@_adapter
@_layout
@click.option("--branches", default="4", show_default=True, metavar="N,N,…", help="How many.")
@click.option("--tokens", default="128,256,512", show_default=True, metavar="N,N,…", help="Of each branch.")
@click.option("--prompt", default="32", show_default=True, metavar="N,N,…", help="Tokens of the synthesizer's prompt.")
@click.option(
    "--task",
    type=int,
    default=64,
    show_default=True,
    help="Tokens of the task. Text synthesis has them in its cache; the paper layout reads them again after the join.",
)
@click.option("--repeat", type=click.IntRange(1, 1000), default=5, show_default=True, help="Rounds for the medians.")
@_kv_type
@_threads
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw it too (PNG, SVG or PDF).")
def bench(
    model: str,
    shape: str | None,
    adapter: str,
    layout: str | None,
    branches: str,
    tokens: str,
    prompt: str,
    task: int,
    repeat: int,
    kv_type: str,
    threads: int | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """How fast: time to first token from caches and from texts, in one process, in turn.

    Beside them the floor (the synthesizer's prompt alone, on a cache that is there already), llama.cpp's own K-shift,
    and the rate at which branches decode. Let nothing else run meanwhile.
    """
    from pyps.engine.context import cell_bytes
    from pyps.measure import bench as bench_module
    from pyps.measure.bounds import measure_rates

    plots = _needs_extra("pyps.measure.plot", "plot") if plot else None
    if plot and plots:
        plots.check(plot)
    sizes = product(_numbers("--branches", branches), _numbers("--tokens", tokens), _numbers("--prompt", prompt))
    cases = [bench_module.Case(b, n, p, task) for b, n, p in sizes]
    with progress_bar(Console(stderr=True)) as report, _Interrupt() as interrupt, _shape_file(shape, report) as file:
        base = file or find_model(model, report)
        with ForkJoin.from_pretrained(
            str(file or model), progress=report, adapter=_chosen(adapter), layout=layout, kv_type=kv_type
        ) as fj:
            check_joinable(fj.model)
            for case in cases:
                case.check()
            report("what this machine can do", None)
            rates = measure_rates(fj.model, kv_type, threads)
            found: dict[str, Any] = {
                "model": f"{shape}, random weights" if shape else fj.model.name,
                "adapter": str(fj.adapter.path) if fj.adapter else None,
                "layout": fj.layout,
                "kv_type": kv_type,
                "task": task,
                "repeat": repeat,
                "machine": bench_module.describe_machine(fj.model, threads, rates),
                "cell_bytes": cell_bytes(fj.model, kv_type),
                "model_mb": base.stat().st_size / 1e6,
                "peak_mb": None,
            }
            path = fj.adapter.path if fj.adapter else None
            rows = found["rows"] = list(
                bench_module.measure(
                    fj.model,
                    fj.adapter,
                    fj.layout,
                    cases,
                    repeat=repeat,
                    rates=rates,
                    kv_type=kv_type,
                    threads=threads,
                    report=report,
                    stopped=lambda: interrupt.asked,
                )
            )
        if not interrupt.asked:
            report("peak memory", None)
            found["peak_mb"] = bench_module.peak_memory(base, path, found["layout"], kv_type, cases[-1])
    if plot and plots and rows:
        plots.save(plots.draw_bench(rows), plot)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
    elif rows:
        show_bench(Console(), found)
    if interrupt.asked:
        click.echo(f"pyps: stopped after {len(rows)} of {len(cases)} rows", err=True)
        sys.exit(130)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise click.UsageError(f"{option} must be whole numbers with commas between them, not {text!r}") from None


@contextlib.contextmanager
def _shape_file(shape: str | None, report: Progress) -> Iterator[Path | None]:
    """A model of this shape, gone afterwards."""
    if shape is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="pyps-") as folder:
        path = Path(folder) / f"{shape}-random.gguf"
        write_shape(
            path, SHAPES[shape], find_model(DEFAULT_MODEL, report), lambda done: report("writing the model", done)
        )
        yield path


def _limited(examples: "list[Example]", limit: int | None) -> "list[Example]":
    """The first `limit` of each family."""
    seen: Counter[str] = Counter()
    chosen = []
    for example in examples:
        seen[example.family] += 1
        if limit is None or seen[example.family] <= limit:
            chosen.append(example)
    return chosen


@main.command(cls=_Command)
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The file, or folder, to write.")
@click.option(
    "--base",
    default=DEFAULT_MODEL,
    show_default=True,
    help="The model it was trained on: a GGUF file, 'smollm2', or hf:OWNER/REPO:QUANT.",
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(["f16", "f32", "bf16", "q8_0"]),
    default="f16",
    show_default=True,
    help="Of the LoRA's matrices.",
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="paper",
    show_default=True,
    help="Prompt layout it was trained for; the published checkpoint: paper.",
)
@click.option(
    "--in-order", is_flag=True, help="It was trained with spans one after the other (train's in_order); rarely so."
)
@click.option("--weights", metavar="W,W,…", help="Of several checkpoints, for their average. Default: all alike.")
def convert(
    sources: tuple[Path, ...], output: Path, base: str, kind: str, layout: str, in_order: bool, weights: str | None
) -> None:
    """Turn a trained adapter into one GGUF file, or such a file back into PyTorch's (needs pyps[train]).

    SOURCES: a PEFT LoRA directory with cache_mapper.pt in it or beside it, or a checkpoint in the published layout; of
    several the weighted average is taken. Or one GGUF adapter: OUTPUT is then a folder.
    """
    convert_module = _needs_extra("pyps.convert.gguf", "train")
    with progress_bar(Console(stderr=True)) as report:
        path = find_model(base, report)
    if len(sources) == 1 and sources[0].suffix == ".gguf":
        notes = convert_module.from_gguf(sources[0], output, path)
    else:
        notes = convert_module.to_gguf(
            sources, output, path, layout=layout, in_order=in_order, type=kind, weights=_weights(weights)
        )
    for note in notes:
        click.echo(f"pyps: {note}", err=True)
    click.echo(output)


def _weights(text: str | None) -> list[float] | None:
    try:
        return [float(w) for w in text.split(",")] if text else None
    except ValueError:
        raise click.UsageError(f"--weights must be numbers with commas between them, not {text!r}") from None


@main.group()
def data() -> None:
    """Write examples to train and measure on, as JSON lines."""


def _examples(out: Path, examples: "Iterable[Example]") -> None:
    from pyps.data.example import write_examples

    click.echo(f"{out}: {write_examples(out, examples):,} examples")


_out = click.argument("out", type=click.Path(path_type=Path))
_source = click.argument("source")
_split = click.option("--split", default="train", show_default=True, help="Of a data set on the hub.")
_seed = click.option("--seed", default=0, show_default=True)


@data.command(cls=_Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--train", "n_train", default=2100, show_default=True, help="Examples to train on.")
@click.option("--held-out", "n_held_out", default=70, show_default=True, help="Examples to measure on.")
@click.option(
    "--targets",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Share of the questions with the right answer as target; the others teach what text synthesis says.",
)
@_seed
def families(folder: Path, n_train: int, n_held_out: int, targets: float, seed: int) -> None:
    """Six families of questions, and open ones (needs pyps[data]).

    Look up, combine, list, compare, majority, contradiction. Writes train.jsonl and held-out.jsonl into FOLDER; the
    latter has other entities and other ways to ask.
    """
    from pyps.data import builders

    _examples(folder / "train.jsonl", builders.families(n_train, False, seed, targets))
    _examples(folder / "held-out.jsonl", builders.families(n_held_out, True, seed))


@data.command(cls=_Command)
@_source
@_out
@click.option("--messages", default="messages", show_default=True, help="The field with the dialogue.")
@_split
def exposure(source: str, out: Path, messages: str, split: str) -> None:
    """Cut dialogues into branches: the last answer is the target.

    SOURCE is a JSON, JSON lines, CSV or Parquet file, or a data set on the Hugging Face hub (NAME or NAME:CONFIG). Its
    dialogues are lists of objects with role and content, as chat data usually have them; tool results become part of
    their branch.
    """
    from pyps.data import builders

    _examples(out, builders.exposure(builders.read_rows(source, split), messages))


@data.command(cls=_Command)
@_source
@_out
@click.option("--question", default="question", show_default=True, help="The field with the question.")
@click.option("--documents", default="context", show_default=True, help="A text, or a list: a branch for each.")
@click.option("--answer", default="answers.text", show_default=True, help="A text, or a list: its first is the target.")
@click.option("--others", default=3, show_default=True, help="Of single documents: other rows' documents added.")
@_split
@_seed
def aggregation(
    source: str, out: Path, question: str, documents: str, answer: str, others: int, split: str, seed: int
) -> None:
    """A question and a branch for each document, or for each of several answers.

    SOURCE as for exposure. The defaults fit SQuAD: pyps data aggregation squad examples.jsonl
    """
    from pyps.data import builders

    rows = builders.read_rows(source, split)
    _examples(out, builders.aggregation(rows, question, documents, answer, others, seed))


@data.command(cls=_Command)
@_source
@_out
@click.option("--task", default="prompt", show_default=True, help="The field with the task.")
@click.option("--branches", type=click.IntRange(1, 256), default=3, show_default=True, help="Samples of each task.")
@click.option("--answer", help="The field with the right answer, for pyps eval.")
@_split
def distillation(source: str, out: Path, task: str, branches: int, answer: str | None, split: str) -> None:
    """Tasks alone; the model writes branches and target itself when it is trained.

    SOURCE as for exposure.
    """
    from pyps.data import builders

    _examples(out, builders.distillation(builders.read_rows(source, split), task, branches, answer))


@main.command(cls=_Command)
@click.argument("config", type=click.Path(path_type=Path))
def train(config: Path) -> None:
    """Train an adapter as CONFIG, a YAML file, says (needs pyps[train]).

    Writes adapter.gguf into the folder that CONFIG names. Interrupted or not, the same command goes on where it was.
    Several processes: accelerate launch -m pyps.cli train CONFIG.
    """
    trainer_module = _needs_extra("pyps.train.trainer", "train")
    read_config = _needs_extra("pyps.train.config", "train").read_config
    trainer = trainer_module.Trainer(read_config(config), report=lambda line: click.echo(line, err=True))
    with _Interrupt() as interrupt:
        trainer.run(lambda: interrupt.asked)
    if interrupt.asked:
        click.echo(f"pyps: stopped after step {trainer.step}; the same command goes on from there", err=True)
        sys.exit(130)
    click.echo(trainer.config.output / trainer_module.ADAPTER)


def _needs_extra(module: str, extra: str) -> ModuleType:
    """Imports what the base installation may lack."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"this needs more packages ({error}): pip install 'pyps[{extra}]'") from None


def _talk(chat: Chat, sampling: Sampling, interrupt: _Interrupt, notes: Console) -> None:
    """Line by line, until there are no more, or no room."""
    if sys.stdin.isatty():
        notes.print("go on; Ctrl-D ends the chat", style="dim", highlight=False)
    while not interrupt.asked and (line := interrupt.read_line("> " if sys.stdin.isatty() else "")) is not None:
        if line.strip():
            for said in chat.say(line, sampling, lambda: interrupt.asked):
                click.echo(said, nl=False)
            click.echo("\n")


def _show(events: Iterator[Event], prompts: list[str], as_json: bool, notes: Console) -> Result | None:
    """Everything that goes to standard output; the prompts are those of all branches, in their order."""
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
                        click.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=2))
    finally:
        display.close()
    return result


def _show_workflow(workflow: Workflow, steps: Iterator[StepEvent], as_json: bool, notes: Console) -> None:
    """Each step as a run of its own, under its name; or one object at the end."""
    results: dict[str, Result] = {}
    for name, group in groupby(steps, lambda said: said.step):
        first = next(group)
        notes.print(f"step {first.index + 1} of {first.n}: {name}", highlight=False, style="bold")
        events = (_noted(said, results) for said in chain([first], group))
        if as_json:
            for _ in events:
                pass
        else:
            _show(events, first.prompts, False, notes)
    if as_json and results:
        click.echo(json.dumps(outcome(workflow, results), ensure_ascii=False, indent=2))


def _noted(said: StepEvent, results: dict[str, Result]) -> Event:
    if isinstance(said.event, Done):
        results[said.step] = said.event.result
    return said.event


def _check_alone(ctx: click.Context) -> None:
    """A workflow file says itself what these options say. Raises UsageError."""
    for name in (
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
    ):
        if ctx.get_parameter_source(name) != ParameterSource.DEFAULT:
            option = next(p.opts[0] for p in ctx.command.params if p.name == name)
            raise click.UsageError(f"{option} is not for workflow files: they say it themselves")


def _pairs(values: tuple[str, ...]) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise click.UsageError(f"--set {value}: must be NAME=VALUE")
    return dict((name.strip(), text) for name, _, text in (value.partition("=") for value in values))


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


def _branches(instructions: tuple[str, ...], samples: int | None, joins: bool) -> list[Branch]:
    if instructions and samples is not None:
        raise click.UsageError("use --branch (instructions) or --branches (samples), not both")
    if samples is not None and samples < 1:
        raise click.UsageError("--branches must be at least 1")
    if not instructions and samples is None and not joins:
        raise click.UsageError("there are no branches: use --branch TEXT for each, --branches N, or --join FILE")
    return [Branch(text) for text in instructions] if instructions else [Branch()] * (samples or 0)
