"""The join's protocol: from finished branches to a synthesizer that has read its prompt.

    placement    where each branch's span begins in the synthesizer
    join         re-encode, map and place the spans of all branches
    read         the synthesizer's prompt, up to the token that the answer's first one is sampled from

A run, `pyps eval`, `pyps bench` and training all go through here, so that what is measured is what runs.
"""

from dataclasses import dataclass
from typing import Any

from pyps.adapters.adapter import Adapter
from pyps.engine.context import Context, prefers_flash_attn
from pyps.engine.model import Model


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
        flash_attn: bool = False,
        adapter: Adapter | None = None,
        **options: Any,
    ) -> Context:
        """Open a context, with flash attention if it is asked for or better for decoding, and attach an adapter's LoRA.

        Args:
            model: The model.
            n_ctx: Cells of each sequence.
            n_seq: Number of sequences.
            flash_attn: Whether flash attention is wanted even where decoding is slower with it.
            adapter: Its LoRA is on for everything the context computes.
            options: More of Context's.

        Raises:
            InputError, RefusedError: As Context does.
        """
        ctx = Context(
            model,
            max(n_ctx, self.min_cells),
            n_seq,
            kv_type=self.kv_type,
            flash_attn=flash_attn or prefers_flash_attn(self.kv_type),
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
