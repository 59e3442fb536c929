"""The join's protocol: from finished branches to a synthesizer that has read its prompt.

    placement    where each branch's output begins in the synthesizer
    join         re-encode, correct, map and place the outputs of all branches; read some of them again
    read         the synthesizer's prompt, up to the token that the answer's first one is sampled after

A run, `pyps eval`, `pyps bench` and training all go through here, so that what is measured is what runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyps.adapters.adapter import Adapter
from pyps.adapters.mapper import Mapper
from pyps.engine.context import Context, prefers_flash_attn
from pyps.engine.join import Span, join
from pyps.engine.model import Model
from pyps.engine.positions import rotated_layers, why_not_joinable
from pyps.forkjoin.reading import Again

# On a CPU llama.cpp's own flash attention has its tiled kernel from 64 tokens on, and is far slower with fewer; from
# twice as many on it gains more than moving the cells costs.
_LONG_PROMPT = 128  # tokens


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """How the contexts of a job are made.

    Attributes:
        kv_type: Type of K and V, as Context takes it.
        threads: Threads of each context; None for what suits the model on this machine.
        min_cells: Fewest cells of any context. LongRoPE encodes positions by the size of a context, so the contexts of
            one job must lie on one side of the model's limit.
    """

    kv_type: str = "f16"
    threads: int | None = None
    min_cells: int = 1

    def open(
        self,
        model: Model,
        n_ctx: int,
        n_seq: int = 1,
        *,
        flash_attn: bool | None = None,
        adapter: Adapter | None = None,
        **options: Any,
    ) -> Context:
        """Open a context, and attach an adapter's LoRA.

        Args:
            model: The model.
            n_ctx: Cells of each sequence.
            n_seq: Number of sequences.
            flash_attn: Whether to use flash attention; None for what is faster for decoding.
            adapter: Its LoRA is on for everything the context computes.
            options: More of Context's.

        Raises:
            InputError: The context cannot be made, as Context says.
            RefusedError: The model cannot generate text.
        """
        ctx = Context(
            model,
            max(n_ctx, self.min_cells),
            n_seq,
            kv_type=self.kv_type,
            flash_attn=flash_attn,
            threads=self.threads,
            **options,
        )
        if adapter:
            try:
                adapter.attach(ctx)
            except BaseException:
                ctx.close()
                raise
        return ctx


@dataclass(frozen=True)
class Output:
    """What a branch gives to the synthesizer: stretches [start, end) of one sequence's positions, and their tokens.

    The name is for the label before it.
    """

    ctx: Context
    seq: int
    stretches: tuple[tuple[int, int], ...]
    tokens: Sequence[int]
    name: str = ""

    def __len__(self) -> int:
        return len(self.tokens)


def placement(
    branch_point: int,
    lengths: Sequence[int],
    *,
    in_order: bool = False,
    labels: Sequence[int] = (),
    after: int = 0,
    n_positions: int | None = None,
) -> list[int]:
    """Return the position at which each branch's output begins after the join (docs/method.md, section 1).

    All begin at the branch point; or, for an adapter that was trained so, or with labels between them, one after the
    other in the branches' order, as their texts would. If the model has too few positions for that, all begin at the
    branch point, or behind the longest label there: that leaves room for more.

    Args:
        branch_point: The position that branches forked from.
        lengths: Tokens of each output.
        in_order: Whether the adapter asks for outputs one after the other.
        labels: Tokens of the label before each output; empty for none.
        after: Tokens that the synthesizer may need behind the outputs.
        n_positions: Positions that the model was trained on; None for any number.
    """
    before = list(labels) or [0] * len(lengths)
    end = branch_point + sum(lengths) + sum(before) + after
    if not (in_order or labels) or (n_positions is not None and end > n_positions):
        return [branch_point + max(before, default=0)] * len(lengths)
    return [branch_point + sum(lengths[:i]) + sum(before[: i + 1]) for i in range(len(lengths))]


def _spans(output: Output, start: int, choice: NDArray[np.bool_] | None) -> list[Span]:
    """Return the spans of an output that are joined; what lies between its stretches leaves no gap."""
    spans = []
    n = 0
    for first, end in output.stretches:
        joined = np.ones(end - first, np.int8) if choice is None else 1 - choice[n : n + end - first].astype(np.int8)
        edges = np.flatnonzero(np.diff(joined, prepend=0, append=0)).reshape(-1, 2)
        spans += [Span(output.seq, first + a, first + b, start + n + a) for a, b in edges.tolist()]
        n += end - first
    return spans


class Synthesizer:
    """The contexts of a synthesizer: where its prompt is read, and where its answer is decoded.

    Both are the same, except for long prompts on a CPU without our kernels: llama.cpp's own flash attention reads those
    faster and decodes slower, so they are read in a context with it, and what that holds moves to the decoder by
    another join of distance 0. Close it, or use `with`.

    Args:
        model: The model.
        prompt: Tokens of the prompt that will be read.
        cells: Cells that are needed up to the prompt's end.
        after: Cells that are needed after it.
        options: How contexts are made.
        adapter: Its LoRA is on in both contexts.
        n_logits: Most tokens of a batch whose logits may be asked of the decoder.

    Attributes:
        reader: The context that joined cells and prompts go to. Sequence 0 of it is used.
        decoder: The context that generates, in its sequence 0.

    Raises:
        InputError: A context cannot be made.
    """

    def __init__(
        self,
        model: Model,
        *,
        prompt: int,
        cells: int,
        after: int,
        options: ContextOptions,
        adapter: Adapter | None = None,
        n_logits: int | None = None,
    ) -> None:
        self.decoder = options.open(model, cells + after, adapter=adapter, n_logits=n_logits)
        self.reader = self.decoder
        # a model whose caches cannot be joined cannot be moved to the decoder either
        if prompt >= _LONG_PROMPT and not prefers_flash_attn(model, options.kv_type) and not why_not_joinable(model):
            try:
                self.reader = options.open(model, cells, flash_attn=True, adapter=adapter)
            except BaseException:
                self.decoder.close()
                raise

    def __enter__(self) -> "Synthesizer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free both contexts."""
        self.reader.close()
        self.decoder.close()

    def warm_up(self) -> None:
        """Make both contexts ready, so that the first token that counts pays for nothing but itself."""
        for ctx in {self.reader, self.decoder}:
            ctx.warm_up()

    def keep_prefix(self, source: Context, n: int, seq: int = 0) -> None:
        """Copy the first n positions of one of source's sequences.

        They come from the branches even if the synthesizer has a LoRA: what it reads was written without one.
        """
        if n:
            join(source, self.reader, [Span(seq, 0, n, 0)])

    def join(
        self,
        outputs: Sequence[Output],
        starts: Sequence[int],
        mapper: Mapper | None = None,
        again: Again | None = None,
    ) -> int:
        """Place the outputs of branches, none of them empty, at the positions that `placement` gives.

        Args:
            outputs: Of each branch; those in one context are placed by one native join.
            starts: The position at which each begins.
            mapper: Gives the coefficients of each branch and layer; None for the identity.
            again: What is not joined, since `read_again` reads it, and what the rest goes through; None for nothing.

        Returns:
            The number of cells placed.

        Raises:
            RefusedError, InputError, EngineError: As engine.join.
        """
        coefficients = None
        if mapper and outputs:
            n_layers = len(rotated_layers(self.reader.model))
            coefficients = mapper.coefficients([len(output) for output in outputs], n_layers)
        n_cells = 0
        for ctx, group in groupby(range(len(outputs)), key=lambda i: outputs[i].ctx):
            spans: list[Span] = []
            branch_of_span: list[int] = []
            for i in group:
                own = _spans(outputs[i], starts[i], again.choice[i] if again else None)
                spans += own
                branch_of_span += [i] * len(own)
            if spans:
                chosen = None if coefficients is None else coefficients[branch_of_span]
                n_cells += join(ctx, self.reader, spans, 0, chosen, correction=again.correction if again else ())
        return n_cells

    def read_again(self, outputs: Sequence[Output], starts: Sequence[int], again: Again) -> None:
        """Compute labels and chosen tokens between the joined ones, all in sight of what is before them.

        The arguments are those of `join`. Raises InputError and EngineError as Context.decode_at.
        """
        tokens: list[int] = []
        positions: list[int] = []
        for label, start in zip(again.labels, starts, strict=False):
            tokens += label
            positions += range(start - len(label), start)
        for output, start, choice in zip(outputs, starts, again.choice, strict=True):
            at = np.flatnonzero(choice).tolist()
            tokens += [output.tokens[i] for i in at]
            positions += [start + i for i in at]
        self.reader.decode_at(0, tokens, positions)

    def read(self, prompt: Sequence[int]) -> list[int]:
        """Read a prompt behind what the reader holds, and move all of it to the decoder, which must be empty.

        Returns:
            What is left to compute in the decoder: the prompt's last token; or, where both contexts are one, all of it.

        Raises:
            InputError, EngineError: As Context.decode and engine.join.
        """
        if self.reader is self.decoder:
            return list(prompt)
        self.reader.prefill(0, prompt[:-1])
        join(self.reader, self.decoder, [Span(0, 0, self.reader.end(0), 0)])
        return list(prompt[-1:])

    def forget(self, position: int) -> None:
        """Forget everything from a position on, so that the same can be done again."""
        if self.decoder is not self.reader:
            self.decoder.remove(0)
        self.reader.remove(0, position)
