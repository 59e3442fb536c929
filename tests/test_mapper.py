"""The mapper against METHOD's formula, written out again in plain Python floats."""

import math
from typing import Any

import numpy as np
import pytest
from support.tiny import mapper_metadata

from pyps.adapters.mapper import FEATURES, Mapper
from pyps.errors import InputError


def by_hand(metadata: dict[str, Any], length: int, n_branches: int, layer: int, n_layers: int) -> list[float]:
    inputs = {
        "length": math.log1p(max(length, 1)),
        "num_agents": math.log1p(max(n_branches, 1)),
        "layer": layer / (n_layers - 1) if n_layers > 1 else 0.0,
    }
    features, hidden = metadata["pyps.mapper.features"], metadata["pyps.mapper.hidden_dim"]
    x = [inputs[f] for f in features]
    w1, b1, w2, b2 = (metadata.get(f"pyps.mapper.{name}", []) for name in ("w1", "b1", "w2", "b2"))
    h = [sum(w1[i * len(x) + j] * x[j] for j in range(len(x))) + b1[i] for i in range(hidden)]
    h = [v / (1 + math.exp(-v)) for v in h]
    raw = [sum(w2[o * hidden + i] * h[i] for i in range(hidden)) + b2[o] for o in range(4)]
    return [1 + 0.1 * math.tanh(raw[0]), 0.1 * math.tanh(raw[1]), 1 + 0.1 * math.tanh(raw[2]), 0.1 * math.tanh(raw[3])]


@pytest.mark.parametrize("features", [FEATURES, ("length", "layer"), ("num_agents", "layer"), ("layer",), ()])
@pytest.mark.parametrize("n_layers", [1, 4, 30])
def test_coefficients(features: tuple[str, ...], n_layers: int) -> None:
    metadata = mapper_metadata(seed=7, features=features)
    mapper = Mapper.from_metadata(metadata)
    assert mapper is not None
    lengths = [0, 1, 17, 900]
    got = mapper.coefficients(lengths, n_layers)
    assert got is not None
    assert got.dtype == np.float32
    want = [[by_hand(metadata, n, len(lengths), layer, n_layers) for layer in range(n_layers)] for n in lengths]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_an_untrained_mapper_is_exactly_the_identity() -> None:
    mapper = Mapper.from_metadata(mapper_metadata(seed=None))
    assert mapper is not None
    assert mapper.coefficients([5, 100], 30) is None


def test_no_mapper() -> None:
    assert Mapper.from_metadata({}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "transformer"}, "of type 'transformer'"),
        ({"features": ["layer", "length"]}, "in this order"),
        ({"features": ["length", "colour"]}, "in this order"),
        ({"features": None}, "in this order"),
        ({"hidden_dim": None}, "hidden_dim"),
        ({"hidden_dim": 0}, "hidden_dim"),
        ({"hidden_dim": 31}, "w1 must be"),
        ({"w1": [1.0] * 95}, "w1 must be"),
        ({"w2": None}, "w2 must be"),
        ({"b2": [1, 2, 3, 4]}, "b2 must be"),
        ({"b2": ["a", "b", "c", "d"]}, "b2 must be"),
        ({"b2": [math.nan, 0.0, 0.0, 0.0]}, "not finite"),
        ({"b1": [math.inf] * 32}, "not finite"),
    ],
)
def test_malformed(changes: dict[str, Any], message: str) -> None:
    metadata = mapper_metadata(seed=1)
    for key, value in changes.items():
        if value is None:
            del metadata[f"pyps.mapper.{key}"]
        else:
            metadata[f"pyps.mapper.{key}"] = value
    with pytest.raises(InputError, match=message):
        Mapper.from_metadata(metadata)
