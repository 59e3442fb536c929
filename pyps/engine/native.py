"""The functions of the extension (native/module.cpp), which loads only if it and llama_cpp are of one version.

The extension works on llama.cpp's internal objects: against any other version it would read the wrong memory. This is
the only module that imports `_native`; everything else writes `native.join(…)`.
"""

import importlib.metadata
from pathlib import Path

# This import comes first, so that libllama is loaded from where llama_cpp keeps it: site-packages holds several copies.
import llama_cpp

_FIX = (
    "build pyps again for it (in a checkout: make demo, or pip install --force-reinstall --no-deps .), or install the "
    "llama-cpp-python that pyps was built for"
)

try:
    from pyps.engine import _native
    from pyps.engine._native import (
        decode_at,
        hadamard,
        is_causal,
        join,
        llama_cpp_version,
        long_context,
        n_cells,
        n_layers,
        norms,
        read,
        read_span,
        why_not_joinable,
        work,
        write_span,
    )
except ImportError as error:
    raise ImportError(
        f"pyps's extension does not load with llama-cpp-python {importlib.metadata.version('llama-cpp-python')} "
        f"({error}): {_FIX}."
    ) from error
if llama_cpp_version != llama_cpp.__version__:
    raise ImportError(
        f"pyps was built for llama-cpp-python {llama_cpp_version}, but {llama_cpp.__version__} is installed: {_FIX}."
    )

__all__ = [
    "decode_at",
    "hadamard",
    "is_causal",
    "join",
    "llama_cpp_version",
    "long_context",
    "n_cells",
    "n_layers",
    "norms",
    "read",
    "read_span",
    "shipped",
    "why_not_joinable",
    "work",
    "write_span",
]


def shipped(name: str) -> Path:
    """Return the path of a file or folder that is installed with pyps ("workflows", "models", "engine/_trial").

    An editable install has the sources in one place and what CMake installs in another: the extension tells where.
    """
    return Path(str(_native.__file__)).parent.parent / name
