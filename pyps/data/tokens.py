"""Examples in tokens, laid out as the runtime does, with its own tokenizer; what is missing in them is generated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyps.data.example import Example
from pyps.engine.generate import Generation, complete
from pyps.engine.model import Model
from pyps.engine.sampling import Sampling
from pyps.prompts.layout import Layout, place

_ANSWER = Sampling(temperature=0, repeat_penalty=1, max_tokens=64)


@dataclass(frozen=True)
class Cells:
    """The cells that a synthesizer has in front of it, in the order prefix, outputs; a list of each.

    Attributes:
        at: where in the example's tree.
        pos, delta: the position each has after the join, and the distance it was moved by.
        span: the branch it comes from, or -1: the prefix, which is not mapped.
    """

    at: list[int]
    pos: list[int]
    delta: list[int]
    span: list[int]


@dataclass(frozen=True)
class TokenExample:
    """One fork-join in tokens, exactly as the runtime lays it out (pyps/layout.py).

    Attributes:
        prefix, branch_point, synthesizer: as in layout.Prompts.
        branches: (prompt, output) of each; no output may be empty.
        pasted: what follows the prefix in text synthesis.
        answer: what the synthesizer is to say, its end-of-turn token included.
        given: whether the data gave the answer, or the text synthesizer did.
        in_order: how the outputs are placed (layout.place).
    """

    prefix: list[int]
    branches: list[tuple[list[int], list[int]]]
    branch_point: int
    synthesizer: list[int]
    pasted: list[int]
    answer: list[int]
    given: bool = True
    in_order: bool = False

    @property
    def n_cells(self) -> int:
        """What the synthesizer has in front of it."""
        return self.branch_point + sum(len(output) for _, output in self.branches)

    @property
    def starts(self) -> list[int]:
        """Where each output begins after the join."""
        return place(self.branch_point, [len(output) for _, output in self.branches], self.in_order)

    @property
    def end(self) -> int:
        """The position of the synthesizer's first token."""
        return max(start + len(output) for start, (_, output) in zip(self.starts, self.branches, strict=True))

    @property
    def cells(self) -> Cells:
        at = list(range(self.branch_point))  # the prefix, if the synthesizer keeps it
        pos, delta, span = list(at), [0] * len(at), [-1] * len(at)
        start = len(self.prefix)
        for i, (to, (prompt, output)) in enumerate(zip(self.starts, self.branches, strict=True)):
            n = len(output)
            at += range(start + len(prompt), start + len(prompt) + n)
            pos += range(to, to + n)
            delta += [to - len(self.prefix) - len(prompt)] * n
            span += [i] * n
            start += len(prompt) + n
        return Cells(at, pos, delta, span)

    def __len__(self) -> int:
        """Tokens that are computed for it."""
        limbs = sum(len(p) + len(o) for p, o in self.branches)
        return len(self.prefix) + limbs + len(self.pasted) + len(self.synthesizer) + 2 * len(self.answer)


def lay_out(
    model: Model, layout: str, examples: Sequence[Example], seed: int, branch_tokens: int = 64
) -> list[TokenExample]:
    """Branches without a text are generated, all in one batch, of at most branch_tokens. Without a target the answer is
    empty."""
    layouts = [Layout(model, layout, e.task, e.system, e.synthesize) for e in examples]
    prompts = [lay.prompts([b.prompt for b in e.branches]) for lay, e in zip(layouts, examples, strict=True)]
    missing = [
        [*p.prefix, *prompt]
        for p, e in zip(prompts, examples, strict=True)
        for prompt, b in zip(p.branches, e.branches, strict=True)
        if b.text is None
    ]
    outputs = iter(complete(model, missing, Sampling(max_tokens=branch_tokens), seed))
    found: list[TokenExample] = []
    for lay, p, e in zip(layouts, prompts, examples, strict=True):
        spans = [next(outputs).tokens if b.text is None else model.tokenize(b.text) for b in e.branches]
        spans = [span or [model.end_of_turn] for span in spans]  # the model may have had nothing to say
        texts = [b.text or text_of(model, span) for b, span in zip(e.branches, spans, strict=True)]
        names = [b.name or f"branch-{i + 1}" for i, b in enumerate(e.branches)]
        found.append(
            TokenExample(
                prefix=p.prefix,
                branches=list(zip(p.branches, spans, strict=True)),
                branch_point=p.branch_point,
                synthesizer=p.synthesizer,
                pasted=lay.pasted(names, texts),
                answer=[*model.tokenize(e.target), model.end_of_turn] if e.target else [],
                given=e.target is not None,
            )
        )
    return found


def add_answers(model: Model, examples: Sequence[TokenExample]) -> list[TokenExample]:
    """Gives those without an answer the text synthesizer's own greedy one, all in one batch."""
    answers = iter(complete(model, [t.prefix + t.pasted for t in examples if not t.answer], _ANSWER, 0))
    return [t if t.answer else replace(t, answer=_with_end(model, next(answers))) for t in examples]


def text_of(model: Model, tokens: Sequence[int]) -> str:
    """What the tokens say; bytes that are no UTF-8 are replaced."""
    return b"".join(map(model.piece, tokens)).decode(errors="replace")


def _with_end(model: Model, g: Generation) -> list[int]:
    """A generation's tokens, and its end-of-turn token if it came to that."""
    return [*g.tokens, model.end_of_turn] if g.finish_reason == "stop" else g.tokens
