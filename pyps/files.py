"""Files and folders that are written whole or not at all."""

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from pyps.errors import InputError, MachineError


def check_writable(path: Path, what: str = "file") -> None:
    """Raise InputError if a file could not be written there, so that one knows before the work and not after it.

    Args:
        path: The file that is to be written.
        what: What it is, for the message ("picture").
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the {what} to write")
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written: the folder {path.parent} is not writable for you")


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where they do not exist.

    Raises:
        InputError: No folder can be there: something on the way is a file, or not writable for you.
        MachineError: The disk is full or fails.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: cannot be written to: {error.strerror}") from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be written to: {error.strerror or error}") from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a new, empty file beside `path` that takes its place when the block ends.

    Whoever reads `path` sees the old content or the new one, never a part: the new file is flushed to the disk and
    renamed. If the block raises, `path` is left as it was. The new file has a random name that nobody else uses, keeps
    the mode of the file that it replaces, and is the only thing that is ever removed. A symbolic link stays one: its
    target is replaced.

    Args:
        path: The file to write. Its folder must exist.

    Raises:
        MachineError: The disk is full or fails, or the folder cannot be written to.
    """
    target = Path(os.path.realpath(path))
    partial: Path | None = None
    try:
        partial = _create_beside(target)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
        partial = None
        _sync(target.parent)
    except MachineError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `path` that takes its name when the block ends.

    If the block raises, the new folder is removed with all that is in it.

    Args:
        path: The folder to write, which must not exist. Folders above it are made.

    Raises:
        InputError: There is such a file or folder already, or none can be made there.
        MachineError: The disk is full or fails.
    """
    if path.exists():
        raise InputError(f"{path} exists: give the name of a new folder")
    partial = path.with_name(f".{path.name[:40]}-{secrets.token_hex(8)}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    try:
        yield partial
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        partial.rename(path)
        _sync(path.parent)
    except MachineError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # it is gone already if it has been renamed


def _create_beside(target: Path) -> Path:
    """Create an empty file with a name of its own, and the mode that the target has or a new file would have."""
    try:
        mode = stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        mode = None
    while True:
        # 255 bytes is the longest name of most file systems: a long target must not make ours too long. The suffix
        # stays, since libraries choose a format by it.
        partial = target.with_name(f".{target.stem[:40]}-{secrets.token_hex(8)}{target.suffix[:20]}")
        try:
            descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            continue
        try:
            if mode is not None:
                os.fchmod(descriptor, mode)
        finally:
            os.close(descriptor)
        return partial


def _cannot_write(path: Path, error: OSError) -> MachineError:
    # NumPy's errors say only how many bytes were written
    return MachineError(f"{path}: cannot be written: {error.strerror or f'is the disk full? ({error})'}")


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, which on Linux are flushed apart from the files' content."""
    with contextlib.suppress(OSError):  # some file systems cannot flush folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
