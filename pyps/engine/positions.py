"""Which layers' keys carry their position, and whether moving them is exact: tried out, not read from a table of names.

A token that is alone in its sequence attends to itself only, so each layer computes the same for it wherever it stands,
RoPE aside. Its keys at position 0, moved by the join, must then be the keys that llama.cpp computes at the place that
they were moved to, in every layer. Where llama.cpp's keys are the same in both places, the layer has no positions, as
every fourth layer of SmolLM3. Anything else (K normalised after RoPE, a position that enters elsewhere) is refused.
"""

import weakref

import numpy as np
from numpy.typing import NDArray

from pyps.engine import native
from pyps.engine.context import Context, Token
from pyps.engine.model import Model
from pyps.errors import RefusedError

_FAR = 1000  # positions: far enough to turn all but the slowest channels
_TOLERANCE = 2e-3  # of a layer's largest value. Angles in float32 are off by 1e-4; another RoPE by a tenth and more

# The result for each model: its layers, or why it is refused. Trying costs a decode, so it is done once.
_tried: "weakref.WeakKeyDictionary[Model, list[bool] | RefusedError]" = weakref.WeakKeyDictionary()


def rotated_layers(model: Model) -> list[bool]:
    """Return for every layer with K and V, from 0, whether RoPE turns its keys. The first call decodes two tokens.

    Raises:
        RefusedError: This model's keys cannot be moved exactly; the text names the architecture and the reason.
        InputError: The model is closed.
    """
    model.check_open()
    if model not in _tried:
        try:
            _tried[model] = _try_to_move(model)
        except RefusedError as error:
            _tried[model] = error
    layers = _tried[model]
    if isinstance(layers, RefusedError):
        raise RefusedError(str(layers))
    return layers


def why_not_joinable(model: Model) -> str:
    """Return why this model's caches cannot be joined, or "" if they can be.

    Raises:
        InputError: The model is closed.
    """
    try:
        rotated_layers(model)
    except RefusedError as error:
        return str(error)
    return ""


def check_joinable(model: Model) -> None:
    """Raise RefusedError, naming the architecture, if this model's caches cannot be joined."""
    model.check_generates()
    if reason := why_not_joinable(model):
        raise RefusedError(f"{reason}. Text mode (--mode text) works with it.")


def _try_to_move(model: Model) -> list[bool]:
    """Move one token's keys and compare them with those that llama.cpp computes, layer by layer."""
    model.check_generates()
    if reason := native.why_not_joinable(model.address):
        raise RefusedError(reason)
    token = (model.tokenize("The") or [0])[-1]
    # f32, so that no rounding hides a difference; no flash attention, which on a GPU gives a token that is alone its
    # full weight only up to rounding, which looks like a difference after some layers
    with Context(model, 256, 3, kv_type="f32") as ctx:
        n_layers = native.n_layers(ctx.address)
        ctx.decode([Token(token, 0, 0), Token(token, _FAR, 1)])
        native.join(ctx.address, ctx.address, [(0, 0, 1, _FAR)], 2, [True] * n_layers)
        rotated = []
        for layer in range(n_layers):
            (k0, v0), (k1, v1), (moved, _) = (
                (k.view(np.float32), v.view(np.float32))
                for _, _, k, v in (native.read(ctx.address, seq, layer) for seq in range(3))
            )
            if not _same(v0, v1):
                what = f"the values of layer {layer} depend on the position"
            elif _same(k0, k1):
                rotated.append(False)
                continue
            elif _same(moved, k1):
                rotated.append(True)
                continue
            else:
                what = f"the keys of layer {layer} at two positions differ by more than RoPE"
            raise RefusedError(
                f"caches of '{model.arch}' models cannot be joined: {what}, so they cannot be moved exactly"
            )
    return rotated


def _same(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return bool(np.abs(a - b).max() <= _TOLERANCE * np.abs(b).max())
