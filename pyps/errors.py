"""The exceptions of pyps. Every call ends in a result or in one of these, whatever the caller passes in.

PypsError                    exit code 1
├── InputError               2: a mistake in the request
│   └── RefusedError         2: a model that cannot do what is asked for
├── MachineError             1: the network, the disk or the memory
└── EngineError              1: llama.cpp
"""

from typing import ClassVar

from pydantic import ValidationError


class PypsError(Exception):
    """The base of all exceptions that pyps raises on purpose.

    Attributes:
        exit_code: The exit code of a command that ends with the exception.
    """

    exit_code: ClassVar[int] = 1


class InputError(PypsError, ValueError):
    """The request is wrong or does not fit; the message says what to change."""

    exit_code: ClassVar[int] = 2


class RefusedError(InputError):
    """This model's cache cannot be joined; the message names the architecture and the reason."""


class MachineError(PypsError, OSError):
    """The network, the disk or the memory failed, although the request was right."""


class EngineError(PypsError, RuntimeError):
    """llama.cpp failed at something that should have worked, or its computation was aborted."""


def first_of(error: ValidationError) -> tuple[tuple[int | str, ...], str]:
    """Return where pydantic's first complaint is, as keys and indices, and the complaint as a sentence."""
    first = error.errors()[0]
    if first["type"] == "extra_forbidden":
        return first["loc"], f"there is no such key: {first['loc'][-1]}"
    return first["loc"], first["msg"].removeprefix("Value error, ")
