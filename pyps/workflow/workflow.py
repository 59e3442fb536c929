"""Workflow files: fork-joins described in YAML, one after the other (docs/workflows.md).

    steps:
      - name: options
        task: "Which database should {{ app }} use?"
        branches: ["Argue for SQLite.", "Argue for PostgreSQL."]
      - name: verdict
        task: "Decide."
        join: [options]

A step's answer is {{ options }} for the steps after it, and with `join` its cache is joined as a branch is.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pyps.agents.tools import JoinedPart, Limits, Tool, calculator, file_tools, sql_tools
from pyps.engine import native
from pyps.engine.context import MAX_SEQUENCES
from pyps.engine.sampling import Sampling
from pyps.errors import InputError
from pyps.forkjoin import Branch, ForkJoin
from pyps.forkjoin.branches import Branches
from pyps.forkjoin.events import Done, Event, Result
from pyps.prompts.layout import DEFAULT_SYNTHESIZE

_MAX_BYTES, _MAX_DEPTH = 1 << 20, 50  # of a workflow file
_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"  # of steps and variables: templates use them

Value = str | int | float | list[str] | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SamplingOptions(_Strict):
    """Those of sampling.Sampling that are not left as they are."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None

    def over(self, sampling: Sampling) -> Sampling:
        given: dict[str, Any] = {k: v for k, v in self.model_dump().items() if v is not None}
        if "stop" in given:
            given["stop"] = tuple(given["stop"])
        return replace(sampling, **given)


class Files(_Strict):
    """The files that a pattern finds under a folder, sorted: `{{ item.path }}`, `{{ item.text }}`.

    Attributes:
        glob: a pattern with *, ? and **; root: the folder, relative to the workflow's. Both are templates. Nothing
            outside the folder is read, through symbolic links neither.
        max_chars: texts are cut after so many characters.
    """

    glob: str
    root: str = "."
    max_chars: int | None = Field(None, ge=1)


class LimitOptions(_Strict):
    """Those of agent.Limits that are not left as they are."""

    min_calls: int | None = None
    max_calls: int | None = None
    seconds: float | None = None
    result_tokens: int | None = None

    def limits(self) -> Limits:
        return Limits(**self.model_dump(exclude_none=True))


class ToolSpec(_Strict):
    """Tools of one kind: "calculator"; files: a folder to list, read and search; sql: an SQLite file to read; mcp: the
    command of a server, which runs while the workflow does. Paths and commands are templates."""

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
    """A branch, or with `each` (a variable that is a list, or the list) or `files` one for each `{{ item }}`. What one
    with tools gives to the synthesizer is its answer, or what `joined` says, as in forkjoin.Branch."""

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
    """One fork-join.

    Attributes:
        name: of its answer, for the steps after it.
        task, system, synthesize: as in ForkJoin.stream; templates.
        branches: what runs in parallel.
        join: earlier steps whose answers are joined, before the branches.
        sampling: of the branches; answer: of the answer, over that.
        tools, limits: of the synthesizer, before it answers.
        json_schema (in the file: schema): what the answer must look like, as JSON.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=False)
    name: str = Field(pattern=_NAME)
    task: str
    system: str | None = None
    branches: list[BranchSpec] = []
    join: list[str] = []
    synthesize: str = DEFAULT_SYNTHESIZE
    sampling: SamplingOptions = SamplingOptions()
    answer: SamplingOptions = SamplingOptions()
    tools: list[ToolSpec] = []
    limits: LimitOptions = LimitOptions()
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class Workflow(_Strict):
    """A workflow file. `variables` may be set by whoever runs it; those that are null must be."""

    description: str = ""
    model: str | None = None
    variables: dict[str, Value] = {}
    system: str | None = None
    steps: list[Step] = Field(min_length=1, max_length=100)

    @model_validator(mode="after")
    def _names(self) -> "Workflow":
        known = set(self.variables)
        for step in self.steps:
            if step.name in known:
                raise ValueError(f"the name {step.name!r} is there twice")
            known.add(step.name)
        return self


def shipped_workflows() -> dict[str, Path]:
    """Those that come with pyps, by name."""
    folder = native.shipped("workflows")
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_workflow(path: Path) -> Workflow:
    """Raises InputError, with the line, for whatever is wrong with the file itself."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise InputError(f"{path}: larger than {_MAX_BYTES:,} bytes: no workflow is")
    try:
        mistake = _too_much(data)
        node, content = (None, None) if mistake else (yaml.compose(data, yaml.SafeLoader), yaml.safe_load(data))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except ValueError as error:  # an impossible date, for one
        raise InputError(f"{path}: {error}") from None
    if mistake:
        raise InputError(f"{path}, {mistake}")
    try:
        workflow = Workflow.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        loc = first["loc"]
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            what = f"there is no such key: {loc[-1]}"
        names = ".".join(map(str, loc))
        raise InputError(f"{path}, line {_line(node, loc)}: {names + ': ' if names else ''}{what}") from None
    before: set[str] = set()
    for i, step in enumerate(workflow.steps):
        for name in step.join:
            if name not in before:
                line = _line(node, ("steps", i, "join"))
                raise InputError(f"{path}, line {line}: step {step.name!r} joins {name!r}, which is no step before it")
        if not step.branches and not step.join:
            raise InputError(f"{path}, line {_line(node, ('steps', i))}: step {step.name!r} has no branches")
        before.add(step.name)
    return workflow


def _too_much(data: bytes) -> str:
    """What in a file could take all memory or time; "" if nothing does."""
    depth = 0
    for event in yaml.parse(data):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):  # a few of them can stand for very much
            return f"line {event.start_mark.line + 1}: aliases (*{event.anchor}) are not possible"
        if depth > _MAX_DEPTH:
            return f"line {event.start_mark.line + 1}: nested too deeply"
    return ""


def _line(node: yaml.Node | None, loc: tuple[int | str, ...]) -> int:
    """The line of what pydantic names so; of the innermost part that is there."""
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


def set_variables(workflow: Workflow, given: dict[str, str]) -> dict[str, Value]:
    """The variables with these values over the defaults; texts become what the default is, a list at its commas.
    Raises InputError."""
    values = dict(workflow.variables)
    for name, text in given.items():
        if name not in values:
            known = ", ".join(values) or "none"
            raise InputError(f"this workflow has no variable {name!r}; it has: {known}")
        default = values[name]
        try:
            if isinstance(default, list):
                values[name] = [part.strip() for part in text.split(",") if part.strip()]
            else:
                values[name] = text if default is None else type(default)(text)
        except ValueError:
            raise InputError(f"variable {name}: {text!r} is no {type(default).__name__}") from None
    if missing := [name for name, value in values.items() if value is None]:
        raise InputError(f"this workflow needs a value for {missing[0]}: --set {missing[0]}=VALUE")
    return values


@dataclass(frozen=True)
class StepEvent:
    """Something that happened in a step.

    Attributes:
        step: its name; index, of n: which of them it is.
        prompts: the instructions of all its branches.
        event: as ForkJoin.stream yields it.
    """

    step: str
    index: int
    n: int
    prompts: list[str]
    event: Event


def run_workflow(
    fj: ForkJoin,
    workflow: Workflow,
    values: dict[str, Value],
    folder: Path,
    *,
    compare: bool = False,
    sampling: Sampling | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[StepEvent]:
    """Runs the steps in their order, reporting as it goes; each step's last event is Done.

    Args:
        values: of the variables (set_variables).
        folder: where the workflow's relative paths begin.
        compare, stopped: as in ForkJoin.stream.
        sampling: what steps and branches change parts of.

    Raises:
        InputError: something in a step is wrong or does not fit; steps before it have been done.
        EngineError: llama.cpp failed.
    """
    sampling = sampling or Sampling()
    tools = _Tools(folder)
    later = [{name for step in workflow.steps[i + 1 :] for name in step.join} for i in range(len(workflow.steps))]
    answers: dict[str, str] = {}
    kept: dict[str, Branches] = {}
    try:
        for i, step in enumerate(workflow.steps):
            render = functools.partial(_render, step.name, {**values, **answers})
            of_step = step.sampling.over(sampling)
            branches = [b for spec in step.branches for b in _expand(spec, render, values, of_step, tools)]
            joins = [kept[name] for name in step.join]
            prompts = [r.prompt for join in joins for r in join.results] + [b.prompt for b in branches]
            try:
                events = fj.stream(
                    render(step.task),
                    branches,
                    join=joins,
                    system=render(system) if (system := step.system or workflow.system) else None,
                    synthesize=render(step.synthesize),
                    compare=compare,
                    sampling=of_step,
                    answer=_answer_sampling(step, of_step),
                    keep=step.name in later[i],
                    tools=tools.all_of(step.tools, render),
                    limits=step.limits.limits(),
                    stopped=stopped,
                )
            except InputError as error:
                raise InputError(f"step {step.name}: {error}") from None
            for event in events:
                if isinstance(event, Done):
                    answers[step.name] = event.result.answer
                    if event.result.kept:
                        # named for those who read the branches of the step that joins it
                        kept[step.name] = event.result.kept.named(step.name)
                yield StepEvent(step.name, i, len(workflow.steps), prompts, event)
            if stopped():
                return
    finally:
        tools.close()
        for branches_of in kept.values():
            branches_of.close()


class _Tools:
    """The tools of a workflow; servers are started when they are first needed, and stopped by `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._servers: dict[tuple[str, ...], Any] = {}

    def all_of(self, specs: Sequence[ToolSpec], render: Callable[..., str]) -> tuple[Tool, ...]:
        """Raises InputError."""
        found = tuple(t for spec in specs for t in self._of(spec, render))
        if len({t.name for t in found}) < len(found):
            raise InputError("tools: two of them have one name")
        return found

    def _of(self, spec: ToolSpec, render: Callable[..., str]) -> list[Tool]:
        if spec.files is not None:
            return file_tools(self.folder / Path(render(spec.files)).expanduser())
        if spec.sql is not None:
            return sql_tools(self.folder / Path(render(spec.sql)).expanduser())
        if spec.mcp is not None:
            from pyps.agents.mcp_client import McpServer

            command = tuple(map(render, spec.mcp))
            if command not in self._servers:
                self._servers[command] = McpServer(command, self.folder)
            return list(self._servers[command].tools)
        return [calculator]

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


def _answer_sampling(step: Step, sampling: Sampling) -> Sampling:
    answer = replace(sampling, stop=())
    if step.json_schema is not None:
        # a penalty for repeated tokens is one for quotes and braces
        answer = replace(answer, grammar=Sampling.grammar_of(step.json_schema), repeat_penalty=1)
    return step.answer.over(answer)


def _expand(
    spec: BranchSpec, render: Callable[..., str], values: dict[str, Value], sampling: Sampling, tools: _Tools
) -> Iterator[Branch]:
    """The branches that a spec stands for. Raises InputError."""
    limits, given_tools = spec.limits.limits(), tools.all_of(spec.tools, render)
    sampled = spec.sampling.over(sampling)
    chosen = None if sampled == sampling else sampled
    items: list[Any] = [None]
    if spec.files is not None:
        items = find_files(spec.files, render, tools.folder)
    elif spec.each is not None:
        each = values.get(spec.each) if isinstance(spec.each, str) else [render(text) for text in spec.each]
        if not isinstance(each, list):
            raise InputError(f"each: {spec.each!r} is no variable that is a list")
        items = each
    for item in items:
        given = {} if item is None else {"item": item}
        yield Branch(
            render(spec.prompt, **given),
            render(spec.name, **given) if spec.name else None,
            chosen,
            given_tools,
            limits,
            spec.joined,
        )


def find_files(files: Files, render: Callable[..., str], folder: Path) -> list[dict[str, str]]:
    """path (relative to the root), name and text of each. Raises InputError: none, too many, or one that is no text."""
    root = (folder / render(files.root)).expanduser()
    pattern = render(files.glob)
    if not root.is_dir():
        raise InputError(f"files: there is no folder {root}")
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise InputError(f"files: the pattern {pattern!r} leaves the folder {root}")
    real = root.resolve()
    try:
        paths = sorted(p for p in root.glob(pattern) if p.is_file() and p.resolve().is_relative_to(real))
    except (ValueError, OSError) as error:
        raise InputError(f"files: the pattern {pattern!r} cannot be used: {error}") from None
    if not paths:
        raise InputError(f"files: nothing in {root} matches {pattern!r}")
    if len(paths) > MAX_SEQUENCES:
        raise InputError(f"files: {len(paths):,} files match {pattern!r}; up to {MAX_SEQUENCES} are possible")
    found = []
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(-1 if files.max_chars is None else files.max_chars)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"files: {path} cannot be read as text: {error}") from None
        found.append({"path": path.relative_to(root).as_posix(), "name": path.name, "text": text})
    return found


_templates = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _render(step: str, values: dict[str, Any], template: str, **more: Any) -> str:
    """A template with these values. Raises InputError."""
    try:
        return _templates.from_string(template).render(values | more)
    except jinja2.UndefinedError as error:
        known = ", ".join([*values, *more])
        raise InputError(f"step {step}: {error.message}; there are: {known}") from None
    except Exception as error:
        # a template is a program: its mistakes are of every kind
        raise InputError(f"step {step}: the template {template[:60]!r} fails: {error}") from None


def outcome(workflow: Workflow, results: dict[str, Result]) -> dict[str, Any]:
    """The object that `pyps run FILE --json` prints: the last step's answer, parsed if it has a schema, and every
    step's result."""
    *_, (name, last) = results.items()
    step = next(s for s in workflow.steps if s.name == name)
    answer: Any = last.answer
    if step.json_schema is not None:
        with contextlib.suppress(ValueError):  # cut at its limit: the text says more than an error would
            answer = json.loads(last.answer)
    return {"answer": answer, "steps": {name: result.to_dict() for name, result in results.items()}}
