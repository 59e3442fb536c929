"""What a model needs in order to answer from joined caches as it does from texts, measured on the model itself.

Two things are found, on built-in jobs (calibration.jsonl), in about a minute for a model of half a billion parameters:

    correction   a line a·x + b for each channel of K and V, which takes joined cells, on average, to what the same
                 tokens would have as part of the text (correction.py)
    share        the smallest share of tokens to read again whose answers are as near to those of text synthesis as
                 these are to themselves with the branches in another order; or all of them, if no half is enough

Both are kept on disk for the model and the machine's cache folder, and measured again if the file is not one of ours.
"""

import contextlib
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyps.engine.find import Progress, cache_dir, no_progress
from pyps.engine.join import LayerCorrection
from pyps.engine.model import Model
from pyps.engine.positions import check_joinable
from pyps.errors import InputError
from pyps.files import whole
from pyps.forkjoin.comparison import Answer, Comparison, Job, Way, divergence, together, words_of
from pyps.forkjoin.correction import CorrectionFit
from pyps.forkjoin.reading import Reading
from pyps.forkjoin.synthesis import ContextOptions
from pyps.prompts.layout import Layout

VERSION = 1

SHARES = (0.0, 0.05, 0.1, 0.2, 0.5)  # more is not worth it: text synthesis is as fast
_ANSWER = 16  # tokens of each answer that is compared
_DIGEST = 32  # bytes of a SHA-256, at the end of the file
_FITTED = 8  # jobs that the correction is fitted on: thousands of tokens, for two numbers a channel


@dataclass(frozen=True, kw_only=True)
class Point:
    """How near a way's answers are to those of text synthesis.

    Attributes:
        way: Its name: "text", "text, backwards", "join", or "read".
        share: For "read", the most of the outputs' tokens that were read again.
        again: The share that was.
        kl: Divergence from text synthesis in nats a token, mean.
        kl_first: That of the first token.
        agreement: Share of tokens for which the most likely one is the same.
        ttft_ms: Milliseconds to the first token, median.
    """

    way: str
    share: float = 0.0
    again: float = 0.0
    kl: float
    kl_first: float
    agreement: float
    ttft_ms: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was found for a model.

    Attributes:
        jobs: Number of jobs that it was measured on.
        points: The curve, text synthesis and today's join before it.
        reading: What comes of it.
    """

    jobs: int
    points: tuple[Point, ...]
    reading: Reading


def calibration_of(
    model: Model,
    options: ContextOptions,
    *,
    report: Progress = no_progress,
    patience: float | None = None,
    anew: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Calibration | None:
    """Return what is on disk for a model, or measure it and keep it.

    Args:
        model: The model; its caches can be joined.
        options: How contexts are made.
        report: Called with the fraction that is done.
        patience: Seconds that it may take, about; None for as long as it takes.
        anew: Whether it is measured even if it has been before.
        stopped: Asked between jobs; once true, nothing is kept.

    Returns:
        None if it could not be measured: the model has no chat template that can be used, it is too small, or it would
        have taken too long.
    """
    path = path_of(model)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if not anew:
            return read(path)
    try:
        calibration = measure(model, options, report=report, patience=patience, stopped=stopped)
    except InputError:
        return None
    if calibration:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, calibration)
    return calibration


def path_of(model: Model) -> Path:
    """Return where a model's calibration is kept: quantisations of one model have one each."""
    identity = model.fingerprint, model.metadata.get("general.file_type"), VERSION
    return cache_dir() / "calibrations" / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.npz"


def write(path: Path, calibration: Calibration) -> None:
    """Write a calibration, whole or not at all. Raises OSError."""
    values = asdict(replace(calibration, reading=replace(calibration.reading, correction=())))
    arrays: dict[str, Any] = {"values": np.frombuffer(json.dumps(values | {"version": VERSION}).encode(), np.uint8)}
    for i, (k, v) in enumerate(calibration.reading.correction):
        arrays |= {f"{i}.k": k, f"{i}.v": v}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with whole(path) as partial:
        partial.write_bytes(buffer.getvalue() + _digest(buffer.getvalue()))


def read(path: Path) -> Calibration:
    """Return what `write` has written. Raises OSError, ValueError, KeyError or TypeError for anything else."""
    data = path.read_bytes()
    body, digest = data[:-_DIGEST], data[-_DIGEST:]
    if _digest(body) != digest:  # not every byte of a ZIP file is under a checksum of its own
        raise ValueError("not a calibration, or damaged")
    with np.load(io.BytesIO(body), allow_pickle=False) as file:
        values: dict[str, Any] = json.loads(file["values"].tobytes())
        if values["version"] != VERSION:
            raise ValueError("another version")
        n = sum(name.endswith(".k") for name in file.files)
        correction: list[LayerCorrection] = [(file[f"{i}.k"], file[f"{i}.v"]) for i in range(n)]
    for array in (array for pair in correction for array in pair):
        if array.dtype != np.float32 or array.ndim != 2 or len(array) != 2 or not np.isfinite(array).all():
            raise ValueError("not a correction")
    return Calibration(
        jobs=int(values["jobs"]),
        points=tuple(Point(**point) for point in values["points"]),
        reading=Reading(**values["reading"] | {"correction": tuple(correction)}),
    )


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def built_in_jobs(model: Model) -> list[Job]:
    """Return the built-in jobs, in tokens. Raises InputError if the model's chat template cannot be used."""
    lines = files("pyps.forkjoin").joinpath("calibration.jsonl").read_text(encoding="utf-8").split("\n")
    return [job_of(model, "shared", **json.loads(line)) for line in lines if line]


def job_of(
    model: Model,
    layout: str,
    *,
    task: str,
    branches: Sequence[dict[str, str]],
    synthesize: str,
    system: str | None = None,
) -> Job:
    """Return a job whose branches have ended, in tokens.

    Args:
        model: The model.
        layout: The prompts' layout.
        task: What it is about.
        branches: The prompt, text and name of each.
        synthesize: The synthesizer's instruction.
        system: The system message; None for the model's own default.

    Raises:
        InputError: The prompts cannot be laid out.
    """
    lay = Layout(model, layout, task, system, synthesize)
    prompts = lay.prompts([branch["prompt"] for branch in branches])
    outputs = [model.tokenize(model.as_data(branch["text"])) for branch in branches]
    names, texts = [branch["name"] for branch in branches], [branch["text"] for branch in branches]
    labels, labelled = lay.labelled(names)
    return Job(
        prefix=prompts.prefix,
        branches=list(zip(prompts.branches, outputs, strict=True)),
        branch_point=prompts.branch_point,
        synthesizer=prompts.synthesizer,
        labels=labels,
        labelled=labelled,
        pasted=lay.pasted(names, texts),
        backwards=lay.pasted(names[::-1], texts[::-1]),
        question=words_of(task, synthesize),
    )


def measure(
    model: Model,
    options: ContextOptions,
    *,
    report: Progress = no_progress,
    patience: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Calibration | None:
    """Measure a model on the built-in jobs. Arguments and result are those of `calibration_of`.

    Raises:
        InputError: The jobs do not fit the model, or its chat template cannot be used.
        RefusedError: Its caches cannot be joined.
        EngineError: llama.cpp failed.
    """
    check_joinable(model)
    jobs = built_in_jobs(model)
    began = time.perf_counter()
    steps = _FITTED + len(jobs)
    title = f"trying how {model.name} reads joined caches (once for this model)"

    def go_on(done: int) -> bool:
        """Report, and return whether to go on: the first step tells how long all of them take, if nothing happens."""
        report(title, done / steps)
        elapsed = time.perf_counter() - began
        expected = elapsed * steps if done == 1 else elapsed
        return (patience is None or expected <= 2 * patience) and not stopped()

    fit = CorrectionFit(model, options.threads)
    with fit:
        for i, job in enumerate(jobs[:_FITTED]):
            fit.add(job)
            if not go_on(i + 1):
                return None
    correction = fit.correction()
    ways = {"text": Way(), "text, backwards": Way(backwards=True), "join": Way(cache=True)}
    for share in SHARES:
        ways[f"read {share}"] = Way(cache=True, reading=Reading(share=share, labels=True, correction=correction))
    measured: dict[str, list[_Measures]] = {name: [] for name in ways}
    for i, job in enumerate(jobs):
        with Comparison(model, None, job, _ANSWER, options) as comparison:
            reference = comparison.answer(ways["text"])
            for name, way in ways.items():
                answer = reference if name == "text" else comparison.answer(way, max_tokens=1)
                logs = reference.logs if name == "text" else comparison.judge(way, reference)
                measured[name].append(_measures(job, answer, reference, logs))
        if not go_on(_FITTED + i + 1):
            return None
    return Calibration(
        jobs=len(jobs),
        points=tuple(_point(name, measures) for name, measures in measured.items()),
        reading=replace(_choose(measured), labels=True, correction=correction, auto=True),
    )


class _Measures(NamedTuple):
    """What one way made of one job, as in Point."""

    again: float
    kl: float
    kl_first: float
    agreement: float
    ttft_ms: float


def _measures(job: Job, answer: Answer, reference: Answer, logs: NDArray[np.float32]) -> _Measures:
    kl = divergence(reference.logs, logs)
    same = together(reference.logs, logs)
    return _Measures(answer.n_again / job.n_output, float(kl.mean()), float(kl[0]), same, answer.ttft_ms)


def _point(name: str, measures: Sequence[_Measures]) -> Point:
    way, _, share = name.partition(" ") if name.startswith("read") else (name, "", "0")
    return Point(
        way=way,
        share=float(share),
        again=fmean(m.again for m in measures),
        kl=fmean(m.kl for m in measures),
        kl_first=fmean(m.kl_first for m in measures),
        agreement=fmean(m.agreement for m in measures),
        ttft_ms=median(m.ttft_ms for m in measures),
    )


def _choose(measured: Mapping[str, Sequence[_Measures]]) -> Reading:
    """Return the smallest share whose answers are surely as near to text synthesis as the order of the branches.

    Surely: the mean of the differences from "text, backwards", job by job, is below 0 by its standard error at least.
    """
    for share in SHARES:
        pairs = zip(measured[f"read {share}"], measured["text, backwards"], strict=True)
        more = [read.kl - backwards.kl for read, backwards in pairs]
        if fmean(more) + stdev(more) / math.sqrt(len(more)) <= 0:
            return Reading(share=share, why="what this model was found to need")
    return Reading(share=1.0, why="this model hardly reads joined caches")
