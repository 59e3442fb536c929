"""The examples of a training run in tokens, kept in a file, since generating what they lack takes long."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from pyps.data.example import Example
from pyps.data.tokens import TokenExample, add_answers, lay_out
from pyps.engine.model import Model
from pyps.errors import MachineError
from pyps.files import whole

_TOGETHER = 8  # examples for which branches and answers are generated in one batch


def prepare(
    model: Model, layout: str, examples: Sequence[Example], path: Path, report: Callable[[str], None]
) -> list[TokenExample]:
    """Return examples in tokens, as a run lays them out, with the runtime's tokenizer; generate what they lack.

    Args:
        model: The model whose prompts, branches and answers they are.
        layout: The name of the prompts' layout.
        examples: The examples.
        path: The file where the result is kept, as JSON lines; what it has already is not computed again.
        report: It is called with a line about the progress every few seconds.

    Raises:
        InputError: An example does not fit the model.
        MachineError: The disk is full or fails.
    """
    # without defaults: a field that a later version adds must not change the hash of a file that does not use it
    lines = [model.name, layout, *(e.model_dump_json(exclude_defaults=True) for e in examples)]
    head = {"examples": hashlib.sha256("\n".join(lines).encode()).hexdigest()}
    done = _read_tokens(path, head)
    with whole(path) as partial:  # without a line that was cut off
        partial.write_text("".join(json.dumps(values) + "\n" for values in [head, *map(asdict, done)]))
    reported = time.monotonic()
    while len(done) < len(examples):
        chunk = examples[len(done) : len(done) + _TOGETHER]
        new = add_answers(model, lay_out(model, layout, chunk, seed=len(done)))
        try:
            with path.open("a") as file:
                file.writelines(json.dumps(asdict(t)) + "\n" for t in new)
        except OSError as error:
            raise MachineError(f"{path}: cannot be written: {error.strerror}") from error
        done += new
        if len(done) == len(examples) or time.monotonic() > reported + 5:
            reported = time.monotonic()
            report(f"examples laid out, and completed where they lack something: {len(done):,}/{len(examples):,}")
    return done


def _read_tokens(path: Path, head: dict[str, str]) -> list[TokenExample]:
    """Return what an interrupted run has left of these examples."""
    token_examples: list[TokenExample] = []
    if not path.exists():
        return token_examples
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        if not lines or json.loads(lines[0]) != head:
            return token_examples
        for line in filter(None, lines[1:]):
            values = json.loads(line)
            token_examples.append(TokenExample(**values | {"branches": [(p, o) for p, o in values["branches"]]}))
    except (ValueError, TypeError, KeyError):
        pass  # a line that was being written, or one of another version
    return token_examples
