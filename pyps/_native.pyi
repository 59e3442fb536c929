"""Types of the extension (native/module.cpp)."""

import numpy as np
from numpy.typing import NDArray

llama_cpp_version: str

def join(
    src: int,
    dst: int,
    spans: list[tuple[int, int, int, int]],
    dst_seq: int,
    rotates: list[bool],
    affine: NDArray[np.float32] | None = None,
) -> int: ...
def why_not_joinable(model: int) -> str: ...
def is_causal(model: int) -> bool: ...
def long_context(model: int) -> int: ...
def n_layers(ctx: int) -> int: ...
def read(ctx: int, seq: int, layer: int) -> tuple[list[int], list[int], NDArray[np.uint8], NDArray[np.uint8]]: ...
