"""The command line: `pyps` and its commands."""

import io
import sys

import click

import pyps
from pyps.cli import adapters, measure, run
from pyps.cli.common import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(pyps.__version__, prog_name="pyps")
def main() -> None:
    """Fork-join on llama.cpp: branches run in parallel, and one answer comes straight from their KV caches."""
    # arguments and models can hold what is no Unicode (half a surrogate pair): better shown as ? than not at all; and
    # standard input has whatever is pasted or piped
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


for command in (
    run.run,
    run.new,
    run.slots,
    measure.evaluate,
    measure.bench,
    measure.doctor,
    adapters.convert,
    adapters.data,
    adapters.train,
):
    main.add_command(command)
