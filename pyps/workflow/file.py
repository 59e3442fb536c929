"""The format of workflow files, and reading them (docs/workflows.md).

    steps:
      - name: options
        task: "Which database should {{ app }} use?"
        branches: ["Argue for SQLite.", "Argue for PostgreSQL."]
      - name: verdict
        task: "Decide."
        join: [options]

The answer of a step is {{ options }} for the steps after it, and with `join` its cache is joined as a branch is.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pyps.agents.tools import JoinedPart, Limits
from pyps.engine import native
from pyps.engine.sampling import Sampling
from pyps.errors import InputError, first_of
from pyps.prompts.layout import DEFAULT_SYNTHESIZE

_MAX_BYTES, _MAX_DEPTH = 1 << 20, 50  # of a workflow file
_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"  # of steps and variables: templates use them

Value = str | int | float | list[str] | None
_KINDS: dict[type, str] = {int: "a whole number", float: "a number"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SamplingOptions(_Strict):
    """Sampling parameters that a workflow file overrides; those that are None stay as they are."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None

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

    glob: str
    root: str = "."
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
    """Tools of one kind: exactly one of the attributes is set. Paths and commands are templates.

    Attributes:
        builtin: "calculator", the only one.
        files: A folder whose files may be listed, read and searched.
        sql: An SQLite file that may be read.
        mcp: The command of a server, which runs while the workflow does.
    """

    builtin: Literal["calculator"] | None = None
    files: str | None = None
    sql: str | None = None
    mcp: list[str] | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return {"builtin": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> "ToolSpec":
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("give one of calculator, files, sql and mcp")
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

    prompt: str = ""
    name: str | None = None
    each: str | list[str] | None = None
    files: Files | None = None
    sampling: SamplingOptions = SamplingOptions()
    tools: list[ToolSpec] = []
    limits: LimitOptions = LimitOptions()
    joined: JoinedPart = "final"

    @model_validator(mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return {"prompt": value} if isinstance(value, str) else value

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
    name: str = Field(pattern=_NAME)
    task: str
    system: str | None = None
    branches: list[BranchSpec] = []
    join: list[str] = []
    synthesize: str = DEFAULT_SYNTHESIZE
    read: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] | None = None
    sampling: SamplingOptions = SamplingOptions()
    answer: SamplingOptions = SamplingOptions()
    tools: list[ToolSpec] = []
    limits: LimitOptions = LimitOptions()
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class Workflow(_Strict):
    """A workflow file.

    Attributes:
        description: One line for the list of workflows.
        model: The model to run on; None for the default one.
        variables: Default values by name. Whoever runs the workflow may set them, and must set those that are None.
        system: The system message of steps that have none of their own.
        steps: The fork-joins, in their order.
    """

    description: str = ""
    model: str | None = None
    variables: dict[str, Value] = {}
    system: str | None = None
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
        node, content = yaml.compose(data, yaml.SafeLoader), yaml.safe_load(data)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{place}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except InputError:
        raise
    except ValueError as error:  # an impossible date, for one
        raise InputError(f"{path}: {error}") from None
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
        default = values[name]
        try:
            if isinstance(default, list):
                values[name] = [part.strip() for part in text.split(",") if part.strip()]
            else:
                values[name] = text if default is None else type(default)(text)
        except ValueError:
            raise InputError(f"variable {name}: {text!r} is not {_KINDS[type(default)]}") from None
    if missing := [name for name, value in values.items() if value is None]:
        raise InputError(f"this workflow needs a value for {missing[0]}: --set {missing[0]}=VALUE")
    return values
