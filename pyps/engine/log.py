"""llama.cpp's log, kept instead of printed, so that its last words can explain a failure."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator

import llama_cpp
from llama_cpp import _logger

# ggml_log_level. llama_cpp._logger's table of them is out of date.
_WARN, _ERROR = 3, 4

_recent: deque[str] = deque(maxlen=8)  # warnings and errors, newest last
_listeners: list[Callable[[str], None]] = []
_depth = 0
_lock = threading.Lock()


def _collect(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    line = text.decode("utf-8", "replace")
    if os.environ.get("PYPS_LOG"):
        sys.stderr.write(line)
    if level in (_WARN, _ERROR) and line.strip(". \n"):
        _recent.append(line.strip())
    for listen in _listeners:
        listen(line)


_callback = llama_cpp.llama_log_callback(_collect)  # llama.cpp keeps a pointer to it, so it must stay alive


@contextlib.contextmanager
def captured(listen: Callable[[str], None] | None = None) -> Iterator[None]:
    """Keep llama.cpp's log in memory while the block runs, instead of giving it to llama_cpp's logger.

    With PYPS_LOG set the log goes to stderr, too. Blocks may be nested, and used from several threads. Ctrl-C is raised
    when the block ends: an exception that is raised while llama.cpp calls back is only printed, and lost.

    Args:
        listen: A function that receives every line.
    """
    global _depth
    interrupts: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    defers = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if defers:
        signal.signal(signal.SIGINT, lambda number, _frame: interrupts.append(number))
    with _lock:
        _depth += 1
        if _depth == 1:
            _recent.clear()
            llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
        if listen:
            _listeners.append(listen)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if listen:
                _listeners.remove(listen)
            if _depth == 0:
                llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
        if defers:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if interrupts:
                raise KeyboardInterrupt


def last_words() -> str:
    """Return what llama.cpp logged last as an error or a warning, for an exception's text; "" if there is nothing."""
    # "failed to load model" only says that it failed; the line before it says why
    lines = [line for line in _recent if "failed to load model" not in line]
    return re.sub(r"^\w+: ", "", lines[-1]) if lines else ""
