"""The commands that measure: eval, bench and doctor."""

import contextlib
from dataclasses import replace
from itertools import product
from pathlib import Path

import click
from rich.console import Console

from pyps.cli.common import (
    Interrupt,
    Numbers,
    Shares,
    adapter_option,
    check_plot,
    finish,
    json_option,
    kv_type_option,
    layout_option,
    model_option,
    plot_option,
    progress_bar,
    read_option,
    show_warnings,
    threads_option,
    visible,
)
from pyps.cli.tables import show_bench, show_evaluation
from pyps.engine.find import DEFAULT_MODEL, find_model
from pyps.forkjoin import ForkJoin
from pyps.forkjoin.reading import Read
from pyps.measure.doctor import examine
from pyps.measure.shapes import SHAPES, temporary_model


@click.command("eval")
@click.argument("data", required=False)
@model_option
@adapter_option
@layout_option
@read_option
@click.option(
    "--curve",
    type=Shares(),
    default="",
    metavar="SHARE,…",
    help="Also answer with these shares of the branches' tokens read again, as in 0,0.1,0.25.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use only N examples of each family.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    help="Most tokens of each answer, and of each branch that is generated.",
)
@click.option(
    "--run-code",
    is_flag=True,
    help="Run the code that the model wrote, where an example has tests, in a process with limits.",
)
@kv_type_option
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead, with every answer.")
@plot_option
def evaluate(
    data: str | None,
    model: str,
    adapter: str | None,
    layout: str | None,
    read: Read,
    curve: list[float],
    limit: int | None,
    max_tokens: int,
    run_code: bool,
    kv_type: str,
    threads: int | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measure how good answers from caches are, beside answers from texts, on the same branches.

    Text synthesis is compared with cache synthesis without an adapter, with each of its parts and with all of it, and
    with text synthesis with the LoRA. Measured are right answers, the KL divergence from text synthesis, agreement, and
    the time to the first token. DATA is a file of examples (JSON lines, see docs/train.md), 'long' or 'humaneval'.
    Without it, the built-in suite is used: six families of questions on short branches; 'long' has branches of 100 to
    300 tokens.
    """
    from pyps.data.example import read_examples
    from pyps.data.humaneval import read_humaneval
    from pyps.measure import evaluate as evaluation

    check_plot(plot)
    if data in (None, "long"):
        examples = evaluation.read_suite(long=data == "long")
    else:
        examples = read_humaneval() if data == "humaneval" else read_examples([Path(str(data))])
    examples = evaluation.limited(examples, limit)
    with progress_bar(Console(stderr=True)) as progress:
        fj = ForkJoin.from_pretrained(
            model, progress=progress, adapter=adapter, layout=layout, kv_type=kv_type, read=read
        )
        with fj, Interrupt() as interrupt:
            show_warnings(fj)
            report = evaluation.run_evaluation(
                fj,
                examples,
                shares=curve,
                max_tokens=max_tokens,
                run_code=run_code,
                kv_type=kv_type,
                threads=threads,
                report=progress,
                stopped=interrupt.requested,
            )
    finish(
        report,
        show_evaluation,
        plot=plot,
        as_json=as_json,
        interrupt=interrupt,
        progress=f"{report.examples} of {len(examples)} examples",
    )


_JOBS = 3  # rounds of the whole job, which takes seconds, at most


@click.command()
@model_option
@click.option(
    "--shape",
    type=click.Choice(list(SHAPES)),
    help="Measure random weights of this size instead of a model. They are on the disk while the measurement lasts.",
)
@adapter_option
@layout_option
@read_option
@click.option(
    "--branches", type=Numbers(), default="4", show_default=True, metavar="N,N,…", help="Numbers of branches."
)
@click.option(
    "--tokens",
    type=Numbers(),
    default="128,256,512",
    show_default=True,
    metavar="N,N,…",
    help="Numbers of tokens of each branch.",
)
@click.option(
    "--prompt",
    type=Numbers(),
    default="32",
    show_default=True,
    metavar="N,N,…",
    help="Numbers of tokens of the synthesizer's prompt.",
)
@click.option(
    "--task",
    type=int,
    default=64,
    show_default=True,
    help="Tokens of the task. Text synthesis has them in its cache; the paper layout reads them again after the join.",
)
@click.option("--repeat", type=click.IntRange(1, 1000), default=5, show_default=True, help="Rounds for the medians.")
@click.option(
    "--answer",
    type=click.IntRange(0, 2**16),
    default=64,
    show_default=True,
    help="Tokens of the whole job's answer; 0 leaves the whole job and the steps out.",
)
@kv_type_option
@threads_option
@json_option
@plot_option
def bench(
    model: str,
    shape: str | None,
    adapter: str | None,
    layout: str | None,
    read: Read,
    branches: list[int],
    tokens: list[int],
    prompt: list[int],
    task: int,
    repeat: int,
    answer: int,
    kv_type: str,
    threads: int | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measure the time to the first token from caches and from texts, and the whole job, in turn, in one process.

    Beside the first token it measures the floor (the synthesizer's prompt alone, on a cache that is there already),
    llama.cpp's own K-shift, and the rate at which branches decode. The whole job, of the fewest tokens that are given,
    is measured beside the same without pyps's kernels, and beside llama_cpp.Llama, call after call. Let nothing else
    run meanwhile.
    """
    from pyps.measure.bench import Case, peak_memory, run_bench
    from pyps.measure.job import measure_jobs, measure_steps

    check_plot(plot)
    cases = [Case(*sizes, task) for sizes in product(branches, tokens, prompt)]
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(progress_bar(Console(stderr=True)))
        interrupt = stack.enter_context(Interrupt())
        path = find_model(DEFAULT_MODEL if shape else model, progress)
        if shape:
            path = stack.enter_context(temporary_model(shape, path, progress))
            model = str(path)
        # random weights read nothing, however often
        with ForkJoin.from_pretrained(
            model, progress=progress, adapter=adapter, layout=layout, kv_type=kv_type, read=0 if shape else read
        ) as fj:
            report = run_bench(
                fj,
                cases,
                path=path,
                reading=fj.reading(stopped=interrupt.requested),
                repeat=repeat,
                name=f"{shape}, random weights" if shape else None,
                kv_type=kv_type,
                threads=threads,
                report=progress,
                stopped=interrupt.requested,
            )
            if answer:
                jobs = measure_jobs(
                    fj,
                    path,
                    [(n, min(tokens)) for n in branches],
                    answer=answer,
                    repeat=min(repeat, _JOBS),
                    kv_type=kv_type,
                    threads=threads,
                    report=progress,
                    stopped=interrupt.requested,
                )
                report = replace(report, jobs=tuple(jobs))
                steps = measure_steps(
                    fj.model,
                    repeat=repeat,
                    kv_type=kv_type,
                    threads=threads,
                    report=progress,
                    stopped=interrupt.requested,
                )
                report = replace(report, steps=tuple(steps))
        if not interrupt.requested():
            progress("peak memory", None)
            adapter_path = Path(report.adapter) if report.adapter else None
            peak_mb = peak_memory(path, adapter_path, report.layout, kv_type, cases[-1])
            report = replace(report, peak_mb=peak_mb)
    finish(
        report,
        show_bench,
        plot=plot,
        as_json=as_json,
        interrupt=interrupt,
        progress=f"{len(report.rows)} of {len(cases)} rows",
    )


@click.command()
@click.argument("model", required=False)
@json_option
def doctor(model: str | None, as_json: bool) -> None:
    """Show what this machine, this build and MODEL can do, and why not.

    With MODEL, it also tries which number of threads and which batch size suit the model here; they are used from then
    on. MODEL is a GGUF file, 'smollm2', or hf:OWNER/REPO:QUANT.
    """
    with progress_bar(Console(stderr=True)) as progress:
        report = examine(find_model(model, progress) if model else None, progress)
    click.echo(report.to_json() if as_json else visible(report.to_text()))
