"""`python -m pyps.cli`: the command line without the installed program."""

from pyps.cli.main import main

main()
