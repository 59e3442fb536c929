"""From a request to a plan: every prompt in tokens, every count of cells, and every refusal. Nothing is decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from pyps.adapters.adapter import Adapter
from pyps.agents.agent import Assignment
from pyps.agents.tools import JoinedPart, Limits
from pyps.engine.context import MAX_SEQUENCES, round_up
from pyps.engine.model import Model
from pyps.engine.sampling import Sampler, Sampling
from pyps.errors import InputError, RefusedError
from pyps.files import check_writable
from pyps.forkjoin.branches import Branches, BranchResult, as_list
from pyps.forkjoin.events import Mode
from pyps.forkjoin.reading import JOIN_ONLY, Reading
from pyps.forkjoin.request import Branch, Request
from pyps.forkjoin.synthesis import ContextOptions
from pyps.prompts.layout import Instruction, Layout, conversation


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run is made on: the parts of a ForkJoin that a plan depends on.

    Attributes:
        model: The model.
        adapter: The synthesizer's adapter, or None.
        layout: "shared" or "paper".
        options: How contexts are made.
        n_ctx: Most cells that any sequence may need, or None for any number.
        why_not_joinable: Why the model's caches cannot be joined, or "" (positions.why_not_joinable).
        reading: What the synthesizer reads again, in cache mode.
    """

    model: Model
    adapter: Adapter | None
    layout: str
    options: ContextOptions
    n_ctx: int | None
    why_not_joinable: str
    reading: Reading = JOIN_ONLY


@dataclass(frozen=True, kw_only=True)
class PlannedBranch:
    """A branch with nothing left open.

    Attributes:
        name: Its name.
        assignment: What it is to do.
        joined: What of it the synthesizer receives.
        fork_point: Tokens of the prefix that it begins with.
        prompt: Tokens that it reads after those.
        after: Cells that it may need behind its prompt.
    """

    name: str
    assignment: Assignment
    joined: JoinedPart
    fork_point: int
    prompt: list[int]
    after: int

    @property
    def cells(self) -> int:
        """Cells that it may need in all."""
        return self.fork_point + len(self.prompt) + self.after

    @property
    def max_output(self) -> int:
        """Most tokens that the synthesizer may receive."""
        return self.assignment.sampling.max_tokens if self.joined == "final" else self.after


@dataclass(frozen=True, kw_only=True)
class PlannedAnswer:
    """What follows the branches.

    Attributes:
        mode: "cache" or "text".
        compare: Whether text synthesis follows.
        save: The file for the branches, or None.
        keep: Whether the answer's cache is kept.
        assignment: What the synthesizer is to do.
        prompt: Tokens that the synthesizer reads after the joined cells;
        labelled: and those that it reads if there are labels before them.
        cells: Cells that it may need up to the prompt's end.
        after: Cells that it may need behind its prompt, room for more included.
    """

    mode: Mode
    compare: bool
    save: Path | None
    keep: bool
    assignment: Assignment
    prompt: list[int]
    labelled: list[int]
    cells: int
    after: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A fork-join that can be run as it is.

    Attributes:
        setting: What it is made on; its options have the fewest cells that a context must have.
        seed: The first branch's seed.
        task: What the user asks: the kept answer's instruction.
        joins: Finished branches that come first.
        layout: The prompts of text synthesis, once the branches' texts are there.
        prefix: Tokens that all branches begin with.
        branch_point: The position that outputs are re-encoded to.
        branches: The branches to run.
        branch_cells: Cells that the longest of them may need.
        answer: What follows the branches; None if they are kept instead.
    """

    setting: Setting
    seed: int
    task: str
    joins: tuple[Branches, ...]
    layout: Layout
    prefix: list[int]
    branch_point: int
    branches: tuple[PlannedBranch, ...]
    branch_cells: int
    answer: PlannedAnswer | None

    @property
    def joined_results(self) -> list[BranchResult]:
        """The results of the branches that come first."""
        return [result for branches in self.joins for result in branches.results]


def make_plan(request: Request, setting: Setting, seed: int, *, answer: bool = True) -> Plan:
    """Make the plan of a request.

    Args:
        request: What is asked for.
        setting: What the run is made on.
        seed: The first branch's seed, where the request's sampling has none.
        answer: Whether an answer follows the branches; if not, only the options about branches count.

    Raises:
        RefusedError: The model cannot do what is asked for.
        InputError: Something is wrong or does not fit; the message says what to change.
    """
    model = setting.model
    joins = tuple(as_list(request.join))
    n_branches = len(request.branches) + sum(map(len, joins))
    if not n_branches:
        raise InputError("there are no branches: give at least one")
    if n_branches > MAX_SEQUENCES:
        raise InputError(f"{n_branches} branches are too many: llama.cpp takes up to {MAX_SEQUENCES}")
    for finished in joins:
        if finished.ctx.model is not model:
            raise InputError("branches to join are another model's: caches can only be joined within one")
    model.check_generates()

    sampling = request.sampling or Sampling()
    if sampling.seed is not None:
        seed = sampling.seed
    branches = [Branch(item) if isinstance(item, str) else item for item in request.branches]
    first = sum(map(len, joins))
    assignments = [_assignment(branch, sampling, seed + i) for i, branch in enumerate(branches)]
    synthesizer = Assignment(
        instruction=request.synthesize,
        sampling=_answer_sampling(request, sampling, seed),
        tools=tuple(request.tools),
        limits=request.limits or Limits(),
    )
    _check_grammars(model, [*assignments, synthesizer])
    layout = Layout(model, setting.layout, request.task, request.system, synthesizer.text)
    prompts = layout.prompts(
        [Instruction(a.text, branch.task, branch.system) for a, branch in zip(assignments, branches, strict=True)]
    )
    planned = [
        PlannedBranch(
            name=branch.name or f"branch-{first + i + 1}",
            assignment=assignments[i],
            joined=_checked_part(branch.joined),
            fork_point=prompts.fork_points[i],
            prompt=prompts.branches[i],
            after=assignments[i].max_cells(model),
        )
        for i, branch in enumerate(branches)
    ]
    branch_cells = max([len(prompts.prefix) + 1, *(branch.cells for branch in planned)])
    if planned:
        _check_fits(setting, "a branch", branch_cells, branch_cells)
    plan = Plan(
        setting=setting,
        seed=seed,
        task=next(m["content"] for m in reversed(conversation(request.task, None)) if m["role"] == "user"),
        joins=joins,
        layout=layout,
        prefix=prompts.prefix,
        branch_point=prompts.branch_point,
        branches=tuple(planned),
        branch_cells=branch_cells,
        answer=None,
    )
    if not answer:
        _check_joinable(setting)
        return plan
    return _with_answer(plan, request, synthesizer, prompts.synthesizer)


def _assignment(branch: Branch, sampling: Sampling, seed: int) -> Assignment:
    own = branch.sampling or sampling
    if own.seed is None or branch.sampling is None:
        own = replace(own, seed=seed % 2**31)
    return Assignment(instruction=branch.prompt, sampling=own, tools=tuple(branch.tools), limits=branch.limits)


def _check_grammars(model: Model, assignments: Sequence[Assignment]) -> None:
    """Raise InputError if llama.cpp cannot use a grammar that a run will need with this model."""
    grammars = {assignment.sampling.grammar for assignment in assignments}
    for assignment in assignments:
        if assignment.tools and assignment.limits.max_calls:
            grammars |= {assignment.choice_grammar(may_answer) for may_answer in (True, False)}
    for grammar in grammars - {""}:
        Sampler(model, Sampling(grammar=grammar)).close()


def _checked_part(joined: JoinedPart) -> JoinedPart:
    if joined not in get_args(JoinedPart):
        raise InputError(f"joined must be one of {', '.join(get_args(JoinedPart))}, not {joined!r}")
    return joined


def _answer_sampling(request: Request, sampling: Sampling, seed: int) -> Sampling:
    answer = request.answer or replace(sampling, stop=())
    return answer if answer.seed is not None else replace(answer, seed=seed)


def _with_answer(plan: Plan, request: Request, assignment: Assignment, prompt: list[int]) -> Plan:
    """Add what follows the branches. Raises InputError and RefusedError."""
    setting, mode = plan.setting, request.mode
    if mode not in get_args(Mode):
        raise InputError(f"mode {mode!r} does not exist: choose 'cache' or 'text'")
    if mode == "text" and (request.compare or request.keep):
        raise InputError("compare and keep are for cache synthesis: use them with mode 'cache'")
    if request.save:
        check_writable(request.save)
    if mode == "cache" or request.save:
        _check_joinable(setting)
    if not 0 <= request.room < 2**20:
        raise InputError(f"there cannot be room for {request.room} tokens: give a number from 0 to {2**20 - 1:,}")
    answer_cells = assignment.max_cells(setting.model)
    results = plan.joined_results
    outputs = [r.tokens for r in results] + [b.max_output for b in plan.branches]
    names = [r.name for r in results] + [b.name for b in plan.branches]
    labels: list[list[int]] = []
    labelled = prompt
    if mode == "cache" and setting.reading.labels:
        labels, labelled = plan.layout.labelled(names)
    longest_prompt = max(len(prompt), len(labelled))
    cells = plan.branch_point + sum(outputs) + sum(map(len, labels)) + longest_prompt
    after = answer_cells + request.room
    texts = [r.text for r in results] + [""] * len(plan.branches)
    pasted = len(plan.prefix) + len(plan.layout.pasted(names, texts))
    text_cells = pasted + sum(b.max_output for b in plan.branches) + answer_cells
    if mode == "cache":
        # joined outputs lie side by side: there are cells for all of them, but positions for the longest
        longest_label = max(map(len, labels), default=0)
        reach = plan.branch_point + longest_label + max(outputs) + longest_prompt + answer_cells
        _check_fits(setting, "the synthesizer", cells + after, reach)
    if mode == "text" or request.compare:
        _check_fits(setting, "text synthesis", text_cells, text_cells)
    sizes = [plan.branch_cells, cells + after, text_cells, *(branches.ctx.n_ctx for branches in plan.joins)]
    return replace(
        plan,
        setting=_on_one_side(setting, max(sizes), plan.joins),
        answer=PlannedAnswer(
            mode=mode,
            compare=request.compare,
            save=request.save,
            keep=request.keep,
            assignment=assignment,
            prompt=prompt,
            labelled=labelled,
            cells=cells,
            after=after,
        ),
    )


def _check_joinable(setting: Setting) -> None:
    if setting.why_not_joinable:
        raise RefusedError(f"{setting.why_not_joinable}. Text mode (--mode text) works with it.")


def _check_fits(setting: Setting, who: str, cells: int, positions: int) -> None:
    """Raise InputError if someone may need more cells or positions than there may be."""
    if setting.n_ctx is not None and cells > setting.n_ctx:
        raise InputError(f"{who} may need {cells:,} cells; the limit given is {setting.n_ctx:,} (n_ctx)")
    if positions > (trained := setting.model.n_ctx_train):
        raise InputError(
            f"{who} may need {positions:,} positions, but {setting.model.name} was trained on {trained:,}: use fewer "
            f"or shorter branches (max_tokens), or a shorter task"
        )


def _on_one_side(setting: Setting, largest: int, joins: Sequence[Branches]) -> Setting:
    """Return a setting whose contexts all encode positions alike, so that keys can move between them (LongRoPE)."""
    limit = setting.model.long_context
    if not limit or round_up(largest) <= limit:
        return setting
    if any(branches.ctx.n_ctx <= limit for branches in joins):
        raise InputError(f"branches to join have positions for a context of up to {limit:,} cells; this run needs more")
    return replace(setting, options=replace(setting.options, min_cells=limit + 1))
