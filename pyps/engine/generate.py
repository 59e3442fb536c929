"""Several sequences of one context generating in lock step: one batch holds the next token of each."""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from pyps.engine.context import Context, Token
from pyps.engine.model import Model
from pyps.engine.sampling import Sampler, Sampling
from pyps.errors import InputError

# prompts that are completed in one batch: more hardly make it faster, and each needs cells for the longest
_TOGETHER = 32


class Generation:
    """One sequence that is generating, and what it has produced so far. Raises InputError for an empty prompt.

    Attributes:
        seq: its sequence in the context.
        start: position of the first generated token.
        tokens: the generated tokens that are part of its text; the end-of-turn token is not.
        text: their text, up to a stop text if one was met.
        finish_reason: "stop" (the model ended, or a stop text), "length" (max_tokens), or None while it goes on.
    """

    def __init__(self, ctx: Context, seq: int, prompt: Sequence[int], sampling: Sampling) -> None:
        if not prompt:
            raise InputError("a generation needs a prompt of at least one token")
        self.seq = seq
        self.prompt = list(prompt)
        self.sampling = sampling
        self.start = ctx.end(seq) + len(prompt)
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._shown = 0  # characters of text handed out
        self._ends: list[int] = []  # length of the text after each token
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def end(self) -> int:
        """The position after the last token that is part of the text."""
        return self.start + len(self.tokens)

    def _add(self, token: int, piece: bytes) -> None:
        self.tokens.append(token)
        self.text += self._bytes.decode(piece)
        self._ends.append(len(self.text))
        found = [at for stop in self.sampling.stop if (at := self.text.find(stop)) >= 0]
        if found:
            self.finish_reason = "stop"
            self.text = self.text[: min(found)]
            # a token that straddles the stop text is dropped: the span never says more than the text
            del self.tokens[sum(end <= len(self.text) for end in self._ends) :]
        elif len(self.tokens) == self.sampling.max_tokens:
            self.finish_reason = "length"

    def _new_text(self) -> str:
        """What can be shown now: not what may turn out to be the beginning of a stop text."""
        held = 0
        if self.finish_reason is None:
            for stop in self.sampling.stop:
                held = max(held, next((n for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n])), 0))
        elif self.finish_reason == "length":
            self.text += self._bytes.decode(b"", final=True)
        new = self.text[self._shown : len(self.text) - held]
        self._shown += len(new)
        return new


def feed(ctx: Context, feeds: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Append tokens to sequences, (sequence, its tokens) of each, so that the last batch has one token with logits for
    each of them, in their order."""
    body, last = [], []
    for seq, tokens in feeds:
        start = ctx.end(seq)
        body += [Token(t, start + i, seq) for i, t in enumerate(tokens[:-1])]
        last.append(Token(tokens[-1], start + len(tokens) - 1, seq, logits=True))
    if len(body) + len(last) <= ctx.n_batch:
        ctx.decode(body + last)
    else:
        ctx.decode(body)
        ctx.decode(last)


def generate(
    ctx: Context, generations: Sequence[Generation], stopped: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Generation, str]]:
    """Prefill the generations' prompts together, then decode in lock step; a finished one leaves the batch at once.

    Yields (generation, new text) for each token as it is chosen; the text may be empty (part of a character, or held
    back as the possible beginning of a stop text), and the last one of a generation comes with its finish reason set.
    When the iteration ends, every token of `generation.tokens` is in the cache and nothing after it. `stopped` is asked
    before each step; once true, generations that are not finished stay without a finish reason.

    Raises:
        InputError, EngineError: from Context.decode.
    """
    samplers = {g: Sampler(ctx.model, g.sampling) for g in generations}
    try:
        feed(ctx, [(g.seq, g.prompt) for g in generations])
        active = list(generations)
        while active and not stopped():
            batch: list[Token] = []
            for index, g in enumerate(active):
                # from the end, among the tokens that have logits
                token = samplers[g].sample(ctx, index - len(active))
                if ctx.model.ends(token):
                    g.finish_reason = "stop"
                else:
                    g._add(token, ctx.model.piece(token))
                    if g.finish_reason is None:
                        batch.append(Token(token, g.end - 1, g.seq, logits=True))
                yield g, g._new_text()
            # tokens that nobody samples after, but whose K and V belong to the span
            last_words = [
                Token(g.tokens[-1], g.end - 1, g.seq) for g in active if g.finish_reason == "length" and g.tokens
            ]
            active = [g for g in active if g.finish_reason is None]
            ctx.decode(batch + last_words)
    finally:
        for sampler in samplers.values():
            sampler.close()
    for g in generations:
        ctx.remove(g.seq, g.end)  # tokens of a stop text


def complete(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
    *,
    kv_type: str = "f16",
    flash_attn: bool = False,
    threads: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Generation]:
    """One generation for each prompt, many in one batch; what all prompts begin with is computed once. Seeds count up
    from `seed`, so a prompt given twice is continued in two ways. Raises InputError and EngineError as Context does."""
    found: list[Generation] = []
    for start in range(0, len(prompts), _TOGETHER):
        chunk = prompts[start : start + _TOGETHER]
        common = _n_common(chunk)
        with Context(
            model,
            max(map(len, chunk)) + sampling.max_tokens,
            len(chunk),
            kv_type=kv_type,
            flash_attn=flash_attn,
            threads=threads,
        ) as ctx:
            if common:
                ctx.prefill(0, chunk[0][:common])
                for seq in range(1, len(chunk)):
                    ctx.copy(0, seq)
            generations = [
                Generation(ctx, i, prompt[common:], replace(sampling, seed=(seed + start + i) % 2**31))
                for i, prompt in enumerate(chunk)
            ]
            for _ in generate(ctx, generations, stopped):
                pass
            found += generations
    return found


def _n_common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; of each at least one is left."""
    n = min(map(len, prompts)) - 1
    first = prompts[0][: max(n, 0)]
    return next((i for i, token in enumerate(first) if any(p[i] != token for p in prompts)), len(first))
