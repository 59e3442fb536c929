"""GGUF files, read without trusting them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf

from pyps.errors import InputError


@contextmanager
def open_gguf(path: Path, what: str) -> Iterator[gguf.GGUFReader]:
    """A reader of path; `what` it should be ("model") is for error messages. All is to be read inside the `with`:
    gguf's reader indexes a memory map without checks, so a damaged file shows as almost any exception.

    Raises InputError, whatever goes wrong in there.
    """
    check_gguf(path, what)
    try:
        yield gguf.GGUFReader(path)
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
