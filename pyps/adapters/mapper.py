"""The cache mapper: a small MLP that gives four scalars per branch and layer.

See docs/method.md, section 2, and arXiv 2606.14672.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyps.errors import InputError

FEATURES = ("length", "num_agents", "layer")  # the inputs, in this order; an adapter may use a subset

RANGE = np.float32(0.1)  # a coefficient moves at most this far from the identity

_MAX_HIDDEN = 65536


@dataclass(frozen=True)
class Mapper:
    """An MLP whose output w2 · silu(w1·x + b1) + b2 gives the coefficients of one span in one layer.

    Attributes:
        features: The inputs that it uses, a subset of FEATURES in their order.
        w1: float32 [hidden, inputs].
        b1: float32 [hidden].
        w2: float32 [4, hidden].
        b2: float32 [4].

    Raises:
        InputError: The features, a shape or a type is wrong, or a value is not finite.
    """

    features: tuple[str, ...]
    w1: NDArray[np.float32]
    b1: NDArray[np.float32]
    w2: NDArray[np.float32]
    b2: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Check the features, the shapes and the values."""
        if tuple(name for name in FEATURES if name in self.features) != self.features:
            raise InputError(f"the mapper's features must be some of {', '.join(FEATURES)}, in this order")
        if not 0 < self.b1.size <= _MAX_HIDDEN:
            raise InputError(f"the mapper's hidden layer must have 1 to {_MAX_HIDDEN} units, not {self.b1.size}")
        for name, shape in weight_shapes(len(self.features), self.b1.size).items():
            values = getattr(self, name)
            if values.shape != shape or values.dtype != np.float32:
                raise InputError(
                    f"the mapper's {name} must be {list(shape)} floating-point numbers of 32 bits, not "
                    f"{list(values.shape)} of {values.dtype}"
                )
            if not np.isfinite(values).all():
                raise InputError(f"the mapper's {name} has values that are not finite")

    def coefficients(self, lengths: Sequence[int], n_layers: int) -> NDArray[np.float32] | None:
        """Return the coefficients of spans that are joined together.

        Args:
            lengths: The spans' lengths in tokens.
            n_layers: How many layers have K and V.

        Returns:
            (a_k, b_k, a_v, b_v) as float32 [spans, layers, 4]. None if they are the identity throughout, as an
            untrained mapper's are: a join without coefficients keeps every bit, while even x·1 + 0 turns -0 into +0.
        """
        layer = np.arange(n_layers, dtype=np.float32) / np.float32(max(n_layers - 1, 1))
        shape = (len(lengths), n_layers)
        inputs = {
            "length": np.broadcast_to(np.log1p(np.maximum(np.array(lengths, np.float32), 1))[:, None], shape),
            "num_agents": np.full(shape, np.log1p(np.float32(max(len(lengths), 1)))),
            "layer": np.broadcast_to(layer[None, :], shape),
        }
        x = (
            np.stack([inputs[name] for name in self.features], axis=-1)
            if self.features
            else np.zeros((*shape, 0), np.float32)
        )
        hidden = x @ self.w1.T + self.b1
        hidden = hidden / (1 + np.exp(-hidden))
        offsets = RANGE * np.tanh(hidden @ self.w2.T + self.b2)  # [spans, layers, 4], from the identity
        if not offsets.any():
            return None
        return np.ascontiguousarray(offsets + np.array([1, 0, 1, 0], np.float32), dtype=np.float32)


def weight_shapes(n_inputs: int, n_hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a mapper's four arrays by their names."""
    return {"w1": (n_hidden, n_inputs), "b1": (n_hidden,), "w2": (4, n_hidden), "b2": (4,)}
