"""Running Python that a model wrote, with limits, in another process.

That is no wall against an attacker: the program can read files.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile

_SECONDS = 10
_MEMORY = 2**30  # bytes of address space
_FILE = 2**20  # bytes that a file may grow to


def runs(program: str) -> bool:
    """Return whether a program comes to its end in time and without an exception.

    The program runs in an empty folder, without standard input and environment, and with no package but the standard
    library.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", f"{_LIMITS}\n{_END}"],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(program.encode("utf-8", "replace"), timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            output = b""
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
            process.communicate()
    return output == _TOKEN.encode()


# written at the end, which a program that leaves early (sys.exit, os._exit) does not come to
_TOKEN = "the program came to its end"

_LIMITS = f"""
import os, sys
try:
    import resource
    for limit, value in (
        (resource.RLIMIT_CPU, {_SECONDS}), (resource.RLIMIT_AS, {_MEMORY}),
        (resource.RLIMIT_FSIZE, {_FILE}), (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
except (ImportError, ValueError, OSError):
    pass  # not every system has such limits; the time limit always holds
"""

_END = f"""
program = sys.stdin.buffer.read().decode()
end = os.dup(1)
quiet = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(quiet, fd)
exec(compile(program, "program", "exec"), {{"__name__": "__main__"}})
os.write(end, {_TOKEN!r}.encode())
"""
