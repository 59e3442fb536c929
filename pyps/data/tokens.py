"""Examples in tokens, laid out as for a run, with the runtime's tokenizer; what they lack is generated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyps.data.example import Example
from pyps.engine.generate import Generation, complete
from pyps.engine.model import Model
from pyps.engine.sampling import Sampling
from pyps.forkjoin.synthesis import placement
from pyps.prompts.layout import Layout

_ANSWER = Sampling(temperature=0, repeat_penalty=1, max_tokens=64)


@dataclass(frozen=True)
class SynthesizerCells:
    """The cells that a synthesizer has in front of it: the prefix, if it keeps that, and the outputs; one item a cell.

    Attributes:
        at: The index of the cell's token in the example's tree: prefix, then prompt and output of each branch.
        pos: The cell's position after the join.
        delta: The distance that the join moved it by, in positions.
        span: The branch that it comes from; -1 for the prefix, which is not mapped.
    """

    at: list[int]
    pos: list[int]
    delta: list[int]
    span: list[int]


@dataclass(frozen=True)
class TokenExample:
    """One fork-join in tokens, exactly as a run lays it out (pyps.prompts.layout).

    Attributes:
        prefix: As in layout.Prompts.
        branches: The prompt and the output of each branch; no output may be empty.
        branch_point: As in layout.Prompts.
        synthesizer: As in layout.Prompts.
        pasted: What follows the prefix in text synthesis.
        answer: What the synthesizer is to say, its end-of-turn token included.
        given: Whether the data give the answer; otherwise text synthesis does.
        in_order: Whether the outputs stand one after the other, as in placement.
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
        """The number of cells that the synthesizer has in front of it."""
        return self.branch_point + sum(len(output) for _, output in self.branches)

    @property
    def starts(self) -> list[int]:
        """The position at which each output begins after the join."""
        return placement(self.branch_point, [len(output) for _, output in self.branches], in_order=self.in_order)

    @property
    def end(self) -> int:
        """The position of the synthesizer's first token."""
        return max(start + len(output) for start, (_, output) in zip(self.starts, self.branches, strict=True))

    @property
    def cells(self) -> SynthesizerCells:
        """The cells that the synthesizer has in front of it."""
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
        return SynthesizerCells(at, pos, delta, span)

    def __len__(self) -> int:
        """Return the number of tokens that training computes for it."""
        limbs = sum(len(p) + len(o) for p, o in self.branches)
        return len(self.prefix) + limbs + len(self.pasted) + len(self.synthesizer) + 2 * len(self.answer)


def lay_out(
    model: Model, layout: str, examples: Sequence[Example], seed: int, branch_tokens: int = 64
) -> list[TokenExample]:
    """Return examples in tokens. The answer of one without a target is empty.

    Args:
        model: The model, which generates the branches that have no text, all in one batch.
        layout: The name of the prompts' layout.
        examples: The examples.
        seed: Of the sampling of branches.
        branch_tokens: Most tokens of a branch that is generated.

    Raises:
        InputError: The layout is unknown, or an example does not fit the model.
    """
    layouts = [Layout(model, layout, e.task, e.system, e.synthesize) for e in examples]
    prompts = [lay.prompts([b.prompt for b in e.branches]) for lay, e in zip(layouts, examples, strict=True)]
    missing = [
        [*p.prefix, *prompt]
        for p, e in zip(prompts, examples, strict=True)
        for prompt, b in zip(p.branches, e.branches, strict=True)
        if b.text is None
    ]
    outputs = iter(complete(model, missing, Sampling(max_tokens=branch_tokens), seed))
    token_examples: list[TokenExample] = []
    for lay, p, e in zip(layouts, prompts, examples, strict=True):
        spans = [next(outputs).tokens if b.text is None else model.tokenize(b.text) for b in e.branches]
        spans = [span or [model.end_of_turn] for span in spans]  # the model may have had nothing to say
        texts = [b.text or model.text(span) for b, span in zip(e.branches, spans, strict=True)]
        names = [b.name or f"branch-{i + 1}" for i, b in enumerate(e.branches)]
        token_examples.append(
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
    return token_examples


def add_answers(model: Model, examples: Sequence[TokenExample]) -> list[TokenExample]:
    """Return the examples, with the greedy answers of text synthesis in those that have none; one batch for all."""
    answers = iter(complete(model, [t.prefix + t.pasted for t in examples if not t.answer], _ANSWER, 0))
    return [t if t.answer else replace(t, answer=_with_end(model, next(answers))) for t in examples]


def _with_end(model: Model, generation: Generation) -> list[int]:
    """Return a generation's tokens, with the end-of-turn token if it came to that."""
    return [*generation.tokens, model.end_of_turn] if generation.finish_reason == "stop" else generation.tokens
