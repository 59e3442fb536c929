"""Our own kernels for llama.cpp's CPU backend (native/kernels): which are in use, and why not others.

They compute products with quantised weights and flash attention, for every context of the process, a `llama_cpp.Llama`
of somebody else's included. The fastest that this CPU can run are in use from the import of pyps on; the environment
variable PYPS_KERNELS names others, or "off" for llama.cpp's own.
"""

import os

import gguf
import numpy as np

from pyps.errors import InputError, PypsError

try:
    from pyps.engine import _kernels
except ImportError as error:  # llama.cpp was built without its CPU backend as a library, or is not as expected
    _kernels = None  # type: ignore[assignment]
    _why_none = f"they do not load: {error}"
else:
    _why_none = ""

VARIABLE = "PYPS_KERNELS"
OFF = "off"
HEAD_MULTIPLE = 16  # heads of so many channels, or a multiple, have our flash attention

_mistake: InputError | None = None  # in the environment variable


def names() -> list[str]:
    """Return the names of the kernels that pyps was built with, best first."""
    return _kernels.names() if _kernels else []


def in_use() -> str:
    """Return the name of the kernels in use, or "off"."""
    return (_kernels.in_use() if _kernels else "") or OFF


def why_off() -> str:
    """Return why none of ours are in use; nothing if some are."""
    if in_use() != OFF:
        return ""
    if _why_none:
        return _why_none
    return f"{VARIABLE}={OFF}" if os.environ.get(VARIABLE) == OFF else "none of them runs on this CPU"


def types() -> list[str]:
    """Return the types of weights (llama.cpp's names) that the kernels in use multiply."""
    return _kernels.types(in_use()) if _kernels and in_use() != OFF else []


def computed() -> int:
    """Return how many nodes of llama.cpp's graphs our kernels have computed in this process."""
    return int(_kernels.computed()) if _kernels else 0


def use(name: str) -> None:
    """Use other kernels in this process, for everything that is computed from now on.

    Args:
        name: One of `names()`, or "off".

    Raises:
        InputError: There are no kernels of this name, or this CPU cannot run them.
    """
    if name != OFF:
        if name not in names():
            raise InputError(f"there are no kernels {name!r}: choose one of {', '.join([OFF, *names()])}")
        if not _kernels.runs_here(name):
            raise InputError(f"this CPU cannot run the kernels {name!r}")
        if _why_none:
            raise InputError(f"the kernels cannot be used: {_why_none}")
    if _kernels:
        _kernels.use("" if name == OFF else name)


def check() -> None:
    """Raise InputError if the environment variable asks for kernels that there are not."""
    if _mistake:
        raise _mistake


def _install() -> None:
    """Stand in front of llama.cpp's own choice of kernels, and see whether that works."""
    global _why_none, _mistake
    if not _kernels:
        return
    try:
        _kernels.install()
    except PypsError as error:
        _why_none = str(error)
        return
    choice = os.environ.get(VARIABLE, "")
    best = next((name for name in names() if _kernels.runs_here(name)), OFF)
    try:
        use(choice or best)
    except InputError as error:
        _mistake = InputError(f"{VARIABLE}={choice}: {error}")
    if in_use() != OFF and not _hook_works():
        _kernels.use("")
        _why_none = "llama.cpp does not ask for them"


def _hook_works() -> bool:
    """Return whether a small product comes out right, and was computed by our kernels."""
    weights = np.zeros((1, 34), np.uint8)  # a block of Q8_0 that holds 32 times 3
    weights[0, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    weights[0, 2:] = 3
    before = computed()
    product = _kernels.multiply(int(gguf.GGMLQuantizationType.Q8_0), weights, np.ones((1, 1, 1, 32), np.float32), 1)
    return computed() > before and abs(float(product[0, 0, 0, 0]) - 96) < 1e-3


_install()
