"""Probabilities from logits."""

import numpy as np

from pyps.engine.logits import log_softmax


def test_log_softmax() -> None:
    logits = np.array([[0.0, 1.0, 2.0], [1000.0, 1000.0, -1000.0]], np.float32)
    logs = log_softmax(logits)
    assert logs.dtype == np.float32
    np.testing.assert_allclose(np.exp(logs).sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(logs[0, 2], 2 - np.log(1 + np.e + np.e**2), atol=1e-6)
    np.testing.assert_allclose(logs[1, :2], -np.log(2), atol=1e-4)
    assert (log_softmax(logits[0]) == logs[0]).all()
    assert log_softmax(logits.astype(np.float64)).dtype == np.float64
