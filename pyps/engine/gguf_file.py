"""GGUF files: read without trusting them, and written whole or not at all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.gguf_writer import WriterState

from pyps.errors import InputError
from pyps.files import whole


class _Reader(gguf.GGUFReader):
    """A reader that refuses to read past the end: gguf's own would read nothing, as often as a damaged length says."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"{count:,} values are said to be at byte {offset:,} of {len(self.data):,}")
        return super()._get(offset, dtype, count, override_order)


@contextmanager
def open_gguf(path: Path, what: str) -> Iterator[gguf.GGUFReader]:
    """Yield a reader of a GGUF file. Everything must be read inside the `with` block.

    gguf's reader indexes a memory map without checks, so a damaged file shows as almost any exception in the block.

    Args:
        path: The file to read.
        what: What the file should be, for error messages ("model").

    Raises:
        InputError: The file cannot be read, or the block raises whatever exception; the message names the file.
    """
    check_gguf(path, what)
    try:
        with np.errstate(over="ignore"):  # _get refuses absurd offsets
            reader = _Reader(path)
        yield reader
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        raise InputError(f"{path}: the file is damaged or cut off ({type(error).__name__}: {error})") from None


def check_gguf(path: Path, what: str) -> None:
    """Raise InputError unless a path is a readable file that starts like GGUF. It reads four bytes only.

    Args:
        path: The file to look at.
        what: What the file should be, for error messages ("model").
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what} file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the {what}: {error.strerror}") from None
    if magic != b"GGUF":
        raise InputError(f"{path}: not a GGUF file, so not a {what} that llama.cpp can read")


@contextmanager
def writing(path: Path, arch: str, *, seal: Callable[[Path], None] = lambda file: None) -> Iterator[gguf.GGUFWriter]:
    """Yield a writer for the metadata and tensors of a GGUF file, which appears whole when the block ends.

    A block whose tensors are too large to be held together announces them with add_tensor_info, calls the writer's
    write_header_to_file, write_kv_data_to_file and write_ti_data_to_file, and then write_tensor_data for each.

    Args:
        path: The file to write. Its folder must exist.
        arch: The value of general.architecture.
        seal: A function that is called with the finished file before it takes its place, and may add to it.

    Raises:
        MachineError: The disk is full or fails.
    """
    with whole(path) as partial:
        writer = gguf.GGUFWriter(partial, arch)
        try:
            yield writer
            if writer.state is WriterState.NO_FILE:
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
        finally:
            writer.close()
        seal(partial)
