"""The command line, run as a process of its own: for exit codes, standard streams and signals."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

COMMAND = (sys.executable, "-m", "pyps.cli")


def pyps(
    *arguments: str,
    stdin: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run `pyps` with these arguments to its end, whatever its exit code.

    Args:
        arguments: What follows `pyps` on the command line.
        stdin: The text on its standard input, which is empty without.
        cwd: The folder it runs in; None for the current one.
        env: Variables beside those of this process.
        timeout: Seconds after which it counts as hanging.
    """
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin or "",
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=timeout,
        check=False,
    )
