"""Prompt layouts: what the branches, the synthesizer and the text baseline are given, token by token.

The one place that decides it, for the runtime, the text baseline and training alike. An adapter is trained for one
layout and records which. Whatever people, files or tools say is data: control tokens written out in it stay text.

    shared   [system, task] is a prefix, computed once, that branches fork from and the synthesizer keeps:
             branch        prefix | instruction, assistant header | output
             synthesizer   prefix | outputs side by side          | synthesize, assistant header | answer
    paper    (arXiv 2606.14672) the synthesizer has no prefix; outputs move to position 0 and its prompt repeats the
             task:
             synthesizer          outputs side by side | system, task, synthesize, assistant header | answer
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pyps.adapters.format import LAYOUTS
from pyps.engine.model import Model
from pyps.errors import InputError

DEFAULT_SYNTHESIZE = "Using the notes above, give one final answer."

# private-use characters that no template treats specially. One stands for what follows the task in the user's turn
_REST = "\ue000"
_ANSWER, _NEXT = "\ue003", "\ue004"  # for an answer, and what the user says to it


@dataclass(frozen=True)
class Prompts:
    """Token lists of one fork-join.

    Attributes:
        prefix: what every branch starts with.
        branches: what each branch adds before it generates.
        branch_point: P, the position that spans are re-encoded to.
        synthesizer: what the synthesizer prefills after the joined cells.
    """

    prefix: list[int]
    branches: list[list[int]]
    branch_point: int
    synthesizer: list[int]


class Layout:
    """The prompts of one job: a task, the branches' instructions and the synthesizer's instruction.

    Args:
        name: "shared" or "paper".
        task: what the job is about; must not be empty.
        system: the system message, or None for the model's own default.
        synthesize: the synthesizer's instruction.

    Raises:
        InputError: an unknown layout, an empty task, or a chat template that cannot be used.
    """

    def __init__(self, model: Model, name: str, task: str, system: str | None, synthesize: str) -> None:
        if name not in LAYOUTS:
            raise InputError(f"layout {name!r} does not exist: choose {' or '.join(LAYOUTS)}")
        if not task.strip():
            raise InputError("the task is empty: say what the branches should work on")
        self._model = model
        self._name = name
        self._synthesize = synthesize
        messages = [{"role": "system", "content": model.as_data(system)}] if system else []
        prompt = model.render_chat([*messages, {"role": "user", "content": model.as_data(task.strip()) + _REST}])
        head, mark, self._tail = prompt.partition(_REST)
        if not mark or _REST in self._tail:
            raise InputError(f"{model.name}: the model's chat template does not give the user's text once, as it is")
        self._prefix = model.tokenize(head, start=True)

    def _after_prefix(self, text: str) -> list[int]:
        """The rest of the user's turn, and the header of the assistant's."""
        text = self._model.as_data(text.strip())
        return self._model.tokenize(f"\n\n{text}{self._tail}" if text else self._tail)

    def prompts(self, instructions: Sequence[str]) -> Prompts:
        """The cache side; an instruction may be empty (a plain sample of the task)."""
        synthesizer = self._after_prefix(self._synthesize)
        return Prompts(
            prefix=self._prefix,
            branches=[self._after_prefix(instruction) for instruction in instructions],
            branch_point=len(self._prefix) if self._name == "shared" else 0,
            synthesizer=synthesizer if self._name == "shared" else self._prefix + synthesizer,
        )

    def pasted(self, names: Sequence[str], texts: Sequence[str]) -> list[int]:
        """The text baseline: what follows the prefix when the branches' texts are pasted into the user's turn. The
        same in both layouts: whoever pastes texts can keep the prefix."""
        notes = "\n\n".join(f"[{name}]\n{text.strip()}" for name, text in zip(names, texts, strict=True))
        return self._after_prefix(f"{notes}\n\n{self._synthesize}")


def place(branch_point: int, lengths: Sequence[int], in_order: bool) -> list[int]:
    """The positions at which spans of these lengths begin after the join: all at the branch point (METHOD, section 1);
    or one after the other in the branches' order, as their texts would stand, for adapters trained so."""
    return [branch_point + (sum(lengths[:i]) if in_order else 0) for i in range(len(lengths))]


def follow_up(model: Model, text: str) -> list[int]:
    """What comes after an answer, in either layout, when the user says this to it, up to where the next answer begins.
    Raises InputError if the model's chat template knows only one turn."""
    turns = [("user", "?"), ("assistant", _ANSWER), ("user", _NEXT)]
    prompt = model.render_chat([{"role": role, "content": content} for role, content in turns])
    between, mark, end = prompt.partition(_ANSWER)[2].partition(_NEXT)
    if not mark:
        raise InputError(f"{model.name}: the model's chat template does not give a second turn as it is")
    return model.tokenize(between + model.as_data(text) + end)
