"""What logits mean: the probabilities of the tokens that could come next."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_Float = TypeVar("_Float", np.float32, np.float64)


def log_softmax(logits: NDArray[_Float]) -> NDArray[_Float]:
    """Return the natural logarithms of the probabilities that logits stand for, in the logits' own precision.

    Args:
        logits: [..., vocabulary], one distribution per row.

    Returns:
        An array of the same shape and type.
    """
    shifted: NDArray[_Float] = logits - logits.max(axis=-1, keepdims=True)  # or exp overflows
    log_sum: NDArray[_Float] = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted - log_sum
