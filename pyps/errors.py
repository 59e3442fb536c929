"""The exceptions of pyps. Whatever a caller passes in ends in a result or in one of these."""


class PypsError(Exception):
    """Base of all exceptions that pyps raises on purpose."""


class InputError(PypsError, ValueError):
    """Something that was asked for is wrong or does not fit; the message says what to change."""


class RefusedError(InputError):
    """This model's cache cannot be joined; the message names the architecture and the reason."""


class EngineError(PypsError, RuntimeError):
    """llama.cpp failed at something that should have worked, or its computation was aborted."""
