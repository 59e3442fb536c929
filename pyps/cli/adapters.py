"""The commands that make adapters: data, train and convert."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from pyps.adapters.format import LAYOUTS
from pyps.cli.common import Interrupt, Weights, import_extra, progress_bar, visible
from pyps.engine.find import DEFAULT_MODEL, find_model

if TYPE_CHECKING:
    from pyps.data.example import Example


@click.command()
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
    help="Type of the LoRA's matrices.",
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="paper",
    show_default=True,
    help="The prompt layout it was trained for; that of the published checkpoint is paper.",
)
@click.option(
    "--in-order",
    is_flag=True,
    help="Say that it was trained with spans one after the other (train's in_order), which is rare.",
)
@click.option(
    "--weights",
    type=Weights(),
    metavar="W,W,…",
    help="Weights of several checkpoints in their average. Without them, all weigh the same.",
)
def convert(
    sources: tuple[Path, ...],
    output: Path,
    base: str,
    kind: str,
    layout: str,
    in_order: bool,
    weights: list[float] | None,
) -> None:
    """Turn a trained adapter into one GGUF file, or such a file back into PyTorch's.

    SOURCES are PEFT LoRA directories with cache_mapper.pt in them or beside them, or checkpoints in the published
    layout; of several, the weighted average is taken. Or they are one GGUF adapter: OUTPUT is then a folder. This needs
    pyps-llama[train].
    """
    conversion = import_extra("pyps.convert.gguf", "train")
    with progress_bar(Console(stderr=True)) as progress:
        path = find_model(base, progress)
    if len(sources) == 1 and sources[0].suffix == ".gguf":
        notes = conversion.from_gguf(sources[0], output, path)
    else:
        notes = conversion.to_gguf(sources, output, path, layout=layout, in_order=in_order, type=kind, weights=weights)
    for note in notes:
        click.echo(visible(f"pyps: {note}"), err=True)
    click.echo(visible(str(output)))


@click.group()
def data() -> None:
    """Write examples to train and measure on, as JSON lines."""


def _write(out: Path, examples: "Iterable[Example]") -> None:
    from pyps.data.example import write_examples

    click.echo(visible(f"{out}: {write_examples(out, examples):,} examples"))


_out = click.argument("out", type=click.Path(path_type=Path))
_source = click.argument("source")
_split = click.option("--split", default="train", show_default=True, help="The split of a data set on the hub.")
_seed = click.option("--seed", default=0, show_default=True, help="Seed of everything that is drawn.")


@data.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--train", "n_train", default=2100, show_default=True, help="Number of examples to train on.")
@click.option("--held-out", "n_held_out", default=70, show_default=True, help="Number of examples to measure on.")
@click.option(
    "--targets",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Share of the questions with the right answer as target; the others teach what text synthesis says.",
)
@click.option("--long", is_flag=True, help="Give them branches of 100 to 300 tokens, instead of about 15.")
@_seed
def families(folder: Path, n_train: int, n_held_out: int, targets: float, long: bool, seed: int) -> None:
    """Write six families of questions, and open ones.

    The families are: look up, combine, list, compare, majority, contradiction. With --long, candidates with two
    conditions to choose by take the place of the majority, and there are no open ones. They go into FOLDER, as
    train.jsonl and held-out.jsonl; the latter has other entities and other ways to ask. This needs pyps-llama[data].
    """
    from pyps.data import builders

    _write(folder / "train.jsonl", builders.families(n_train, False, seed, targets, long))
    _write(folder / "held-out.jsonl", builders.families(n_held_out, True, seed, long=long))


@data.command()
@_source
@_out
@click.option("--messages", default="messages", show_default=True, help="The field with the dialogue.")
@_split
def exposure(source: str, out: Path, messages: str, split: str) -> None:
    """Cut dialogues into branches; the last answer is the target.

    SOURCE is a JSON, JSON lines, CSV or Parquet file, or a data set on the Hugging Face hub (NAME or NAME:CONFIG). Its
    dialogues are lists of objects with role and content, as chat data usually have them; tool results become part of
    their branch.
    """
    from pyps.data import builders

    _write(out, builders.exposure(builders.read_rows(source, split), messages))


@data.command()
@_source
@_out
@click.option("--question", default="question", show_default=True, help="The field with the question.")
@click.option(
    "--documents",
    default="context",
    show_default=True,
    help="The field with a text, or with a list of texts, each of which becomes a branch.",
)
@click.option(
    "--answer",
    default="answers.text",
    show_default=True,
    help="The field with a text, or with a list of texts, the first of which is the target.",
)
@click.option(
    "--others",
    default=3,
    show_default=True,
    help="Number of other rows' documents that are added where the field is a text.",
)
@_split
@_seed
def aggregation(
    source: str, out: Path, question: str, documents: str, answer: str, others: int, split: str, seed: int
) -> None:
    """Make a question and a branch for each document, or for each of several answers.

    SOURCE is as for exposure. The defaults fit SQuAD: pyps data aggregation squad examples.jsonl
    """
    from pyps.data import builders

    rows = builders.read_rows(source, split)
    _write(out, builders.aggregation(rows, question, documents, answer, others, seed))


@data.command()
@_source
@_out
@click.option("--task", default="prompt", show_default=True, help="The field with the task.")
@click.option(
    "--branches", type=click.IntRange(1, 256), default=3, show_default=True, help="Number of samples of each task."
)
@click.option("--answer", help="The field with the right answer, for pyps eval.")
@_split
def distillation(source: str, out: Path, task: str, branches: int, answer: str | None, split: str) -> None:
    """Take tasks alone; the model writes branches and target itself when it is trained.

    SOURCE is as for exposure.
    """
    from pyps.data import builders

    _write(out, builders.distillation(builders.read_rows(source, split), task, branches, answer))


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
def train(config: Path) -> None:
    """Train an adapter as CONFIG, a YAML file, says.

    This writes adapter.gguf into the folder that CONFIG names. After an interruption, the same command goes on where
    training was. For several processes: accelerate launch -m pyps.cli train CONFIG. This needs pyps-llama[train].
    """
    training = import_extra("pyps.train.trainer", "train")
    read_config = import_extra("pyps.train.config", "train").read_config
    trainer = training.Trainer(read_config(config), report=lambda line: click.echo(visible(line), err=True))
    with Interrupt() as interrupt:
        trainer.run(interrupt.requested)
    interrupt.exit_if_requested(f"stopped after step {trainer.step}; the same command goes on from there")
    click.echo(visible(str(trainer.config.output / training.ADAPTER)))
