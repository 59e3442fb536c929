"""What a model needs in order to answer from joined caches: measured once, kept on disk, not believed blindly."""

import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiny import TinyModel

from pyps import ForkJoin, InputError, Sampling
from pyps.engine.model import Model
from pyps.forkjoin import calibration, forkjoin
from pyps.forkjoin.calibration import Calibration, Point, calibration_of, job_of, path_of
from pyps.forkjoin.comparison import Comparison, Job
from pyps.forkjoin.correction import CorrectionFit, _Cells, _Sums
from pyps.forkjoin.forkjoin import UNMEASURED
from pyps.forkjoin.reading import Reading
from pyps.forkjoin.synthesis import ContextOptions
from pyps.measure.doctor import _curve

TASK, BRANCHES = "Which one?", ["Argue for A.", "Argue for B."]
GREEDY = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
OPTIONS = ContextOptions()
ENOUGH: dict[str, Any] = {"llama__context_length": 8192}  # for the built-in jobs, in bytes


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of each test's own."""
    monkeypatch.setenv("PYPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(tiny_model: TinyModel) -> Model:
    """A model of one layer that the built-in jobs fit: it is measured in two seconds."""
    return tiny_model(n_layers=1, **ENOUGH)


def lines(model: Model, seed: int = 0) -> tuple[tuple[NDArray[np.float32], NDArray[np.float32]], ...]:
    rng = np.random.default_rng(seed)

    def of_channels() -> NDArray[np.float32]:
        return rng.standard_normal((2, model.n_embd_kv)).astype(np.float32)

    return tuple((of_channels(), of_channels()) for _ in range(model.n_layer))


def a_calibration(model: Model, seed: int = 0, **changes: Any) -> Calibration:
    points = (
        Point(way="text, backwards", kl=0.5, kl_first=0.25, agreement=0.75, ttft_ms=100.0),
        Point(way="read", share=0.3, again=0.29, kl=0.4, kl_first=0.2, agreement=0.8, ttft_ms=30.0),
    )
    reading = Reading(share=0.3, labels=True, correction=lines(model, seed), auto=True, why="Zoë's test says so")
    return Calibration(jobs=3, points=points, reading=replace(reading, **changes))


def same(a: Calibration | None, b: Calibration | None) -> bool:
    """Equality does not look at corrections."""
    if a is None or b is None or a != b or len(a.reading.correction) != len(b.reading.correction):
        return a is b
    pairs = zip(itertools.chain(*a.reading.correction), itertools.chain(*b.reading.correction), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and (x == y).all() for x, y in pairs)


def put(model: Model, kept_before: Calibration) -> Path:
    path = path_of(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    calibration.write(path, kept_before)
    return path


class Measurement:
    """Takes the place of `measure`, which takes seconds."""

    def __init__(self, result: Calibration | None) -> None:
        self.result, self.times = result, 0

    def __call__(self, *_: Any, **__: Any) -> Calibration | None:
        self.times += 1
        return self.result


@pytest.fixture
def measured(small: Model, monkeypatch: pytest.MonkeyPatch) -> Measurement:
    measurement = Measurement(a_calibration(small, seed=1, share=0.7))
    monkeypatch.setattr(calibration, "measure", measurement)
    return measurement


# --- kept on the disk -----------------------------------------------------------------------------------------------


def test_what_is_written_is_read(small: Model, measured: Measurement, cache: Path) -> None:
    original = a_calibration(small)
    path = put(small, original)
    assert same(calibration.read(path), original)
    assert same(calibration_of(small, OPTIONS), original)
    assert measured.times == 0
    assert [file for file in cache.rglob("*") if file.is_file()] == [path]
    anew = calibration_of(small, OPTIONS, anew=True)
    assert measured.times == 1
    assert same(anew, measured.result)
    assert same(calibration.read(path), measured.result), "it takes the place of the old one"


def test_it_is_measured_once(small: Model, measured: Measurement) -> None:
    for _ in range(3):
        assert same(calibration_of(small, OPTIONS), measured.result)
    assert measured.times == 1


def test_each_model_has_its_own(tiny_model: TinyModel, small: Model, tiny: Model) -> None:
    """And each quantisation: what a file's type is has no part in its norms."""
    other_type = tiny_model(n_layers=1, general__file_type=7, **ENOUGH)
    assert other_type.fingerprint == small.fingerprint
    other_weights = tiny_model(n_layers=1, seed=1, **ENOUGH)
    paths = {path_of(model) for model in (small, tiny, other_type, other_weights)}
    assert len(paths) == 4
    assert path_of(small) == path_of(small)


# --- damaged files --------------------------------------------------------------------------------------------------


def checked(model: Model, measured: Measurement, data: bytes) -> None:
    """Nothing is raised, nothing of the file is believed, and the next file is a good one."""
    path = path_of(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    before = measured.times
    assert same(calibration_of(model, OPTIONS), measured.result)
    assert measured.times == before + 1
    assert same(calibration_of(model, OPTIONS), measured.result)
    assert measured.times == before + 1, "it was written again"


def test_files_that_are_cut_off(small: Model, measured: Measurement) -> None:
    data = put(small, a_calibration(small)).read_bytes()
    for n in [*range(0, len(data), 50), len(data) - 1]:
        checked(small, measured, data[:n])
        checked(small, measured, data[n + 1 :])
    checked(small, measured, data[: len(data) // 2] + b"\0" * (len(data) - len(data) // 2))


@pytest.mark.parametrize("data", [b"", b"\0", b"This is not a calibration.\n", b"{}", b"PK\x03\x04", b"\x93NUMPY\1\0"])
def test_files_that_are_something_else(small: Model, measured: Measurement, data: bytes) -> None:
    checked(small, measured, data)


def test_arrays_that_are_pickles_are_not_opened(small: Model, measured: Measurement, tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(tmp_path / "run"),)

    put(small, a_calibration(small))
    path = tmp_path / "evil.npz"
    np.savez(path, values=np.array([Program()], object))
    checked(small, measured, path.read_bytes())
    np.save(path.with_suffix(".npy"), np.array([Program()], object))
    checked(small, measured, path.with_suffix(".npy").read_bytes())
    assert not (tmp_path / "run").exists()


def test_any_flipped_bit(small: Model, measured: Measurement, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a disk does to a file: it is still what it was, or measured again."""
    original = replace(a_calibration(small), points=())
    path = put(small, original)
    data = path.read_bytes()
    monkeypatch.setattr(calibration, "write", lambda *_: None)
    unharmed = 0
    for i in range(len(data)):
        for bit in (i % 8, 7 - i % 8) if i > len(data) - 250 else (i % 8,):
            damaged = bytearray(data)
            damaged[i] ^= 1 << bit
            path.write_bytes(damaged)
            before = measured.times
            result = calibration_of(small, OPTIONS)
            again = measured.times > before
            unharmed += not again
            assert same(result, measured.result if again else original), f"bit {bit} of byte {i}"
    assert unharmed < len(data) / 2, "dates and such"


Change = Callable[[dict[str, Any], dict[str, Any]], object]


def nan_in(name: str, value: float) -> Change:
    def change(_: dict[str, Any], arrays: dict[str, Any]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][1, 3] = value

    return change


def reshaped(name: str, shape: Callable[[NDArray[Any]], NDArray[Any]]) -> Change:
    return lambda _, arrays: arrays.update({name: shape(arrays[name])})


def with_value(*keys: str, value: Any) -> Change:
    def change(values: dict[str, Any], _: dict[str, Any]) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


def without(*keys: str) -> Change:
    def change(values: dict[str, Any], _: dict[str, Any]) -> None:
        for key in keys[:-1]:
            values = values[key]
        del values[keys[-1]]

    return change


def fewer(_: dict[str, Any], arrays: dict[str, Any]) -> None:
    del arrays["0.k"], arrays["0.v"]


def more(_: dict[str, Any], arrays: dict[str, Any]) -> None:
    arrays |= {"1.k": arrays["0.k"], "1.v": arrays["0.v"]}


DAMAGES: dict[str, Change] = {
    "another version": with_value("version", value=calibration.VERSION + 1),
    "no version": without("version"),
    "a version that is none": with_value("version", value=None),
    "no jobs": without("jobs"),
    "jobs that are none": with_value("jobs", value="x"),
    "endless jobs": with_value("jobs", value=math.inf),
    "no points": without("points"),
    "points that are none": with_value("points", value=[3]),
    "an unknown key of a point": with_value("points", value=[{"way": "read", "color": 1}]),
    "no reading": without("reading"),
    "a reading that is none": with_value("reading", value=[1]),
    "an unknown key of the reading": with_value("reading", "color", value=1),
    "no share": without("reading", "share"),
    "no labels": without("reading", "labels"),
    "a share that is a text": with_value("reading", "share", value="0.3"),
    "a share that is null": with_value("reading", "share", value=None),
    "a share that is true": with_value("reading", "share", value=True),
    "a share above 1": with_value("reading", "share", value=1.5),
    "a share below 0": with_value("reading", "share", value=-0.5),
    "a share that is no number": with_value("reading", "share", value=math.nan),
    "labels that are a text": with_value("reading", "labels", value="no"),
    "nan in K": nan_in("0.k", math.nan),
    "nan in V": nan_in("0.v", math.nan),
    "infinity in V": nan_in("0.v", -math.inf),
    "K has one row": reshaped("0.k", lambda k: k[:1]),
    "K has three rows": reshaped("0.k", lambda k: np.concatenate([k, k[:1]])),
    "V is flat": reshaped("0.v", np.ravel),
    "V is a number": reshaped("0.v", lambda v: v[0, 0]),
    "V is a cube": reshaped("0.v", lambda v: v[..., None]),
    "K is float64": reshaped("0.k", lambda k: k.astype(np.float64)),
    "K is float16": reshaped("0.k", lambda k: k.astype(np.float16)),
    "K is whole numbers": reshaped("0.k", lambda k: k.astype(np.int32)),
    "K is big-endian": reshaped("0.k", lambda k: k.astype(">f4")),
    "K is texts": reshaped("0.k", lambda k: k.astype(str)),
    "no K": lambda _, arrays: arrays.pop("0.k"),
    "no V": lambda _, arrays: arrays.pop("0.v"),
    "no layer": fewer,
    "a layer too many": more,
    "K has other channels": reshaped("0.k", lambda k: k[:, :7].copy()),
    "V has no channels": reshaped("0.v", lambda v: v[:, :0].copy()),
    "K has the channels of two layers": reshaped("0.k", lambda k: np.tile(k, 2)),
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(change, id=name) for name, change in DAMAGES.items()],
)
def test_files_that_say_something_else(small: Model, measured: Measurement, change: Change, tmp_path: Path) -> None:
    """Well-formed, with the checksums of a ZIP file, and not what is written for this model."""
    with np.load(put(small, a_calibration(small))) as file:
        arrays = dict(file)
    values = json.loads(arrays.pop("values").tobytes())
    change(values, arrays)
    path = tmp_path / "changed.npz"
    np.savez(path, values=np.frombuffer(json.dumps(values).encode(), np.uint8), **arrays)
    checked(small, measured, path.read_bytes())


def test_a_whole_file_of_another_version(small: Model, measured: Measurement, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(small, a_calibration(small))
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "VERSION", calibration.VERSION + 1)
        calibration.write(path, a_calibration(small))
    checked(small, measured, path.read_bytes())


@pytest.mark.parametrize(
    "values",
    [
        *(b"", b"null", b"3", b"[]", b"{", b"\xff\xfe", b'{"version": 1e999}', b'{"version": NaN}'),
        b"[" * 100_000,
    ],
    ids=["nothing", "null", "a number", "a list", "cut off", "no text", "endless", "nan", "nested"],
)
def test_values_that_are_none(small: Model, measured: Measurement, values: bytes, tmp_path: Path) -> None:
    path = tmp_path / "changed.npz"
    np.savez(path, values=np.frombuffer(values, np.uint8))
    checked(small, measured, path.read_bytes())


# --- folders that cannot be used ------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made(small: Model, measured: Measurement, cache: Path) -> None:
    """It costs nothing but the keeping. (A mode would not do: whoever runs tests as root may write anywhere.)"""
    cache.write_text("a file")
    for n in (1, 2):
        assert same(calibration_of(small, OPTIONS), measured.result)
        assert measured.times == n
    assert cache.read_text() == "a file"
    cache.unlink()
    cache.mkdir()
    path_of(small).parent.write_text("a file")
    assert same(calibration_of(small, OPTIONS), measured.result)


def test_a_folder_in_the_place_of_the_file(small: Model, measured: Measurement) -> None:
    path = path_of(small)
    path.mkdir(parents=True)
    (path / "content").write_text("x")
    assert same(calibration_of(small, OPTIONS), measured.result)
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


def test_a_full_disk(small: Model, measured: Measurement, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    assert same(calibration_of(small, OPTIONS), measured.result)
    assert list(path_of(small).parent.iterdir()) == []


# --- measuring ------------------------------------------------------------------------------------------------------


def test_a_model_is_measured(small: Model, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, once: with one layer, K and V do not depend on what is before a token, and nothing is corrected."""
    shown: list[tuple[str, float]] = []
    result = calibration_of(small, OPTIONS, report=lambda what, done: shown.append((what, done or 0.0)))
    assert result is not None
    assert {what for what, _ in shown} == {f"trying how {small.name} reads joined caches (once for this model)"}
    fractions = [done for _, done in shown]
    assert fractions == sorted(set(fractions))
    assert fractions[-1] == 1
    assert result.jobs == 16
    by_way = {point.way: point for point in result.points if point.way != "read"}
    assert list(by_way) == ["text", "text, backwards", "join"]
    assert (by_way["text"].kl, by_way["text"].agreement, by_way["text"].again) == (0, 1, 1)
    assert by_way["text, backwards"].kl > 1e-6
    assert by_way["join"].kl > by_way["text, backwards"].kl
    curve = [point for point in result.points if point.way == "read"]
    assert [point.share for point in curve] == list(calibration.SHARES)
    assert all(0 <= point.again <= point.share for point in curve)
    assert [point.again for point in curve] == sorted(point.again for point in curve)
    assert all(point.ttft_ms > 0 for point in result.points)
    # labels are read, so that the synthesizer sees what it sees in the text
    assert all(abs(point.kl) < 1e-6 for point in curve)
    assert (result.reading.share, result.reading.labels, result.reading.auto) == (0, True, True)
    ((k, v),) = result.reading.correction
    for a, b in (k, v):
        assert np.abs(a - 1).max() < 0.01
        assert np.abs(b).max() < 0.01
    monkeypatch.setattr(calibration, "measure", Measurement(None))
    assert same(calibration_of(small, OPTIONS), result)
    assert not small.contexts, "all contexts are closed"


@pytest.mark.parametrize("after", [0, 1, 9, 12])
def test_stopped(small: Model, cache: Path, after: int) -> None:
    """At once, while the correction is fitted, and between the jobs after that."""
    calls = itertools.count()
    assert calibration_of(small, OPTIONS, stopped=lambda: next(calls) >= after) is None
    assert next(calls) == after + 1
    assert not [file for file in cache.rglob("*") if file.is_file()]
    assert not small.contexts


def test_stopped_leaves_an_old_one(small: Model) -> None:
    original = a_calibration(small)
    path = put(small, original)
    assert calibration_of(small, OPTIONS, anew=True, stopped=lambda: True) is None
    assert same(calibration.read(path), original)


@pytest.mark.parametrize("patience", [0.0, 1e-6])
def test_no_patience(small: Model, cache: Path, patience: float) -> None:
    reports: list[float | None] = []
    assert calibration_of(small, OPTIONS, patience=patience, report=lambda _, done: reports.append(done)) is None
    assert len(reports) == 1, "one job tells how long all of them take"
    assert not [file for file in cache.rglob("*") if file.is_file()]
    assert not small.contexts


def test_patience_ends(small: Model, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the jobs after the first one take longer: other programs may have started meanwhile."""
    seconds = [0.0]

    class Slow(Comparison):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            seconds[0] += 100
            super().__init__(*arguments, **options)

    monkeypatch.setattr(calibration, "Comparison", Slow)
    monkeypatch.setattr(calibration, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    assert calibration_of(small, OPTIONS, patience=60) is None
    assert seconds[0] < 1000


def test_models_that_cannot_be_measured(tiny_model: TinyModel, cache: Path) -> None:
    """Too few positions, a chat template that fails, caches that cannot be joined."""
    models = [
        tiny_model(n_layers=1),
        tiny_model(n_layers=1, llama__context_length=64),
        tiny_model(n_layers=1, tokenizer__chat_template="{{ nonsense(", **ENOUGH),
        tiny_model("mamba"),
    ]
    for model in models:
        assert calibration_of(model, OPTIONS) is None, model.arch
        assert not model.contexts
    assert not [file for file in cache.rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    ("more", "share"),
    [
        ([(-1, -2), (-3, -4), (-3, -4), (-3, -4), (-3, -4)], 0),
        ([(1, 2), (1, 2), (-1, -2), (-3, -4), (-3, -4)], 2),
        # nearer on average, by 1, with a standard error of 2; and of 0.5
        ([(-3, 1), (1, -3), (-3, 1), (-1.5, -0.5), (-3, 1)], 3),
        ([(1, 2), (1, 2), (1, 2), (1, 2), (1, 2)], None),
        ([(-3, 1)] * 5, None),
        ([(1, 1), (-1, -1), (1, 1), (-1, -1), (1, 1)], 1),
    ],
)
def test_the_smallest_share_that_is_surely_near_enough(more: list[tuple[float, float]], share: int | None) -> None:
    """As near as text synthesis is to itself with its branches in another order; on two jobs."""

    def of(*kl: float) -> list[calibration._Measures]:
        return [calibration._Measures(again=0, kl=5 + x, kl_first=-x, agreement=1, ttft_ms=1) for x in kl]

    measured = {"text": of(-5, -5), "text, backwards": of(0, 0), "join": of(-4, -4)}
    measured |= {f"read {share}": of(*x) for share, x in zip(calibration.SHARES, more, strict=True)}
    reading = calibration._choose(measured)
    assert reading.share == (1 if share is None else calibration.SHARES[share])
    assert (reading.why == "what this model was found to need") == (share is not None)


def test_built_in_jobs_are_what_runs_are(smollm2: Model) -> None:
    """Labels, outputs and prompt are, token by token, what text synthesis reads."""
    jobs = calibration.built_in_jobs(smollm2)
    assert len(jobs) == 16
    for job in jobs:
        tokens = []
        for label, (_, output) in zip(job.labels, job.branches, strict=True):
            assert output
            tokens += [*label, *output]
        assert tokens + job.labelled == job.pasted
        assert sorted(job.backwards) == sorted(job.pasted)
        assert (job.backwards != job.pasted) == (len(job.branches) > 1)
        assert len(job.prefix) == job.branch_point


# --- the correction -------------------------------------------------------------------------------------------------


def test_lines_by_hand() -> None:
    """Least squares with a drawn towards 1, in batches of any size; a channel without variance is only moved."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((40, 4)).astype(np.float16)
    x[:, 3] = 2.5
    y = (np.array([2, -1, 0, 7]) * x + np.array([1, 0, 3, 0.5]) + 0.25 * rng.standard_normal((40, 4))).astype(
        np.float16
    )
    sums = _Sums(4)
    for part in (slice(0, 1), slice(1, 30), slice(30, 40)):
        sums.add(x[part], y[part])
    a, b = sums.lines()
    for i in range(3):
        # the same as least squares with a tenth of the variance as more data on the line through the mean with a = 1
        centred, wanted = x[:, i].astype(float) - x[:, i].mean(dtype=float), y[:, i].astype(float)
        rows = np.concatenate([centred, math.sqrt(0.1) * centred])
        values = np.concatenate([wanted - wanted.mean(), math.sqrt(0.1) * centred])
        slope = float(np.linalg.lstsq(rows[:, None], values, rcond=None)[0][0])
        assert a[i] == pytest.approx(slope, rel=1e-4)
        assert b[i] == pytest.approx(wanted.mean() - slope * x[:, i].mean(dtype=float), abs=1e-4)
    assert a[3] == 1
    assert b[3] == pytest.approx(y[:, 3].mean(dtype=float) - 2.5, abs=1e-4)
    assert (a.dtype, b.dtype) == (np.float32, np.float32)


def long_job(model: Model) -> Job:
    branches = [
        {"prompt": "Say it.", "text": "The fox ran over the hill. " * n, "name": name}
        for n, name in ((4, "one"), (6, "two"), (5, "three"))
    ]
    return job_of(model, "shared", task="What did it do?", branches=branches, synthesize="Tell.")


class Watched(CorrectionFit):
    """Keeps what it was fitted on: pairs of cells of branches and of the text, of each layer."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.cells: list[tuple[_Cells, _Cells]] = []

    def _add_cells(self, joined: _Cells, wanted: _Cells) -> None:
        self.cells.append((joined, wanted))
        super()._add_cells(joined, wanted)


@pytest.mark.parametrize("arch", ["llama", "smollm3", "gemma3"])
def test_the_correction_is_towards_the_text(tiny_model: TinyModel, arch: str) -> None:
    """Cells are paired by tokens, at one position: in the first layer they are the same."""
    model = tiny_model(arch)
    job = long_job(model)
    fit = Watched(model)
    with fit:
        fit.add(job)
        once = fit.correction()
        fit.add(job)
        twice = fit.correction()
    assert not model.contexts
    n = sum(len(joined[0][0]) for joined, _ in fit.cells[: len(fit.cells) // 2])
    assert n == job.n_output - 4 * len(job.branches), "heads are read again anyway"
    assert len(once) == model.n_layer
    for (k, v), (k_twice, v_twice) in zip(once, twice, strict=True):
        assert k.shape == v.shape == (2, model.n_embd_kv)
        assert np.allclose(k, k_twice, atol=1e-4)
        assert np.allclose(v, v_twice, atol=1e-4)
    for layer, pair in enumerate(once):
        for which in (0, 1):
            x = np.concatenate([joined[layer][which] for joined, _ in fit.cells]).astype(np.float64)
            y = np.concatenate([wanted[layer][which] for _, wanted in fit.cells]).astype(np.float64)
            a, b = pair[which]
            before, after = ((x - y) ** 2).mean(), ((a * x + b - y) ** 2).mean()
            if layer == 0:
                assert before < 1e-5 * (y**2).mean(), "they are other tokens, or at other positions"
            else:
                assert before > 1e-5 * (y**2).mean()
                assert after < before


def test_outputs_that_are_nothing_but_heads(small: Model) -> None:
    branches = [{"prompt": "Go.", "text": text, "name": text} for text in ("a", "abcd")]
    with CorrectionFit(small) as fit:
        fit.add(job_of(small, "shared", task=TASK, branches=branches, synthesize="Go."))
        assert fit.correction() == ()


# --- what a ForkJoin makes of it ------------------------------------------------------------------------------------


@pytest.fixture
def fj(small: Model) -> ForkJoin:
    return ForkJoin(small)  # not closed: the model is everybody's


def counted(monkeypatch: pytest.MonkeyPatch, result: Calibration | None) -> Measurement:
    measurement = Measurement(result)
    monkeypatch.setattr(forkjoin, "calibration_of", measurement)
    return measurement


def test_what_was_measured_is_what_is_read(fj: ForkJoin, small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a ForkJoin, and only where it is needed."""
    original = a_calibration(small)
    measurement = counted(monkeypatch, original)
    assert fj.reading(0).joins_only
    assert ForkJoin(small, read=0).reading().joins_only
    fj.run(TASK, BRANCHES, sampling=GREEDY, mode="text")
    fj.run(TASK, BRANCHES, sampling=GREEDY, read=0)
    fj.fork(TASK, BRANCHES, sampling=GREEDY).close()
    with pytest.raises(InputError):
        fj.run(TASK, [], sampling=GREEDY)
    assert measurement.times == 0
    assert fj.reading() is original.reading
    assert fj.reading("auto") is original.reading
    half = fj.reading(0.5)
    assert (half.share, half.labels, half.auto, half.why) == (0.5, True, False, "as asked for")
    assert half.correction is original.reading.correction
    assert ForkJoin(small, read=0.5).reading() == half
    assert measurement.times == 2, "one for each ForkJoin"


def test_a_model_that_could_not_be_measured(fj: ForkJoin, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is read again, and it is not tried with every run."""
    measurement = counted(monkeypatch, None)
    assert fj.reading() == UNMEASURED
    assert (UNMEASURED.share, UNMEASURED.labels) == (1, True)
    result = fj.run(TASK, BRANCHES, sampling=GREEDY)
    assert (result.tokens.joined, result.tokens.again) == (0, 2 * 12)
    assert "not measured" in result.reading
    assert fj.reading(0.2) == Reading(share=0.2, labels=True, why="as asked for")
    assert measurement.times == 1


def test_a_measurement_that_was_stopped_is_tried_again(
    fj: ForkJoin, small: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurement = counted(monkeypatch, None)
    assert fj.reading(stopped=lambda: True) == UNMEASURED
    measurement.result = a_calibration(small)
    assert fj.reading() is measurement.result.reading
    assert measurement.times == 2


@pytest.mark.parametrize(
    ("n_layers", "channels"), [(0, 0), (1, 7), (1, 0), (2, 32), (1, 64)], ids=lambda number: str(number)
)
def test_the_lines_of_another_model(
    fj: ForkJoin, small: Model, measured: Measurement, n_layers: int, channels: int
) -> None:
    """A file that fits no cell of this model ends as an InputError, or as another measurement: never in a crash."""
    of_channels = np.ones((2, channels), np.float32)
    put(small, a_calibration(small, share=0.1, correction=((of_channels, of_channels),) * n_layers))
    errors = []
    for read in (0.2, 0.3, 1):
        try:
            result = fj.run(TASK, BRANCHES, sampling=GREEDY, read=read)
        except InputError as error:
            errors.append(str(error))
        else:
            assert result.tokens.joined + result.tokens.again == 2 * 12
    assert all("the correction" in error for error in errors), errors
    assert not small.contexts


# --- for people -----------------------------------------------------------------------------------------------------


def test_the_curve_for_people(small: Model) -> None:
    text = Point(way="text", again=1, kl=0, kl_first=0, agreement=1, ttft_ms=200)
    join = Point(way="join", kl=1.2345, kl_first=0.1, agreement=0.5, ttft_ms=9)
    original = a_calibration(small)
    shown = _curve(replace(original, points=(text, *original.points, join)))
    assert "3 built-in jobs" in shown[0]
    columns = [" ".join(line.split()) for line in shown]
    assert columns[1:] == [
        "text 0.000 0.000 100% 200",
        "text, the last branch first 0.500 0.250 75% 100",
        "joined and corrected, 30% read again 0.400 0.200 80% 30",
        "joined, nothing read again 1.234 0.100 50% 9",
        "read again 30%, Zoë's test says so; used from now on",
    ]
    assert len({len(line) for line in shown[1:5]}) == 1, "they are columns"
