"""Long prompts on a CPU: read with flash attention, in a context of their own, and moved to where the answer is
decoded, which is faster without.
"""

from collections.abc import Sequence

from pyps.engine.context import Context, prefers_flash_attn
from pyps.engine.join import Span, join

# On a CPU flash attention has its tiled kernel from 64 tokens on, and is far slower with fewer; from twice as many on
# it gains more than moving the cells costs.
_LONG = 128


def reads_apart(n_tokens: int, kv_type: str) -> bool:
    """Whether a prompt of n_tokens, for a context of this type, is better read in another one with flash attention."""
    return n_tokens >= _LONG and not prefers_flash_attn(kv_type)


def read_prompt(reader: Context, decoder: Context, prompt: Sequence[int]) -> list[int]:
    """Append a prompt to sequence 0 of the reader, and move that sequence to the decoder, where it must be empty.
    Returns what is left to compute there: the last token, or, where both are the same context, the prompt.

    Raises InputError and EngineError as Context.decode and join do.
    """
    if reader is decoder:
        return list(prompt)
    reader.prefill(0, prompt[:-1])
    join(reader, decoder, [Span(0, 0, reader.end(0), 0)])
    return list(prompt[-1:])
