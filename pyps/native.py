"""Loads the extension and makes sure that it and llama_cpp are of one version.

The extension works on llama.cpp's internal objects: against any other version it would read the wrong memory. This is
the only module that imports pyps._native.
"""

import importlib.metadata

# first, so that libllama is loaded from where llama_cpp keeps it: site-packages holds several copies
import llama_cpp

_FIX = "reinstall pyps (pip install --force-reinstall --no-deps pyps), or install the llama-cpp-python it was built for"


def _load():  # type: ignore[no-untyped-def]  # an extension module
    installed = importlib.metadata.version("llama-cpp-python")
    try:
        from pyps import _native
    except ImportError as error:
        raise ImportError(
            f"pyps's extension does not load with llama-cpp-python {installed} ({error}): {_FIX}."
        ) from error
    if _native.llama_cpp_version != llama_cpp.__version__:
        raise ImportError(
            f"pyps was built for llama-cpp-python {_native.llama_cpp_version}, but {llama_cpp.__version__} is "
            f"installed: {_FIX}."
        )
    return _native


_native = _load()
