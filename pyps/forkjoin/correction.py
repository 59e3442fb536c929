"""The correction: what joined cells lack, on average, of those that the same tokens have in the text.

A branch's keys and values are computed without the other branches. In the text every token sees all of the text before
it, which shifts K and V of each layer in much the same way whatever the text says: a line a·x + b for each channel
takes a good part of that back, without reading anything again. Keys are compared where they would be at position 0,
since the shift does not turn with the position. (It is an affine cache mapper as in arXiv 2606.14672, but one for each
channel, and fitted by least squares in seconds instead of trained.)
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pyps.engine import native
from pyps.engine.context import Context
from pyps.engine.join import LayerCorrection, Span, join
from pyps.engine.model import Model
from pyps.errors import InputError
from pyps.forkjoin.comparison import Job
from pyps.forkjoin.reading import HEAD

_SHRINK = 0.1  # how strongly a is drawn towards 1, in parts of the variance
_AT_ONCE = 128  # cells that are compared at once: ggml sets aside memory for every span of a join

_Cells = list[tuple[NDArray[np.float16], NDArray[np.float16]]]


class CorrectionFit:
    """Sums over tokens, from which the lines are computed. Close it, or use `with`.

    Args:
        model: The model.
        threads: Threads of each context; None for what suits the model on this machine.
    """

    def __init__(self, model: Model, threads: int | None = None) -> None:
        self._model, self._threads = model, threads
        self._sums: list[tuple[_Sums, _Sums]] = []
        self._contexts: dict[str, Context] = {}

    def __enter__(self) -> "CorrectionFit":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def add(self, job: Job) -> None:
        """Add the tokens of a job: its branches' cells, and the same tokens as text synthesis has them.

        Raises InputError and EngineError, as decoding and joining.
        """
        branches, text, scratch = self._open(job)
        branches.prefill(0, job.prefix)
        join(branches, text, [Span(0, 0, len(job.prefix), 0)])
        tokens: list[int] = []
        of_branches: list[Span] = []
        in_text: list[Span] = []
        for seq, ((prompt, output), label) in enumerate(zip(job.branches, job.labels, strict=True)):
            if seq:
                join(branches, branches, [Span(0, 0, len(job.prefix), 0)], seq)
            branches.prefill(seq, [*prompt, *output])
            tokens += label
            start, at = len(job.prefix) + len(prompt), len(job.prefix) + len(tokens)
            for i in range(HEAD, len(output)):  # one cell each, so that each is turned to position 0
                of_branches.append(Span(seq, start + i, start + i + 1, 0))
                in_text.append(Span(0, at + i, at + i + 1, 0))
            tokens += output
        text.prefill(0, tokens)
        for i in range(0, len(in_text), _AT_ONCE):
            self._add_cells(
                _at_zero(branches, scratch, of_branches[i : i + _AT_ONCE]),
                _at_zero(text, scratch, in_text[i : i + _AT_ONCE]),
            )

    def _add_cells(self, joined: _Cells, wanted: _Cells) -> None:
        if not self._sums:
            self._sums = [(_Sums(k.shape[1]), _Sums(v.shape[1])) for k, v in joined]
        for (k_sums, v_sums), (k, v), (k_text, v_text) in zip(self._sums, joined, wanted, strict=True):
            k_sums.add(k, k_text)
            v_sums.add(v, v_text)

    def correction(self) -> tuple[LayerCorrection, ...]:
        """Return the lines of each layer with K and V."""
        return tuple((k.lines(), v.lines()) for k, v in self._sums)

    def _open(self, job: Job) -> tuple[Context, Context, Context]:
        """Return empty contexts that are large enough: for branches, for the text, and for cells at position 0."""
        cells = len(job.prefix) + job.n_output + sum(map(len, job.labels))
        cells = max(cells, max(len(job.prefix) + len(prompt) + len(output) for prompt, output in job.branches))
        if cells > self._model.n_ctx_train:
            raise InputError(f"a job needs {cells:,} positions; {self._model.name} has {self._model.n_ctx_train:,}")
        if (
            not self._contexts
            or self._contexts["text"].n_ctx < cells
            or self._contexts["branches"].n_seq < len(job.branches)
        ):
            self._close()
            for name, n_seq in (("branches", len(job.branches)), ("text", 1), ("scratch", 1)):
                # with flash attention rows of V are cells, and many small spans move in few steps
                self._contexts[name] = Context(
                    self._model, cells, n_seq, kv_type="f16", flash_attn=True, threads=self._threads
                )
        for ctx in self._contexts.values():
            ctx.clear()
        return self._contexts["branches"], self._contexts["text"], self._contexts["scratch"]

    def _close(self) -> None:
        for ctx in self._contexts.values():
            ctx.close()
        self._contexts.clear()


def _at_zero(src: Context, scratch: Context, spans: Sequence[Span]) -> _Cells:
    """Return K and V of each layer, float16 [spans, channels], of one cell for each span at position 0."""
    scratch.clear()
    join(src, scratch, spans, together=True)
    layers = []
    for layer in range(native.n_layers(scratch.address)):
        _, rows, k, v = native.read(scratch.address, 0, layer)
        order = np.argsort(rows)  # cells are placed side by side, in the order of the spans
        layers.append((k.view(np.float16)[order], v.view(np.float16)[order]))
    return layers


class _Sums:
    """Sums over tokens of the channels x of joined cells and y of the text's."""

    def __init__(self, n: int) -> None:
        self._n = 0
        self._x, self._y, self._xx, self._xy = np.zeros((4, n))

    def add(self, x_half: NDArray[np.float16], y_half: NDArray[np.float16]) -> None:
        """Add tokens: float16 [tokens, channels] each."""
        x, y = x_half.astype(np.float64), y_half.astype(np.float64)
        self._n += len(x)
        self._x += x.sum(0)
        self._y += y.sum(0)
        self._xx += (x * x).sum(0)
        self._xy += (x * y).sum(0)

    def lines(self) -> NDArray[np.float32]:
        """Return a and b of the line of each channel, float32 [2, channels]: least squares, with a drawn towards 1."""
        x, y = self._x / self._n, self._y / self._n
        variance = np.maximum(self._xx / self._n - x * x, 0)
        covariance = self._xy / self._n - x * y
        constant = variance <= 1e-12 * (x * x + 1e-12)
        a = (covariance + _SHRINK * variance) / np.where(constant, 1, variance * (1 + _SHRINK))
        a[constant] = 1
        return np.stack([a, y - a * x]).astype(np.float32)
