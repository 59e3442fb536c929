"""The cache mapper: four scalars per branch and layer, from a small MLP (METHOD, section 2; arXiv 2606.14672)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyps.errors import InputError

FEATURES = ("length", "num_agents", "layer")  # the inputs, in this order; an adapter may use a subset

RANGE = np.float32(0.1)  # a coefficient moves at most this far from the identity


@dataclass(frozen=True)
class Mapper:
    """raw = w2 · silu(w1·x + b1) + b2 gives the coefficients of one span in one layer.

    Attributes:
        features: the inputs used, a subset of FEATURES in their order.
        w1: [hidden, inputs]; b1: [hidden]; w2: [4, hidden]; b2: [4]; all float32.
    """

    features: tuple[str, ...]
    w1: NDArray[np.float32]
    b1: NDArray[np.float32]
    w2: NDArray[np.float32]
    b2: NDArray[np.float32]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Mapper | None":
        """The mapper in an adapter's GGUF metadata (keys pyps.mapper.*), or None if it has none.

        Raises InputError, naming the key, if one is missing or malformed.
        """
        kind = metadata.get("pyps.mapper.type")
        if kind is None:
            return None
        if kind != "affine-mlp":
            raise InputError(f"its mapper is of type {kind!r}; this version of pyps knows 'affine-mlp'")
        features = metadata.get("pyps.mapper.features")
        if not isinstance(features, list) or [f for f in FEATURES if f in features] != features:
            raise InputError(f"pyps.mapper.features must be some of {', '.join(FEATURES)}, in this order")
        hidden = metadata.get("pyps.mapper.hidden_dim")
        if not isinstance(hidden, int) or not 0 < hidden <= 65536:
            raise InputError("pyps.mapper.hidden_dim is missing or not a positive number")

        def read(name: str, *shape: int) -> NDArray[np.float32]:
            values = np.asarray(metadata.get(f"pyps.mapper.{name}", []))
            if values.size != np.prod(shape) or (values.size and values.dtype.kind != "f"):
                raise InputError(f"pyps.mapper.{name} must be {list(shape)} floating-point numbers")
            if not np.isfinite(values).all():
                raise InputError(f"pyps.mapper.{name} has values that are not finite")
            return values.astype(np.float32).reshape(shape)

        w1 = read("w1", hidden, len(features))
        return cls(tuple(features), w1, read("b1", hidden), read("w2", 4, hidden), read("b2", 4))

    def coefficients(self, lengths: Sequence[int], n_layers: int) -> NDArray[np.float32] | None:
        """(a_k, b_k, a_v, b_v) for spans of these lengths that are joined together: float32 [spans, layers, 4].

        None if they are the identity throughout, as an untrained mapper's are: a join without it keeps every bit,
        while even x·1 + 0 turns -0 into +0.
        """
        layer = np.arange(n_layers, dtype=np.float32) / np.float32(max(n_layers - 1, 1))
        shape = (len(lengths), n_layers)
        inputs = {
            "length": np.broadcast_to(np.log1p(np.maximum(np.array(lengths, np.float32), 1))[:, None], shape),
            "num_agents": np.full(shape, np.log1p(np.float32(max(len(lengths), 1)))),
            "layer": np.broadcast_to(layer[None, :], shape),
        }
        x = (
            np.stack([inputs[f] for f in self.features], axis=-1)
            if self.features
            else np.zeros((*shape, 0), np.float32)
        )
        hidden = x @ self.w1.T + self.b1
        hidden = hidden / (1 + np.exp(-hidden))
        moved = RANGE * np.tanh(hidden @ self.w2.T + self.b2)  # [spans, layers, 4]
        if not moved.any():
            return None
        return np.ascontiguousarray(moved + np.array([1, 0, 1, 0], np.float32), dtype=np.float32)
