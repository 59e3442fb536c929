"""The format of workflow files, and reading them (docs/workflows.md).

    steps:
      - name: options
        task: "Which database should {{ app }} use?"
        branches: ["Argue for SQLite.", "Argue for PostgreSQL."]
      - name: verdict
        task: "Decide."
        join: [options]

The answer of a step is {{ options }} for the steps after it, and with `join` its cache is joined as a branch is.

The format is YAML 1.2 with its core schema: NO, yes and 12:30 are texts. A number keeps the text that stands for it in
the file, and a number where a text belongs is that text.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)

from pyps.agents.tools import JoinedPart, Limits
from pyps.engine import native
from pyps.engine.sampling import Sampling
from pyps.errors import InputError, first_of
from pyps.prompts.layout import DEFAULT_SYNTHESIZE

_MAX_BYTES, _MAX_DEPTH = 1 << 20, 50  # of a workflow file
_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"  # of steps and variables: templates use them

# PyYAML knows YAML 1.1 only, where NO is false, 12:30 is 750 and 0555567 is octal. These are the scalars of YAML 1.2's
# core schema (section 10.3.2), but for leading zeros, which make a text (codes have them), and for hundreds of digits,
# which Python reads as a float only. The last item is the characters that such a scalar begins with: PyYAML looks the
# patterns up by them.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]{0,299})|0o[0-7]{1,99}|0x[0-9a-fA-F]{1,99}", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
_TAG = "tag:yaml.org,2002:"


class _Written:
    """What a file, or --set, says in digits: a template shows it as it is written there."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __getnewargs__(self) -> Any:  # for copies
        return (self.text,)


class WholeNumber(_Written, int):
    """A whole number that keeps its text: +49 is not 49."""

    def __new__(cls, text: str) -> "WholeNumber":
        """Read a number. Raises ValueError if it is none."""
        number = super().__new__(cls, text, 0 if text[:2] in ("0o", "0x") else 10)
        number.text = text
        return number


class Number(_Written, float):
    """A number that keeps its text: 1.10 is not 1.1."""

    def __new__(cls, text: str) -> "Number":
        """Read a number. Raises ValueError if it is none."""
        number = super().__new__(cls, text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        number.text = text
        return number


def _as_text(value: Any) -> Any:
    return value.text if isinstance(value, _Written) else value


def _as_json(value: Any) -> Any:
    """Return what a file holds with ordinary numbers."""
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_json(inner) for inner in value]
    if isinstance(value, WholeNumber):
        return int(value)
    return float(value) if isinstance(value, Number) else value


def _as_written(value: Any, check: Callable[[Any], Any]) -> Any:
    if isinstance(value, _Written):  # pydantic would make an ordinary number of it
        return value
    try:
        return check(value)
    except ValidationError:
        raise ValueError("a variable is a text, a number, true or false, a list of texts, or null") from None


Text = Annotated[str, BeforeValidator(_as_text)]
Value = bool | str | int | float | list[Text] | None
_Variable = Annotated[Value, WrapValidator(_as_written)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which pydantic takes for 0 or 1
            raise ValueError("nothing here is true or false: put a text into quotes")
        return value


class SamplingOptions(_Strict):
    """Sampling parameters that a workflow file overrides; those that are None stay as they are."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    max_tokens: int | None = None
    stop: list[Text] | None = None

    def over(self, sampling: Sampling) -> Sampling:
        """Return `sampling` with these parameters in place of its own.

        Raises:
            InputError: A value is out of range.
        """
        changes: dict[str, Any] = self.model_dump(exclude_none=True)
        if "stop" in changes:
            changes["stop"] = tuple(changes["stop"])
        return replace(sampling, **changes)


class Files(_Strict):
    """The files of a folder that match a pattern, sorted: `{{ item.path }}`, `{{ item.name }}`, `{{ item.text }}`.

    Attributes:
        glob: A pattern with *, ? and **; a template.
        root: The folder, relative to the workflow file's; a template. Nothing outside it is read, not even through
            symbolic links.
        max_chars: Characters that a text is cut to; None for no limit.
    """

    glob: Text
    root: Text = "."
    max_chars: int | None = Field(None, ge=1)


class LimitOptions(_Strict):
    """Limits of tool calls that a workflow file overrides; those that are None stay as in pyps.agents.tools.Limits."""

    min_calls: int | None = None
    max_calls: int | None = None
    seconds: float | None = None
    result_tokens: int | None = None

    def limits(self) -> Limits:
        """Return the limits for a branch. Raises InputError if a value is out of range."""
        return Limits(**self.model_dump(exclude_none=True))


class ToolSpec(_Strict):
    """Tools of one kind: exactly one of the attributes but env is set. Paths and commands are templates.

    Attributes:
        builtin: "calculator", the only one.
        files: A folder whose files may be listed, read and searched.
        sql: An SQLite file that may be read.
        mcp: The command of a server, which runs while the workflow does.
        env: Variables of the server's environment, by name; ${NAME} in a value is the user's own variable NAME.
    """

    builtin: Literal["calculator"] | None = None
    files: Text | None = None
    sql: Text | None = None
    mcp: list[Text] | None = Field(None, min_length=1)
    env: dict[Annotated[str, Field(pattern=_NAME)], Text] = {}

    @model_validator(mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return {"builtin": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> "ToolSpec":
        if len(self.model_dump(exclude_none=True, exclude={"env"})) != 1:
            raise ValueError("give one of calculator, files, sql and mcp")
        if self.env and self.mcp is None:
            raise ValueError("env is for mcp")
        return self


class BranchSpec(_Strict):
    """A branch; or, with `each` or `files`, one branch for each `{{ item }}` of them.

    Attributes:
        prompt: The instruction; a template.
        name: A name for the output; a template.
        each: A variable that is a list, or the list itself, of templates.
        files: The files that the branches are about.
        sampling: Parameters that differ from the step's.
        tools: Tools that the branch may call.
        limits: How often, and for how long, it may call them.
        joined: What a branch with tools gives to the synthesizer, as in pyps.Branch.
    """

    prompt: Text = ""
    name: Text | None = None
    each: Text | list[Text] | None = None
    files: Files | None = None
    sampling: SamplingOptions = SamplingOptions()
    tools: list[ToolSpec] = []
    limits: LimitOptions = LimitOptions()
    joined: JoinedPart = "final"

    @model_validator(mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return {"prompt": value} if isinstance(value, str | _Written) else value

    @model_validator(mode="after")
    def _one_of(self) -> "BranchSpec":
        if self.each is not None and self.files is not None:
            raise ValueError("give each or files, not both")
        return self


class Step(_Strict):
    """One fork-join of a workflow.

    Attributes:
        name: The name that the steps after it use for its answer.
        task: As in ForkJoin.stream; a template, as `system` and `synthesize` are.
        system: The system message; None for the workflow's.
        branches: What runs in parallel.
        join: Earlier steps whose answers are joined, before the branches.
        synthesize: The synthesizer's instruction.
        read: The share of the branches' tokens that the synthesizer reads again, 0 to 1, or "auto"; None for what the
            run says.
        sampling: Parameters for the branches.
        answer: Parameters for the answer that differ from those.
        tools: Tools that the synthesizer may call before it answers.
        limits: How often, and for how long, it may call them.
        json_schema: What the answer must look like, as JSON; the key in the file is `schema`.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=False)
    name: Text = Field(pattern=_NAME)
    task: Text
    system: Text | None = None
    branches: list[BranchSpec] = []
    join: list[Text] = []
    synthesize: Text = DEFAULT_SYNTHESIZE
    read: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] | None = None
    sampling: SamplingOptions = SamplingOptions()
    answer: SamplingOptions = SamplingOptions()
    tools: list[ToolSpec] = []
    limits: LimitOptions = LimitOptions()
    json_schema: Annotated[dict[str, Any], BeforeValidator(_as_json)] | None = Field(None, alias="schema")


class Workflow(_Strict):
    """A workflow file.

    Attributes:
        description: One line for the list of workflows.
        model: The model to run on; None for the default one.
        variables: Default values by name. Whoever runs the workflow may set them, and must set those that are None.
        system: The system message of steps that have none of their own.
        steps: The fork-joins, in their order.
    """

    description: Text = ""
    model: Text | None = None
    variables: dict[str, _Variable] = {}
    system: Text | None = None
    steps: list[Step] = Field(min_length=1, max_length=100)

    @model_validator(mode="after")
    def _names(self) -> "Workflow":
        names = set(self.variables)
        for step in self.steps:
            if step.name in names:
                raise ValueError(f"the name {step.name!r} is there twice")
            names.add(step.name)
        return self


def shipped_workflows() -> dict[str, Path]:
    """Return the workflow files that come with pyps, by name."""
    folder = native.shipped("workflows")
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_workflow(path: Path) -> Workflow:
    """Read and check a workflow file.

    Raises:
        InputError: The file cannot be read, or something in it is wrong; the message names the line.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise InputError(f"{path}: larger than {_MAX_BYTES:,} bytes: no workflow is")
    try:
        _check_extent(path, data)
        node = yaml.compose(data, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{place}: not YAML: {getattr(error, 'problem', None) or error}") from None
    content = _content(path, node)
    try:
        workflow = Workflow.model_validate(content)
    except ValidationError as error:
        loc, message = first_of(error)
        keys = ".".join(map(str, loc))
        raise InputError(f"{path}, line {_line(node, loc)}: {keys + ': ' if keys else ''}{message}") from None
    earlier: set[str] = set()
    for i, step in enumerate(workflow.steps):
        for name in step.join:
            if name not in earlier:
                line = _line(node, ("steps", i, "join"))
                raise InputError(
                    f"{path}, line {line}: step {step.name!r} joins {name!r}, which is not an earlier step"
                )
        if not step.branches and not step.join:
            raise InputError(f"{path}, line {_line(node, ('steps', i))}: step {step.name!r} has no branches")
        earlier.add(step.name)
    return workflow


def _check_extent(path: Path, data: bytes) -> None:
    """Raise InputError for what could take all memory or time when it is parsed."""
    depth = 0
    for event in yaml.parse(data):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):  # a few of them can stand for very much
            raise InputError(f"{path}, line {line}: aliases (*{event.anchor}) are not possible")
        if depth > _MAX_DEPTH:
            raise InputError(f"{path}, line {line}: nested too deeply: up to {_MAX_DEPTH} levels are possible")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's way: a class adds its own


for _kind, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"^(?:{_pattern})$"), _first)
_PATTERNS = {_TAG + kind: re.compile(pattern) for kind, pattern, _ in _SCALARS}


def _content(path: Path, node: yaml.Node | None) -> Any:
    """Return what a node stands for. The keys of a mapping are texts, whatever they look like.

    Args:
        path: The file, for messages.
        node: A node without aliases, and no deeper than _MAX_DEPTH; None for an empty file.

    Raises:
        InputError: A key is not a text, or is there twice, or a tag is unknown.
    """
    if node is None:
        return None
    here = f"{path}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode):
        return _scalar(here, node)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_content(path, inner) for inner in node.value]
    if not isinstance(node, yaml.MappingNode) or node.tag != _TAG + "map":
        raise InputError(f"{here}: the tag {node.tag} is not possible")
    content: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{path}, line {line}: a key must be a text")
        if key.value in lines:
            raise InputError(f"{path}, line {line}: {key.value} is there twice: line {lines[key.value]} has it already")
        lines[key.value] = line
        content[key.value] = _content(path, value)
    return content


def _scalar(here: str, node: yaml.ScalarNode) -> Any:
    text, tag = node.value, node.tag
    if tag == _TAG + "str":
        return text
    # only a tag that the file itself gives can be unknown, or not fit the text
    if tag not in _PATTERNS or not _PATTERNS[tag].fullmatch(text):
        raise InputError(f"{here}: the tag {tag} is not possible for {text[:60]!r}")
    match tag.removeprefix(_TAG):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return WholeNumber(text)
    return Number(text)


def _line(node: yaml.Node | None, loc: tuple[int | str, ...]) -> int:
    """Return the line of what pydantic calls `loc`, or of the innermost part of it that the file has."""
    line = 0
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    line, node = key.start_mark.line, value
                    break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
    return line + 1


def set_variables(workflow: Workflow, settings: dict[str, str]) -> dict[str, Value]:
    """Return a workflow's variables, with settings in place of their defaults.

    Args:
        workflow: The workflow.
        settings: Texts by name. Each becomes what the variable's default is; a list is split at the commas.

    Raises:
        InputError: There is no such variable, a text is not of the variable's type, or a value is missing.
    """
    values = dict(workflow.variables)
    for name, text in settings.items():
        if name not in values:
            names = ", ".join(values) or "none"
            raise InputError(f"this workflow has no variable {name!r}; it has: {names}")
        values[name] = _setting(name, text, values[name])
    if missing := [name for name, value in values.items() if value is None]:
        raise InputError(f"this workflow needs a value for {missing[0]}: --set {missing[0]}=VALUE")
    return values


def _setting(name: str, text: str, default: Value) -> Value:
    """Return a text of --set as the type of the variable's default. Raises InputError if it is not of that type."""
    if default is None or isinstance(default, str):
        return text
    if isinstance(default, list):
        return [part.strip() for part in text.split(",") if part.strip()]
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise InputError(f"variable {name}: {text!r} is not true or false")
        return text.lower() == "true"
    try:
        return WholeNumber(text.strip()) if isinstance(default, int) else Number(text.strip())
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise InputError(f"variable {name}: {text!r} is not {kind}") from None
