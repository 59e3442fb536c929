"""What the measurements find: the objects that `pyps bench --json` and `pyps eval --json` print, in types."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from typing_extensions import Self


@dataclass(frozen=True)
class Median:
    """The median of repeated measurements, with the smallest and the largest of them."""

    value: float
    least: float
    most: float


class _Medians:
    """A row of numbers and medians, as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as a JSON object: a median under its own name, its extremes under `NAME_spread`."""
        row: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Median):
                row |= {field.name: value.value, f"{field.name}_spread": [value.least, value.most]}
            else:
                row[field.name] = value
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Return the row that `to_dict` wrote."""
        values = {f.name: row[f.name] for f in fields(cls)}  # type: ignore[arg-type]
        for name in values:
            if f"{name}_spread" in row:
                values[name] = Median(values[name], *row[f"{name}_spread"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class BenchRow(_Medians):
    """What one case of `pyps bench` measured.

    Attributes:
        branches: Number of branches.
        tokens: Tokens of each branch's output.
        prompt: Tokens of the synthesizer's prompt.
        layout: The prompt layout.
        task: Tokens of the task.
        text_setting: The settings of llama.cpp in which text synthesis was fastest.
        text_ms: Milliseconds to the first token from texts.
        cache_ms: Milliseconds to the first token from caches.
        join_ms: Milliseconds of the join, a part of `cache_ms`.
        floor_ms: Milliseconds of the synthesizer's prompt alone, on cells that are there already.
        kshift_ms: Milliseconds with llama.cpp's own K-shift; None where llama.cpp cannot.
        ratio: text_ms / cache_ms.
        join_share: join_ms / cache_ms.
        floor_ratio: cache_ms / floor_ms.
        batch_tokens_s: Tokens per second of all branches decoding in one batch.
        single_tokens_s: Tokens per second of the branches decoding one after another.
        batch_gain: batch_tokens_s / single_tokens_s.
        floor_bound_ms: Milliseconds that the floor cannot be below on this machine; None if its rates are not known.
        batch_bound_tokens_s: Tokens per second that one batch cannot exceed; None if the rates are not known.
    """

    branches: int
    tokens: int
    prompt: int
    layout: str
    task: int
    text_setting: str
    text_ms: Median
    cache_ms: Median
    join_ms: Median
    floor_ms: Median
    kshift_ms: Median | None
    ratio: Median
    join_share: Median
    floor_ratio: Median
    batch_tokens_s: Median
    single_tokens_s: Median
    batch_gain: Median
    floor_bound_ms: float | None
    batch_bound_tokens_s: float | None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine and the build that a measurement is of.

    Attributes:
        cpu: The processor's name.
        threads: Threads that llama.cpp computed with.
        llama_cpp_python: The version of llama-cpp-python.
        read_gb_s: Gigabytes that all threads together read from memory in a second; None with a GPU.
        compute_gflop_s: Billions of operations a second at which llama.cpp reads a long prompt; None with a GPU.
    """

    cpu: str
    threads: int
    llama_cpp_python: str
    read_gb_s: float | None = None
    compute_gflop_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the machine as a JSON object, without rates that are not known."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class JobRow(_Medians):
    """What a whole job took: branches and their answer, from the task to the answer's last token.

    Attributes:
        branches: Number of branches.
        tokens: Tokens of each branch's output.
        answer: Tokens of the answer.
        ours_ms: Milliseconds with the kernels in use.
        off_ms: Milliseconds with llama.cpp's own kernels.
        calls_ms: Milliseconds with one `llama_cpp.Llama`, call after call, and llama.cpp's own kernels.
        off_ratio: off_ms / ours_ms.
        calls_ratio: calls_ms / ours_ms.
        ours_first_ms: Milliseconds from the branches' last token to the answer's first, with the kernels in use.
        off_first_ms: The same with llama.cpp's own.
        first_ratio: off_first_ms / ours_first_ms.
    """

    branches: int
    tokens: int
    answer: int
    ours_ms: Median
    off_ms: Median
    calls_ms: Median
    off_ratio: Median
    calls_ratio: Median
    ours_first_ms: Median
    off_first_ms: Median
    first_ratio: Median


@dataclass(frozen=True, kw_only=True)
class StepRow(_Medians):
    """What it takes to decode one token of each of some sequences, in one batch.

    Attributes:
        sequences: Number of sequences.
        cells: Cells that each has.
        step_ms: Milliseconds with the kernels in use.
        off_ms: Milliseconds with llama.cpp's own.
        off_ratio: off_ms / step_ms.
    """

    sequences: int
    cells: int
    step_ms: Median
    off_ms: Median
    off_ratio: Median


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Everything that one call of `pyps bench` measured.

    Attributes:
        kernels: The name of the kernels in use, or "off".
        reading: What the synthesizer reads again, and why.
        model: The model's name.
        adapter: The adapter's file, if there is one.
        layout: The prompt layout.
        kv_type: Type of K and V in the caches.
        task: Tokens of the task.
        repeat: Rounds that the medians are of.
        machine: Where it was measured.
        cell_bytes: Bytes of a joined cell, all layers.
        model_mb: Megabytes of the model's file.
        peak_mb: Most megabytes of a process that does the last row's branches and synthesizer; None if not measured.
        rows: One for each case that was measured whole.
        jobs: One for each whole job that was measured.
        steps: One for each number of sequences that was measured.
    """

    kernels: str = "off"
    reading: str = ""
    model: str
    adapter: str | None
    layout: str
    kv_type: str
    task: int
    repeat: int
    machine: Machine
    cell_bytes: int
    model_mb: float
    peak_mb: float | None = None
    rows: tuple[BenchRow, ...]
    jobs: tuple[JobRow, ...] = ()
    steps: tuple[StepRow, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not self.rows

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        report = {f.name: getattr(self, f.name) for f in fields(self)}
        tables = {name: [row.to_dict() for row in getattr(self, name)] for name in ("rows", "jobs", "steps")}
        return report | {"machine": self.machine.to_dict()} | tables

    @classmethod
    def from_dict(cls, report: Mapping[str, Any]) -> "BenchReport":
        """Return the report that `to_dict`, of this version or of one before, wrote."""
        values = {f.name: report[f.name] for f in fields(cls) if f.name in report}
        machine = report["machine"]
        values["machine"] = Machine(**{f.name: machine.get(f.name) for f in fields(Machine)})
        for name, kind in (("rows", BenchRow), ("jobs", JobRow), ("steps", StepRow)):
            values[name] = tuple(kind.from_dict(row) for row in report.get(name, ()))
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one mode made of one example.

    Attributes:
        mode: The mode's name.
        family: The example's family.
        answer: The mode's greedy answer.
        right: Whether the answer is right; None if the example does not say.
        kl: Divergence from text synthesis in nats, mean over the tokens of text synthesis' answer.
        kl_first: Divergence of the first of those tokens.
        agreement: Share of those tokens for which the most likely token is the same.
        ttft_ms: Milliseconds from the branches' last token to the answer's first.
        again: Share of the branches' tokens that were read again; 1 from texts.
    """

    mode: str
    family: str
    answer: str
    right: bool | None
    kl: float
    kl_first: float
    agreement: float
    ttft_ms: float
    again: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Measures over some examples.

    Attributes:
        examples: Number of examples.
        accuracy: Share of right answers; None if no example says what is right.
        accuracy_95: 95 % interval of the accuracy.
        kl: Mean of the outcomes' `kl`, nats.
        kl_first: Mean of the outcomes' `kl_first`, nats.
        agreement: Mean of the outcomes' `agreement`.
        ttft_ms: Median of the outcomes' `ttft_ms`.
        again: Mean of the outcomes' `again`.
        difference: Right answers more than text synthesis gave, as a share; None as for the accuracy.
        difference_95: Its 95 % interval, of the paired answers.
    """

    examples: int
    accuracy: float | None
    accuracy_95: tuple[float, float] | None
    kl: float
    kl_first: float
    agreement: float
    ttft_ms: float
    again: float = 0.0
    difference: float | None = None
    difference_95: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class ModeScores(Scores):
    """The measures of one mode: over all examples, and over those of each family."""

    families: dict[str, Scores]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Everything that one call of `pyps eval` measured.

    Attributes:
        model: The model's name.
        adapter: The adapter's file, if there is one.
        layout: The prompt layout.
        reading: What a run reads again, and why.
        modes: The scores of each mode, by its name.
        outcomes: Every mode's answer to every example.
    """

    model: str
    adapter: str | None
    layout: str
    reading: str = ""
    modes: dict[str, ModeScores]
    outcomes: tuple[Outcome, ...]

    @property
    def examples(self) -> int:
        """Number of examples that were measured."""
        return self.modes["text"].examples if self.modes else 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not self.modes

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return asdict(self) | {"examples": self.examples}
