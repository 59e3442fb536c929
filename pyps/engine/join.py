"""The join: spans of a context's sequences, placed side by side in a sequence of another (docs/method.md)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyps.engine import log, native
from pyps.engine.context import Context
from pyps.engine.positions import rotated_layers
from pyps.errors import InputError

# (K, V) of a layer, each float32 [2, channels]: rows a and b of the lines a·x + b, one for each channel. K is meant as
# it would be at position 0.
LayerCorrection = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Span:
    """Positions [start, end) of a sequence, which a join places from position `to` on."""

    seq: int
    start: int
    end: int
    to: int


def join(
    src: Context,
    dst: Context,
    spans: Sequence[Span],
    seq: int = 0,
    coefficients: NDArray[np.float32] | None = None,
    *,
    correction: Sequence[LayerCorrection] = (),
    together: bool | None = None,
) -> int:
    """Place spans of src's sequences in sequence `seq` of dst: re-encoded to their new positions, mapped, side by side.

    The source is left as it is, and dst may be src. Spans may overlap in position, with each other and with what the
    sequence holds; the sequence continues after the largest. All or nothing: on an exception dst is as it was.
    (docs/method.md, sections 1 and 2; arXiv 2606.14672, section 3.)

    Args:
        src: The context that holds the spans.
        dst: The context that gets them.
        spans: What is placed, and where.
        seq: The sequence of dst that gets them.
        coefficients: The mapper's (a_k, b_k, a_v, b_v), float32 [spans, layers, 4]; None for the identity.
        correction: What every channel of each layer goes through before that; empty for none.
        together: Whether all spans and layers are moved by one graph, or each by its own; None for what suits the
            device that holds dst. The results are the same: tests and benchmarks try both.

    Returns:
        The number of cells placed.

    Raises:
        RefusedError: This model's caches cannot be joined.
        InputError: A range lies outside its sequence, dst has no room, the contexts belong to different models, one
            is closed, or the coefficients or the correction are those of another model.
        EngineError: The computation failed or was aborted.
    """
    parts = [(s.seq, s.start, s.end, s.to) for s in spans]
    for number in [seq, *(n for part in parts for n in part)]:
        if not -(2**31) <= number < 2**31:
            raise InputError(f"{number} is neither a sequence nor a position: both are 32-bit numbers")
    rotates = rotated_layers(src.model)
    with log.captured():
        return native.join(src.address, dst.address, parts, seq, rotates, coefficients, list(correction), together)
