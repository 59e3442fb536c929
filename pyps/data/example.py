"""Examples to train or measure on, and their files: JSON lines, one fork-join in each.

    {"task": "What is the capital of Peru?",
     "branches": [{"prompt": "Report on Peru.", "text": "Lima is the capital of Peru."}, …],
     "synthesize": "Answer in one sentence.", "target": "The capital of Peru is Lima."}

The model generates the text of a branch that has none. In place of a missing target comes the greedy answer of text
synthesis (self-distillation).
"""

import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticSerializationError

from pyps.data.sandbox import runs
from pyps.data.scoring import contains
from pyps.errors import InputError, first_of
from pyps.files import check_writable, make_folder, whole
from pyps.prompts.layout import DEFAULT_SYNTHESIZE

CODE = "<code>"  # in Example.program, where the answer's code goes


class ExampleBranch(BaseModel):
    """A branch of an example.

    Attributes:
        prompt: Its instruction.
        text: Its output; None if the model is to generate it.
        name: A name for the output; None for "branch-1" and so on.
    """

    model_config = ConfigDict(extra="forbid")
    prompt: str = ""
    text: str | None = Field(None, min_length=1)
    name: str | None = None


class Example(BaseModel):
    """One fork-join to train or measure on.

    Attributes:
        task: What it is about.
        branches: Its branches.
        synthesize: The synthesizer's instruction.
        system: The system message; None for the model's own default.
        target: The answer to learn; None for the one of text synthesis.
        family: A group for reports.
        answer: Texts that a right answer contains, all of them.
        wrong: Texts that a right answer does not contain.
        program: A Python program with <code> in it. An answer is right if the program, with the answer's code in that
            place, comes to its end; `answer` and `wrong` do not count then.
    """

    model_config = ConfigDict(extra="forbid")
    task: str = Field(min_length=1)
    branches: list[ExampleBranch] = Field(min_length=1)
    synthesize: str = DEFAULT_SYNTHESIZE
    system: str | None = None
    target: str | None = None
    family: str = ""
    answer: list[str] = []
    wrong: list[str] = []
    program: str | None = None

    def is_right(self, reply: str, run_code: bool = False) -> bool | None:
        """Return whether an answer is right, or None if the example does not tell.

        Args:
            reply: The answer. It contains a text if it has the same words and numbers (scoring.py).
            run_code: Whether the answer's code may be run, if there is a program for it.
        """
        if self.program is not None:
            return runs(self.program.replace(CODE, _code_in(reply))) if run_code else None
        if not self.answer:
            return None
        return all(contains(reply, text) for text in self.answer) and not any(contains(reply, t) for t in self.wrong)


def _code_in(answer: str) -> str:
    """Return the first block of code, or all of the answer if it has none."""
    block = re.search(r"```(?:\w*\n)?(.*?)(?:```|\Z)", answer, re.DOTALL)
    return block[1] if block else answer


def read_examples(paths: Iterable[Path]) -> list[Example]:
    """Return the examples of files, in their order.

    Raises:
        InputError: A file cannot be read, a line is not an example (the message names both), or there is no example.
    """
    paths = list(paths)
    examples = []
    for path in paths:
        try:
            # str.splitlines would split in the middle of a text: at U+2028, for instance
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            # a byte order mark begins a file, and then each of several that were written into one
            line = line.strip("\ufeff \t\r\n")
            if line:
                examples.append(_parse(line, f"{path}, line {number}"))
    if not examples:
        raise InputError(f"there are no examples in {', '.join(map(str, paths))}")
    return examples


def write_examples(path: Path, examples: Iterable[Example]) -> int:
    """Write examples as JSON lines, and return how many they are.

    Raises:
        InputError: There is no example, one cannot be read again (it was changed after it was made), or no file can be
            there; nothing is written.
        MachineError: The disk is full or fails.
    """
    make_folder(path.parent)
    check_writable(path, "file of examples")
    n = 0
    with whole(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for n, example in enumerate(examples, 1):
            file.write(_line_of(example, n) + "\n")
        if n == 0:
            raise InputError(f"nothing in the data makes an example: {path} is not written")
    return n


def _parse(line: str, place: str) -> Example:
    try:
        return Example.model_validate_json(line)
    except ValidationError as error:
        loc, message = first_of(error)
        keys = ".".join(map(str, loc))
        raise InputError(f"{place}: {keys + ': ' if keys else ''}{message}") from None


def _line_of(example: Example, number: int) -> str:
    try:
        line = example.model_dump_json(exclude_defaults=True)
    except PydanticSerializationError as error:
        raise InputError(f"example {number}: cannot be written as JSON: {error}") from None
    _parse(line, f"example {number}")
    return line
