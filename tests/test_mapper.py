"""The mapper against the formula of docs/method.md, section 2, written out again in plain Python floats."""

import math
from typing import Any

import numpy as np
import pytest
from support.tiny import mapper_metadata

from pyps.adapters.format import read_mapper
from pyps.adapters.mapper import FEATURES, Mapper
from pyps.errors import InputError


def compute_by_hand(metadata: dict[str, Any], length: int, n_branches: int, layer: int, n_layers: int) -> list[float]:
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
    mapper = read_mapper(metadata)
    assert mapper is not None
    lengths = [0, 1, 17, 900]
    got = mapper.coefficients(lengths, n_layers)
    assert got is not None
    assert got.dtype == np.float32
    want = [[compute_by_hand(metadata, n, len(lengths), layer, n_layers) for layer in range(n_layers)] for n in lengths]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_an_untrained_mapper_is_exactly_the_identity() -> None:
    mapper = read_mapper(mapper_metadata(seed=None))
    assert mapper is not None
    assert mapper.coefficients([5, 100], 30) is None


def test_no_mapper() -> None:
    assert read_mapper({}) is None


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
        read_mapper(metadata)


def weights(**changes: Any) -> dict[str, Any]:
    shapes = {"w1": (8, 3), "b1": (8,), "w2": (4, 8), "b2": (4,)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()} | changes


@pytest.mark.parametrize(
    ("features", "changes", "message"),
    [
        (("layer", "length", "num_agents"), {}, "in this order"),
        (("layer",), {}, r"w1 must be \[8, 1\]"),
        (FEATURES, {"b1": np.zeros(9, np.float32)}, r"w1 must be \[9, 3\]"),
        (FEATURES, {"b1": np.zeros(0, np.float32)}, "1 to 65536 units, not 0"),
        (FEATURES, {"b2": np.zeros((4, 1), np.float32)}, r"b2 must be \[4\].*not \[4, 1\]"),
        (FEATURES, {"w2": np.zeros((4, 8))}, "w2 must be.*not.*float64"),
        (FEATURES, {"w2": np.full((4, 8), np.nan, np.float32)}, "w2 has values that are not finite"),
    ],
)
def test_no_mapper_is_made_of_wrong_arrays(features: tuple[str, ...], changes: dict[str, Any], message: str) -> None:
    Mapper(FEATURES, **weights())
    with pytest.raises(InputError, match=message):
        Mapper(features, **weights(**changes))
