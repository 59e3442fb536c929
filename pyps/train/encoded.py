"""What needs no gradient, computed once for each example and kept on disk: five sixths of the work of a step."""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from pyps.data.tokens import TokenExample
from pyps.train.synthesis import Encoded


class EncodedStore:
    """Encoded examples in a file of float16, as in the runtime's caches, and a file that says which ones it has.

    Processes on one machine share both files.

    Args:
        folder: The folder of the files.
        examples: All examples of the training run.
        sizes: Synthesis.sizes.

    Attributes:
        n_bytes: Bytes that the file takes, or would take.
        fits: Whether the disk has room for it; if not, nothing is kept.
    """

    def __init__(self, folder: Path, examples: Sequence[TokenExample], sizes: tuple[int, int, int, int]) -> None:
        self._examples, self._sizes = examples, sizes
        layers, heads, head_dim, channels = sizes
        lengths = [2 * layers * heads * head_dim * e.n_cells + channels * len(e.answer) for e in examples]
        self._starts = np.cumsum([0, *lengths])
        self.n_bytes = 2 * int(self._starts[-1])
        name = hashlib.sha256(repr((sizes, examples)).encode()).hexdigest()[:16]
        self._files = folder / f"encoded-{name}.f16", folder / f"encoded-{name}.done"
        # half of the free space stays free
        self.fits = self._files[0].exists() or self.n_bytes < shutil.disk_usage(folder).free / 2
        if not self.fits:
            return
        try:
            self._values = _map(self._files[0], np.float16, int(self._starts[-1]))
            self._done = _map(self._files[1], np.uint8, len(examples))
        except OSError:
            self.fits = False
            self.remove()

    def missing(self, which: Sequence[int]) -> list[int]:
        """Return those of the examples, given by index, that the file does not have."""
        return [i for i in which if not self._done[i]]

    def fill(self, which: Sequence[int], encode: Callable[[Sequence[TokenExample]], list[Encoded]]) -> None:
        """Encode these examples, given by index, in one batch, and keep the result."""
        for i, e in zip(which, encode([self._examples[i] for i in which]), strict=True):
            parts = [t.to(torch.float16).cpu().numpy().ravel() for t in (e.k, e.v, e.teacher)]
            self._values[self._starts[i] : self._starts[i + 1]] = np.concatenate(parts)
        self._values.flush()  # before the other file says that it has them
        self._done[list(which)] = 1

    def get(self, i: int) -> Encoded:
        """Return an example that the file has, in float16."""
        layers, heads, head_dim, channels = self._sizes
        values = torch.from_numpy(np.array(self._values[self._starts[i] : self._starts[i + 1]]))
        cells = values[: -channels * len(self._examples[i].answer)]
        k, v = cells.view(2, layers, heads, -1, head_dim)
        return Encoded(k, v, values[cells.numel() :].view(-1, channels))

    def remove(self) -> None:
        """Remove the files; they can be computed again."""
        for path in self._files:
            path.unlink(missing_ok=True)


def _map(path: Path, dtype: type, length: int) -> np.memmap:
    """Map a file, and create it with zeros if it does not exist.

    Its disk space is taken at once: writing to a mapped page that the disk has no room for kills the process.
    """
    size = length * np.dtype(dtype).itemsize
    with path.open("ab") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)
    return np.memmap(path, dtype, "r+", shape=(length,))
