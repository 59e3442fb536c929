"""The help of every command as Markdown: docs/cli.md holds it, between marks that cog looks for.

cog -r -I tools docs/cli.md
"""

import re
from collections.abc import Iterator

import click

from pyps.cli import main

_WIDTH = 100  # columns of the help, whatever the terminal has


def _contexts(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[click.Context]:
    settings = {**command.context_settings, "max_content_width": _WIDTH, "terminal_width": _WIDTH}
    context = click.Context(command, parent=parent, info_name=name, **settings)
    yield context
    if isinstance(command, click.Group):
        for subcommand in sorted(command.commands):
            yield from _contexts(command.commands[subcommand], subcommand, context)


def markdown() -> str:
    """Return a section for each command and subcommand, with what `--help` prints."""
    sections = []
    for context in _contexts(main, "pyps"):
        text = re.sub(r"[ \t]+$", "", context.command.get_help(context), flags=re.MULTILINE)
        sections.append(f"\n## {context.command_path}\n\n```text\n{text}\n```\n")
    return "".join(sections)
