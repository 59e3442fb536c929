"""GGUF files, read without trusting them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from pyps.errors import InputError


class _Reader(gguf.GGUFReader):
    """Refuses to read past the end: gguf's own reader would go on with nothing, as often as a damaged length says."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"{count:,} values are said to be at byte {offset:,} of {len(self.data):,}")
        return super()._get(offset, dtype, count, override_order)


@contextmanager
def open_gguf(path: Path, what: str) -> Iterator[gguf.GGUFReader]:
    """A reader of path; `what` it should be ("model") is for error messages. All is to be read inside the `with`:
    gguf's reader indexes a memory map without checks, so a damaged file shows as almost any exception.

    Raises InputError, whatever goes wrong in there.
    """
    check_gguf(path, what)
    try:
        with np.errstate(over="ignore"):  # absurd offsets are found out by _get
            reader = _Reader(path)
        yield reader
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        raise InputError(f"{path}: the file is damaged or cut off ({type(error).__name__}: {error})") from None


def check_gguf(path: Path, what: str) -> None:
    """Raises InputError unless path is a readable file that starts like GGUF. Cheap: reads four bytes."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what} file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the {what}: {error.strerror}") from None
    if magic != b"GGUF":
        raise InputError(f"{path}: not a GGUF file, so not a {what} that llama.cpp can read")
