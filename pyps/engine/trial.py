"""A trial of a model file in another process, since llama.cpp aborts the process on some damaged files."""

import hashlib
import os
import re
import signal
import subprocess
from pathlib import Path

import llama_cpp

from pyps.engine import native
from pyps.engine.find import cache_dir
from pyps.errors import InputError, MachineError

_PROGRAM = native.shipped("engine/_trial")  # native/trial.cpp
_SMALL = 2**24  # bytes: a trial of a smaller file takes 10 ms, which is not worth remembering


def try_to_load(path: Path) -> None:
    """Load a model in another process and compute a token there, the first time that a file is seen.

    Raises:
        InputError: llama.cpp aborts on this file.
        MachineError: The system killed the trial.
    """
    stat = path.stat()
    identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {llama_cpp.__version__}"
    mark = cache_dir() / "tried" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if mark.exists():
        return
    # no GPU, since a trial must not take its memory; no backtrace, since it would start a debugger
    settings = {"CUDA_VISIBLE_DEVICES": "", "GGML_NO_BACKTRACE": "1"}
    trial = subprocess.run(
        [_PROGRAM, path], capture_output=True, text=True, errors="replace", env=os.environ | settings, check=False
    )
    if trial.returncode == -signal.SIGKILL:
        raise MachineError(f"{path}: the system killed a trial with it, for want of memory most likely")
    if trial.returncode:
        reason = re.search(r"GGML_ASSERT.*|what\(\): .*", trial.stderr)
        raise InputError(
            f"{path}: the file is damaged: llama.cpp breaks off with it ({reason[0] if reason else trial.returncode})"
        )
    if stat.st_size > _SMALL:
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError:
            pass  # the file is tried again the next time
