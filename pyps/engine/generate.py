"""Several sequences of one context generating in lock step: one batch holds the next token of each."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Generic, Literal, Protocol, TypeVar

from pyps.engine.context import Context, Token
from pyps.engine.model import Model
from pyps.engine.sampling import Sampler, Sampling
from pyps.errors import InputError, PypsError

# prompts that are completed in one batch: more hardly make it faster, and each needs cells for the longest
_TOGETHER = 32

FinishReason = Literal["stop", "length", "error"]

Stopped = Callable[[], bool]
"""Asked again and again whether the work should end early with what there is."""


def never() -> bool:
    """Return False: nothing asks the work to end early."""
    return False


class Generation:
    """One sequence that is generating, and what it has produced so far.

    Args:
        ctx: The context of the sequence.
        seq: The sequence; what it holds comes before the prompt.
        prompt: Tokens to read before the first token is chosen; at least one.
        sampling: How tokens are chosen, and when it ends.

    Attributes:
        seq: Its sequence in the context.
        start: Position of the first generated token.
        tokens: The generated tokens that are part of its text; the end-of-turn token is not.
        text: Their text, up to a stop text if one was met.
        finish_reason: "stop" (the model ended, or a stop text), "length" (max_tokens), "error", or None while it goes
            on.
        error: What went wrong, with the finish reason "error".
        pending: Tokens whose K and V are still to be computed, behind what the sequence holds.

    Raises:
        InputError: The prompt is empty, or the grammar cannot be used.
    """

    def __init__(self, ctx: Context, seq: int, prompt: Sequence[int], sampling: Sampling) -> None:
        if not prompt:
            raise InputError("a generation needs a prompt of at least one token")
        self.seq = seq
        self.sampling = sampling
        self.start = ctx.end(seq) + len(prompt)
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.error: PypsError | None = None
        self.pending = list(prompt)
        self._ctx = ctx
        self._sampler = Sampler(ctx.model, sampling)
        self._n_shown = 0  # characters of the text that were handed out
        self._ends: list[int] = []  # length of the text after each token
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def end(self) -> int:
        """The position after the last token that is part of the text."""
        return self.start + len(self.tokens)

    @property
    def samples(self) -> bool:
        """Whether another token is to be chosen after the pending ones."""
        return self.finish_reason is None

    def computed(self) -> None:
        """Note that the pending tokens are in the cache."""
        self.pending = []

    def advance(self, index: int) -> str:
        """Choose the next token from the index-th logits of the context's last batch.

        Returns:
            The text that can be shown now; it may be empty (part of a character, or the possible beginning of a stop
            text).

        Raises:
            InputError: The grammar allows no token.
        """
        token = self._sampler.sample(self._ctx, index)
        if self._ctx.model.ends(token):
            self.finish_reason = "stop"
        else:
            self.accept(token)
        if self.finish_reason:
            self.close()
        return self.new_text()

    def accept(self, token: int) -> None:
        """Append a token that was chosen, and see whether it ends the generation."""
        self.tokens.append(token)
        self.text += self._decoder.decode(self._ctx.model.piece(token))
        self._ends.append(len(self.text))
        stops = [at for stop in self.sampling.stop if (at := self.text.find(stop)) >= 0]
        if stops:
            self.finish_reason = "stop"
            self.text = self.text[: min(stops)]
            # a token that straddles the stop text is dropped: the span never says more than the text
            del self.tokens[sum(end <= len(self.text) for end in self._ends) :]
            self._ctx.remove(self.seq, self.end)
            return
        if len(self.tokens) == self.sampling.max_tokens:
            self.finish_reason = "length"
        self.pending = [token]

    def new_text(self) -> str:
        """Return what can be shown now and was not shown yet: nothing that may turn out to begin a stop text."""
        n_held = 0
        if self.finish_reason is None:
            for stop in self.sampling.stop:
                n_held = max(n_held, next((n for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n])), 0))
        elif self.finish_reason == "length":
            self.text += self._decoder.decode(b"", final=True)
        new = self.text[self._n_shown : len(self.text) - n_held]
        self._n_shown += len(new)
        return new

    def fail(self, error: PypsError) -> None:
        """End here, with what there is, because of an error."""
        self.finish_reason, self.error = "error", error
        self.close()

    def close(self) -> None:
        """Free the sampler: nothing is chosen any more."""
        self._sampler.close()


class Member(Protocol):
    """What a lock step needs to know of one sequence's work: a Generation, or an agent that takes several turns."""

    seq: int

    @property
    def pending(self) -> list[int]:
        """Tokens to compute next; empty while there is nothing to do."""

    @property
    def samples(self) -> bool:
        """Whether a token is to be chosen after the pending ones. If not, they still belong to the span."""

    def computed(self) -> None:
        """Note that the pending tokens are in the cache."""

    def advance(self, index: int) -> str:
        """Choose a token from the index-th logits of the last batch; return the text that can be shown now."""

    def fail(self, error: PypsError) -> None:
        """End with what there is."""

    def close(self) -> None:
        """Free what choosing tokens needs."""


M = TypeVar("M", bound=Member)


class LockStep(Generic[M]):
    """The sequences of one context that generate together. Between two steps sequences may come and go.

    Attributes:
        members: Who takes part; each has a sequence of its own.
    """

    def __init__(self, ctx: Context, members: Iterable[M] = ()) -> None:
        self.members = list(members)
        self._ctx = ctx

    def add(self, member: M) -> None:
        """Let another sequence take part from the next step on."""
        self.members.append(member)

    def remove(self, member: M) -> None:
        """Let a sequence go; what it holds in the cache stays."""
        self.members.remove(member)
        member.close()

    def step(self) -> list[tuple[M, str]]:
        """Compute what is pending in all sequences in one batch, and choose a token in each that goes on.

        One sequence's failure (a grammar that cannot go on) ends that sequence only.

        Returns:
            Each member for which a token was chosen, and the text that it can show now; nothing if nothing is pending.

        Raises:
            InputError, EngineError: The batch cannot be computed, as Context.decode says.
        """
        speakers = [m for m in self.members if m.pending and m.samples]
        if not speakers:
            return []
        self._compute(speakers, [m for m in self.members if m.pending and not m.samples])
        updates = []
        for i, member in enumerate(speakers):
            try:
                # from the end, among the tokens of the last batch that have logits
                updates.append((member, member.advance(i - len(speakers))))
            except PypsError as error:
                member.fail(error)
                updates.append((member, ""))
        return updates

    def flush(self) -> None:
        """Compute what is pending without choosing anything after it: last tokens, whose K and V belong to the span."""
        self._compute([], [m for m in self.members if m.pending])

    def close(self) -> None:
        """Free all samplers."""
        for member in self.members:
            member.close()

    def _compute(self, speakers: Sequence[M], others: Sequence[M]) -> None:
        """Append what is pending, so that the last batch has one token with logits for each speaker, in their order."""
        body, last = [], []
        for member in [*others, *speakers]:
            start = self._ctx.end(member.seq)
            tokens = [Token(id, start + i, member.seq) for i, id in enumerate(member.pending)]
            member.computed()
            body += tokens
            if member in speakers:
                last.append(replace(body.pop(), logits=True))
        if len(body) + len(last) <= self._ctx.n_batch:
            self._ctx.decode(body + last)
        else:
            self._ctx.decode(body)
            self._ctx.decode(last)


def generate(
    ctx: Context, generations: Sequence[Generation], stopped: Stopped = never
) -> Iterator[tuple[Generation, str]]:
    """Run generations to their ends, in lock step; one that is done leaves the batch at once.

    Yields (generation, new text) for each token as it is chosen; the last one of a generation comes with its finish
    reason set. When the iteration ends, every token of `generation.tokens` is in the cache and nothing after it.

    Args:
        ctx: The context of all generations.
        generations: Each in a sequence of its own.
        stopped: Asked before each step; once true, generations that are not done stay without a finish reason.

    Raises:
        InputError, EngineError: As Context.decode.
    """
    together = LockStep(ctx, generations)
    try:
        while not stopped() and (updates := together.step()):
            yield from updates
        together.flush()
    finally:
        together.close()


def complete(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
    *,
    kv_type: str = "f16",
    threads: int | None = None,
    stopped: Stopped = never,
) -> list[Generation]:
    """Return one generation for each prompt, many of them in one batch; what all begin with is computed once.

    Args:
        model: The model.
        prompts: Tokens of each prompt; none may be empty.
        sampling: Of all; its seed is not used.
        seed: Of the first prompt; seeds count up from it, so a prompt given twice is continued in two ways.
        kv_type: Type of K and V, as Context takes it.
        threads: Threads of the context; None for what suits the model here.
        stopped: Asked before each step; once true, generations stay as far as they are.

    Raises:
        InputError, EngineError: As Context.
    """
    generations: list[Generation] = []
    for start in range(0, len(prompts), _TOGETHER):
        chunk = prompts[start : start + _TOGETHER]
        common = _n_common(chunk)
        with Context(
            model,
            max(map(len, chunk)) + sampling.max_tokens,
            len(chunk),
            kv_type=kv_type,
            threads=threads,
        ) as ctx:
            if common:
                ctx.prefill(0, chunk[0][:common])
                for seq in range(1, len(chunk)):
                    ctx.copy(0, seq)
            batch = [
                Generation(ctx, i, prompt[common:], replace(sampling, seed=(seed + start + i) % 2**31))
                for i, prompt in enumerate(chunk)
            ]
            for _ in generate(ctx, batch, stopped):
                pass
            generations += batch
    return generations


def _n_common(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with; at least one token of each is left."""
    n = min(map(len, prompts)) - 1
    first = prompts[0][: max(n, 0)]
    return next((i for i, token in enumerate(first) if any(p[i] != token for p in prompts)), len(first))
