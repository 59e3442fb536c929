"""Loads a model file in another process first: llama.cpp aborts on some damaged files, and it must not be ours."""

import hashlib
import os
import re
import signal
import subprocess
from pathlib import Path

import llama_cpp

from pyps.engine import native
from pyps.engine.find import cache_dir
from pyps.errors import InputError

_PROGRAM = native.shipped("engine/_trial")  # native/trial.cpp
_SMALL = 2**24  # bytes: a trial of less takes 10 ms, which is not worth remembering


def try_to_load(path: Path) -> None:
    """Raises InputError if llama.cpp would abort on this file. Computes a token, the first time that a file is seen."""
    stat = path.stat()
    seen = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {llama_cpp.__version__}"
    mark = cache_dir() / "tried" / hashlib.sha256(seen.encode()).hexdigest()[:32]
    if mark.exists():
        return
    # no GPU: its memory is not for a trial; no backtrace: it would start a debugger
    quiet = {"CUDA_VISIBLE_DEVICES": "", "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run([_PROGRAM, path], capture_output=True, text=True, errors="replace", env=os.environ | quiet)
    if done.returncode == -signal.SIGKILL:
        raise InputError(f"{path}: the system killed a trial with it, for want of memory most likely")
    if done.returncode:
        words = re.search(r"GGML_ASSERT.*|what\(\): .*", done.stderr)
        raise InputError(
            f"{path}: the file is damaged: llama.cpp breaks off with it ({words[0] if words else done.returncode})"
        )
    if stat.st_size > _SMALL:
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError:
            pass  # then it is tried again next time
