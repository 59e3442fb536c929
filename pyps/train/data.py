"""Examples to train and measure on: JSON lines, one fork-join a line.

    {"task": "What is the capital of Peru?",
     "branches": [{"prompt": "Report on Peru.", "text": "Lima is the capital of Peru."}, …],
     "synthesize": "Answer in one sentence.", "target": "The capital of Peru is Lima."}

Without a target, the text synthesizer's own greedy answer is the target (self-distillation).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pyps.context import Context
from pyps.errors import InputError
from pyps.generate import Generation, generate
from pyps.layout import DEFAULT_SYNTHESIZE, Layout
from pyps.model import Model
from pyps.sampling import Sampling
from pyps.train.synthesis import TokenExample

_TOGETHER = 8  # answers that are generated in one batch
_ANSWER_TOKENS = 96  # at most, of those


class ExampleBranch(BaseModel):
    model_config = ConfigDict(extra="forbid")
    prompt: str = ""
    text: str = Field(min_length=1)
    name: str | None = None


class Example(BaseModel):
    """`family` groups examples in reports; `answer` is a short text that a right answer contains."""

    model_config = ConfigDict(extra="forbid")
    task: str = Field(min_length=1)
    branches: list[ExampleBranch] = Field(min_length=1)
    synthesize: str = DEFAULT_SYNTHESIZE
    system: str | None = None
    target: str | None = None
    family: str = ""
    answer: str = ""


def read_examples(paths: Iterable[Path]) -> list[Example]:
    """Raises InputError, with file and line, for what cannot be read."""
    examples = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                examples.append(Example.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise InputError(f"{path}, line {number}: {where + ': ' if where else ''}{first['msg']}") from None
    if not examples:
        raise InputError(f"there are no examples in {', '.join(map(str, paths))}")
    return examples


def tokenize(model: Model, layout: str, examples: Sequence[Example]) -> Iterator[TokenExample]:
    """The examples as the runtime lays them out, with its own tokenizer; generates the targets that are missing."""
    for start in range(0, len(examples), _TOGETHER):
        chunk = [_lay_out(model, layout, e) for e in examples[start : start + _TOGETHER]]
        answers = iter(_text_answers(model, [t for t in chunk if not t.answer]))
        yield from (t if t.answer else replace(t, answer=next(answers)) for t in chunk)


def _lay_out(model: Model, layout: str, e: Example) -> TokenExample:
    lay = Layout(model, layout, e.task, e.system, e.synthesize)
    prompts = lay.prompts([b.prompt for b in e.branches])
    names = [b.name or f"branch-{i + 1}" for i, b in enumerate(e.branches)]
    outputs = [model.tokenize(b.text) for b in e.branches]
    return TokenExample(
        prefix=prompts.prefix,
        branches=list(zip(prompts.branches, outputs, strict=True)),
        branch_point=prompts.branch_point,
        synthesizer=prompts.synthesizer,
        pasted=lay.pasted(names, [b.text for b in e.branches]),
        answer=[*model.tokenize(e.target), model.end_of_turn] if e.target else [],
    )


def _text_answers(model: Model, examples: Sequence[TokenExample]) -> list[list[int]]:
    if not examples:
        return []
    longest = max(len(e.prefix) + len(e.pasted) for e in examples)
    sampling = Sampling(temperature=0, repeat_penalty=1, max_tokens=_ANSWER_TOKENS)
    with Context(model, longest + _ANSWER_TOKENS, len(examples)) as ctx:
        generations = [Generation(ctx, i, e.prefix + e.pasted, sampling) for i, e in enumerate(examples)]
        for _ in generate(ctx, generations):
            pass
    return [[*g.tokens, model.end_of_turn] if g.finish_reason == "stop" else g.tokens for g in generations]
