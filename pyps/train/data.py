"""The examples of a training run in tokens, kept in a file: generating what is missing in them takes long."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from pyps.data.example import Example
from pyps.data.tokens import TokenExample, add_answers, lay_out
from pyps.engine.model import Model

_TOGETHER = 8  # examples for which branches and answers are generated in one batch


def prepare(
    model: Model, layout: str, examples: Sequence[Example], path: Path, report: Callable[[str], None]
) -> list[TokenExample]:
    """The examples in tokens, as the runtime lays them out, with its own tokenizer; generates what is missing in them.

    Args:
        path: where the result is kept, as JSON lines; what is there already is not computed again.
        report: called with a line about the progress every few seconds.
    """
    # without what is as always: fields that later versions add shall not make a file of today another
    described = [model.name, layout, *(e.model_dump_json(exclude_defaults=True) for e in examples)]
    head = {"examples": hashlib.sha256("\n".join(described).encode()).hexdigest()}
    done = _read_tokens(path, head)
    partial = path.with_name(path.name + ".part")
    partial.write_text("".join(json.dumps(values) + "\n" for values in [head, *map(asdict, done)]))
    partial.replace(path)  # without a line that was cut off, and never less than before
    said = time.monotonic()
    with path.open("a") as file:
        while len(done) < len(examples):
            chunk = examples[len(done) : len(done) + _TOGETHER]
            new = add_answers(model, lay_out(model, layout, chunk, seed=len(done)))
            file.writelines(json.dumps(asdict(t)) + "\n" for t in new)
            file.flush()
            done += new
            if len(done) == len(examples) or time.monotonic() > said + 5:
                said = time.monotonic()
                report(f"examples laid out, and completed where they miss something: {len(done):,}/{len(examples):,}")
    return done


def _read_tokens(path: Path, head: dict[str, str]) -> list[TokenExample]:
    """As many as an interrupted run has left, if they are these examples."""
    found: list[TokenExample] = []
    if not path.exists():
        return found
    try:
        lines = path.read_text().splitlines()
        if not lines or json.loads(lines[0]) != head:
            return found
        for line in lines[1:]:
            values = json.loads(line)
            found.append(TokenExample(**values | {"branches": [(p, o) for p, o in values["branches"]]}))
    except (ValueError, TypeError, KeyError):
        pass  # a line that was being written, or another version's
    return found
