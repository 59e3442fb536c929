"""The command line: commands parse options and print; the work is done by the folders below."""

from pyps.cli.main import main

__all__ = ["main"]
