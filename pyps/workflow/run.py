"""Running a workflow: templates, the files and tools that its branches use, and its steps one after the other."""

import contextlib
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from pyps.agents.mcp_client import McpServer
from pyps.agents.tools import Tool, calculator, file_tools, sql_tools
from pyps.engine.context import MAX_SEQUENCES
from pyps.engine.sampling import Sampling
from pyps.errors import InputError
from pyps.forkjoin import Branch, ForkJoin
from pyps.forkjoin.branches import Branches
from pyps.forkjoin.events import Done, Event, Result
from pyps.workflow.file import BranchSpec, Files, Step, ToolSpec, Value, Workflow


@dataclass(frozen=True)
class StepEvent:
    """Something that happened in a step.

    Attributes:
        step: The step's name.
        index: Its number, from 0.
        n: The number of steps.
        prompts: The instructions of all its branches.
        event: What happened, as ForkJoin.stream yields it.
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
    """Run the steps in their order, and report what happens; the last event of each step is Done.

    Args:
        fj: What runs them.
        workflow: The workflow.
        values: Its variables, as set_variables returns them.
        folder: Where the workflow's relative paths begin.
        compare: As in ForkJoin.stream.
        sampling: What steps and branches override parts of.
        stopped: As in ForkJoin.stream. When it returns true, the step that runs is the last one.

    Raises:
        InputError: Something in a step is wrong or does not fit; the steps before it have run.
        EngineError: llama.cpp failed.
    """
    sampling = sampling or Sampling()
    tools = _Tools(folder)
    later = [{name for step in workflow.steps[i + 1 :] for name in step.join} for i in range(len(workflow.steps))]
    answers: dict[str, str] = {}
    finished: dict[str, Branches] = {}  # answers that later steps join
    try:
        for i, step in enumerate(workflow.steps):
            render = functools.partial(_render, step.name, {**values, **answers})
            step_sampling = step.sampling.over(sampling)
            branches = [b for spec in step.branches for b in _expand(spec, render, values, step_sampling, tools)]
            joins = [finished[name] for name in step.join]
            prompts = [r.prompt for join in joins for r in join.results] + [b.prompt for b in branches]
            try:
                events = fj.stream(
                    render(step.task),
                    branches,
                    join=joins,
                    system=render(system) if (system := step.system or workflow.system) else None,
                    synthesize=render(step.synthesize),
                    compare=compare,
                    read=step.read,
                    sampling=step_sampling,
                    answer=_answer_sampling(step, step_sampling),
                    keep=step.name in later[i],
                    tools=tools.create(step.tools, render),
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
                        finished[step.name] = event.result.kept.named(step.name)
                yield StepEvent(step.name, i, len(workflow.steps), prompts, event)
            if stopped():
                return
    finally:
        tools.close()
        for kept_branches in finished.values():
            kept_branches.close()


class _Tools:
    """The tools of a workflow; servers are started when they are first needed, and stopped by `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._servers: dict[tuple[tuple[str, ...], tuple[tuple[str, str], ...]], McpServer] = {}

    def create(self, specs: Sequence[ToolSpec], render: Callable[..., str]) -> tuple[Tool, ...]:
        tools = tuple(tool for spec in specs for tool in self._of_kind(spec, render))
        for name, times in Counter(tool.name for tool in tools).items():
            if times > 1:
                raise InputError(f"tools: {times} of them are called {name}")
        return tools

    def _of_kind(self, spec: ToolSpec, render: Callable[..., str]) -> Sequence[Tool]:
        if spec.files is not None:
            return file_tools(self.folder / Path(render(spec.files)).expanduser())
        if spec.sql is not None:
            return sql_tools(self.folder / Path(render(spec.sql)).expanduser())
        if spec.mcp is not None:
            command, env = tuple(map(render, spec.mcp)), _environment(spec.env)
            key = command, tuple(sorted(env.items()))
            if key not in self._servers:
                self._servers[key] = McpServer(command, self.folder, env)
            return self._servers[key].tools
        return [calculator]

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return variables with the user's own in place of ${NAME}. They are no templates: answers cannot get there."""

    def own(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise InputError(f"env: your environment has no variable {match[1]}: export it, or write the value itself")
        return os.environ[match[1]]

    return {name: re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", own, value) for name, value in env.items()}


def _answer_sampling(step: Step, sampling: Sampling) -> Sampling:
    answer = replace(sampling, stop=())
    if step.json_schema is not None:
        # a penalty for repeated tokens would be one for quotes and braces
        answer = replace(answer, grammar=Sampling.grammar_of(step.json_schema), repeat_penalty=1)
    return step.answer.over(answer)


def _expand(
    spec: BranchSpec, render: Callable[..., str], values: dict[str, Value], sampling: Sampling, tools: _Tools
) -> Iterator[Branch]:
    """Yield the branches that a spec stands for."""
    limits, branch_tools = spec.limits.limits(), tools.create(spec.tools, render)
    branch_sampling = spec.sampling.over(sampling)
    items: list[Any] = [None]
    if spec.files is not None:
        items = find_files(spec.files, render, tools.folder)
    elif spec.each is not None:
        each = values.get(spec.each) if isinstance(spec.each, str) else [render(text) for text in spec.each]
        if not isinstance(each, list):
            raise InputError(f"each: {spec.each!r} is not a variable whose value is a list")
        items = each
    for item in items:
        variables = {} if item is None else {"item": item}
        yield Branch(
            render(spec.prompt, **variables),
            render(spec.name, **variables) if spec.name else None,
            None if branch_sampling == sampling else branch_sampling,
            branch_tools,
            limits,
            spec.joined,
        )


def find_files(files: Files, render: Callable[..., str], folder: Path) -> list[dict[str, str]]:
    """Read the files that a pattern of a workflow matches.

    Args:
        files: The pattern, and the folder to look in.
        render: Makes a text of a template.
        folder: Where relative paths begin.

    Returns:
        The path (relative to the root), name and text of each file, sorted by path.

    Raises:
        InputError: There is none, there are too many, or one is not a text.
    """
    root = (folder / render(files.root)).expanduser()
    pattern = render(files.glob)
    if not root.is_dir():
        raise InputError(f"files: there is no folder {root}")
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise InputError(f"files: the pattern {pattern!r} leaves the folder {root}")
    real_root = root.resolve()
    try:
        paths = sorted(p for p in root.glob(pattern) if p.is_file() and p.resolve().is_relative_to(real_root))
    except (ValueError, OSError) as error:
        raise InputError(f"files: the pattern {pattern!r} cannot be used: {error}") from None
    if not paths:
        raise InputError(f"files: nothing in {root} matches {pattern!r}")
    if len(paths) > MAX_SEQUENCES:
        raise InputError(f"files: {len(paths):,} files match {pattern!r}; up to {MAX_SEQUENCES} are possible")
    items = []
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(-1 if files.max_chars is None else files.max_chars)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"files: {path} cannot be read as text: {error}") from None
        items.append({"path": path.relative_to(root).as_posix(), "name": path.name, "text": text})
    return items


_templates = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _render(step: str, values: dict[str, Any], template: str, **more: Any) -> str:
    try:
        return _templates.from_string(template).render(values | more)
    except jinja2.UndefinedError as error:
        names = ", ".join([*values, *more])
        raise InputError(f"step {step}: {error.message}; there are: {names}") from None
    except Exception as error:
        # a template is a program: its mistakes are of every kind
        raise InputError(f"step {step}: the template {template[:60]!r} fails: {error}") from None


def outcome(workflow: Workflow, results: dict[str, Result]) -> dict[str, Any]:
    """Return the object that `pyps run FILE --json` prints.

    Args:
        workflow: The workflow that ran.
        results: The results of its steps by name, in their order.

    Returns:
        "answer", the last step's, parsed if the step has a schema; and "steps", the results as objects by name.
    """
    *_, (name, last) = results.items()
    step = next(s for s in workflow.steps if s.name == name)
    answer: Any = last.answer
    if step.json_schema is not None:
        with contextlib.suppress(ValueError):  # an answer cut at its limit: the text says more than an error would
            answer = json.loads(last.answer)
    return {"answer": answer, "steps": {name: result.to_dict() for name, result in results.items()}}
