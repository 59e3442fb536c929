"""Contexts as the synthesizer has them."""

from typing import Any

from pyps.adapters.adapter import Adapter
from pyps.engine.context import Context
from pyps.engine.model import Model


def context_with(adapter: Adapter | None, model: Model, n_ctx: int, n_seq: int = 1, **options: Any) -> Context:
    """Open a context with an adapter's LoRA attached."""
    ctx = Context(model, n_ctx, n_seq, **options)
    if adapter:
        adapter.attach(ctx)
    return ctx
