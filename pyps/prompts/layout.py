"""Prompt layouts: what the branches, the synthesizer and text synthesis are given, token by token.

This is the one place that decides it, for the runtime, text synthesis and training alike. An adapter is trained for one
layout and records which. Whatever people, files or tools say is data: control tokens written out in it stay text.

    shared   [messages] is a prefix, computed once, that branches fork from and the synthesizer keeps:
             branch        prefix | instruction, assistant header | output
             synthesizer   prefix | outputs side by side          | synthesize, assistant header | answer
    paper    (arXiv 2606.14672) the synthesizer has no prefix; outputs move to position 0 and its prompt repeats the
             messages:
             synthesizer          outputs side by side | messages, synthesize, assistant header | answer

The messages are a conversation, mostly a system message and the task. If the user speaks last, what a branch is told
continues that turn; after an assistant's or a tool's message it is a turn of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyps.adapters.format import LAYOUTS
from pyps.engine.model import Model
from pyps.errors import InputError

DEFAULT_SYNTHESIZE = "Using the notes above, give one final answer."

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, str]  # {"role": one of ROLES, "content": text}

# private-use characters that no template treats specially. One stands for what follows the messages
_REST = "\ue000"
_ANSWER, _NEXT = "\ue003", "\ue004"  # for an answer, and what the user says to it


# in text synthesis: between the notes and the instruction after them, and between a note's name and its text
_BETWEEN, _AFTER_LABEL = "\n\n", "\n"


@dataclass(frozen=True)
class Instruction:
    """What one branch is told.

    Attributes:
        text: Its instruction; empty for a plain sample of the task.
        task: A task of its own instead of the job's, as Layout takes it; None for the job's.
        system: A system message of its own; None for the job's.
    """

    text: str
    task: str | Sequence[Message] | None = None
    system: str | None = None


@dataclass(frozen=True)
class Prompts:
    """Token lists of one fork-join.

    Attributes:
        prefix: What every branch begins with.
        branches: What each branch adds to the prefix before it generates.
        fork_points: How many tokens of the prefix each branch begins with: all of them, except for branches with a
            task or system message of their own.
        branch_point: P, the position that outputs are re-encoded to.
        synthesizer: What the synthesizer reads after the joined cells.
    """

    prefix: list[int]
    branches: list[list[int]]
    fork_points: list[int]
    branch_point: int
    synthesizer: list[int]


class Layout:
    """The prompts of one job.

    Args:
        model: Its chat template and its vocabulary decide.
        name: "shared" or "paper".
        task: What the job is about: a text that is not blank, or a conversation, as a list of messages with role
            ("system", "user", "assistant", "tool") and content.
        system: The system message; None for the conversation's, or the model's own default.
        synthesize: The synthesizer's instruction.

    Raises:
        InputError: The layout is unknown, the task is empty or no conversation, or the chat template cannot be used.
    """

    def __init__(
        self, model: Model, name: str, task: str | Sequence[Message], system: str | None, synthesize: str
    ) -> None:
        if name not in LAYOUTS:
            raise InputError(f"layout {name!r} does not exist: choose {' or '.join(LAYOUTS)}")
        self._model = model
        self._name = name
        self._task, self._system = task, system
        self._synthesize = synthesize
        self._frame = _Frame(model, conversation(task, system))

    def prompts(self, branches: Sequence[str | Instruction]) -> Prompts:
        """Return the prompts of the cache side.

        Args:
            branches: The instruction of each branch; a text is an Instruction with nothing else.

        Raises:
            InputError: A branch's own task or system message cannot be used.
        """
        prefix = self._frame.prefix
        tokens, fork_points = [], []
        for branch in branches:
            instruction = Instruction(branch) if isinstance(branch, str) else branch
            fork_point, own = len(prefix), self._frame.after_prefix(instruction.text)
            if instruction.task is not None or instruction.system is not None:
                whole = self._own_prompt(instruction)
                fork_point = min(_n_common(prefix, whole), len(whole) - 1)
                own = whole[fork_point:]
            fork_points.append(fork_point)
            tokens.append(own)
        synthesizer = self._frame.after_prefix(self._synthesize)
        shared = self._name == "shared"
        return Prompts(
            prefix=prefix,
            branches=tokens,
            fork_points=fork_points,
            branch_point=len(prefix) if shared else 0,
            synthesizer=synthesizer if shared else prefix + synthesizer,
        )

    def _own_prompt(self, instruction: Instruction) -> list[int]:
        """Return all tokens of a branch whose task or system message is its own."""
        task = self._task if instruction.task is None else instruction.task
        system = self._system if instruction.system is None else instruction.system
        frame = _Frame(self._model, conversation(task, system))
        return frame.prefix + frame.after_prefix(instruction.text)

    def labelled(self, names: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Return the label before each output, and the synthesizer's prompt after the last, for one that reads labels.

        In the shared layout they are what text synthesis has in the same places.
        """
        first = self._frame.before_text if self._name == "shared" else ""
        texts = [self._model.as_data(f"[{name}]") for name in names]
        labels = [
            self._model.tokenize(f"{_BETWEEN if i else first}{text}{_AFTER_LABEL}") for i, text in enumerate(texts)
        ]
        if self._name == "shared":
            return labels, self._frame.after_notes(self._synthesize)
        return labels, self._frame.prefix + self._frame.after_prefix(self._synthesize)

    def pasted(self, names: Sequence[str], texts: Sequence[str]) -> list[int]:
        """Return what follows the prefix in text synthesis, where the branches' texts are pasted into the user's turn.

        It is the same in both layouts: whoever pastes texts can keep the prefix.
        """
        notes = [f"[{name}]{_AFTER_LABEL}{text.strip()}" for name, text in zip(names, texts, strict=True)]
        return self._frame.after_prefix(_BETWEEN.join([*notes, self._synthesize]))


def conversation(task: str | Sequence[Message], system: str | None) -> list[dict[str, str]]:
    """Return the messages of a task, checked.

    Args:
        task: A text, which the user says; or messages.
        system: A system message that takes the place of the messages' own; None leaves them as they are.

    Raises:
        InputError: The task is blank, a role is unknown, a content is no text, a system message is not the first, or
            no message of the user says anything.
    """
    if isinstance(task, str):
        messages = [{"role": "user", "content": task}]
    else:
        if not isinstance(task, Sequence):
            raise InputError(f"the task must be a text or a list of messages, not {type(task).__name__}")
        messages = [_checked(message, i) for i, message in enumerate(task)]
    if system is not None:
        messages = [m for m in messages if m["role"] != "system"]
        if system:
            messages.insert(0, {"role": "system", "content": system})
    if not any(m["role"] == "user" and m["content"].strip() for m in messages):
        raise InputError("the task is empty: say what the branches should work on")
    return messages


def _checked(message: object, i: int) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise InputError(f"message {i + 1} must be an object with role and content, not {type(message).__name__}")
    if unknown := sorted(map(str, set(message) - {"role", "content"})):
        raise InputError(f"message {i + 1} has {unknown[0]!r}; a message has role and content, and nothing else")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(f"message {i + 1} has the role {role!r}; the roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise InputError(f"the content of message {i + 1} must be a text, not {type(content).__name__}")
    if role == "system" and i:
        raise InputError(f"message {i + 1} is a system message; only the first message can be one")
    return {"role": role, "content": content}


class _Frame:
    """A conversation, cut open where what comes after it is put in.

    Attributes:
        prefix: Tokens up to there.
        before_text: What comes between the prefix and what the user goes on to say.
    """

    def __init__(self, model: Model, messages: Sequence[Message]) -> None:
        self._model = model
        marked = [{**m, "content": model.as_data(m["content"])} for m in messages]
        if messages[-1]["role"] == "user":
            marked[-1]["content"] = model.as_data(messages[-1]["content"].strip()) + _REST
            head, self._tail = self._cut(model.render_chat(marked))
            self.before_text, self._without_text = _BETWEEN, self._tail
        else:
            whole, self._tail = self._cut(model.render_chat([*marked, {"role": "user", "content": _REST}]))
            closed = model.render_chat(marked)
            head = whole[: _n_common(whole, closed)]
            self.before_text, self._without_text = whole[len(head) :], closed[len(head) :]
        self.prefix = model.tokenize(head, start=True)

    def _cut(self, prompt: str) -> tuple[str, str]:
        head, mark, tail = prompt.partition(_REST)
        if not mark or _REST in tail:
            raise InputError(
                f"{self._model.name}: the model's chat template does not reproduce the user's text exactly once"
            )
        return head, tail

    def after_prefix(self, text: str) -> list[int]:
        """Return the tokens of what the user goes on to say, and of the header of the assistant's turn."""
        text = self._model.as_data(text.strip())
        return self._model.tokenize(f"{self.before_text}{text}{self._tail}" if text else self._without_text)

    def after_notes(self, text: str) -> list[int]:
        """Return the tokens of what the user says after the notes, and of the header of the assistant's turn."""
        text = self._model.as_data(text.strip())
        return self._model.tokenize(f"{_BETWEEN}{text}{self._tail}" if text else self._tail)


def _n_common(a: Sequence[object], b: Sequence[object]) -> int:
    """Return how many items both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def follow_up(model: Model, text: str) -> list[int]:
    """Return what comes after an answer, in either layout, when the user says this to it.

    It ends where the next answer begins. Raises InputError if the model's chat template knows only one turn.
    """
    turns = [("user", "?"), ("assistant", _ANSWER), ("user", _NEXT)]
    prompt = model.render_chat([{"role": role, "content": content} for role, content in turns])
    between, mark, end = prompt.partition(_ANSWER)[2].partition(_NEXT)
    if not mark:
        raise InputError(f"{model.name}: the model's chat template does not reproduce a second turn as it is")
    return model.tokenize(between + model.as_data(text) + end)
