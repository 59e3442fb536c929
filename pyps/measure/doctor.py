"""What this machine, this build and a model can do: all of it is tried, and nothing looked up in tables."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import llama_cpp

from pyps.engine import kernels, log
from pyps.engine.context import KV_TYPES, Context, Token
from pyps.engine.find import Progress, no_progress
from pyps.engine.model import Model
from pyps.engine.positions import why_not_joinable
from pyps.engine.tuned import Tuned, allowed_cpus, default_threads, write_tuned
from pyps.errors import InputError, RefusedError
from pyps.forkjoin.calibration import Calibration, calibration_of
from pyps.forkjoin.synthesis import ContextOptions
from pyps.prompts.layout import Layout


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """What pyps can do with a model on this machine.

    Attributes:
        file: The file's name.
        name: The model's own name.
        arch: Its architecture.
        layers: Number of layers.
        trained_positions: Positions that it was trained on.
        joinable: Empty if its caches can be joined; otherwise the reason why not.
        chat: Empty if its chat template can be used; otherwise what is wrong with it.
        kv_types: For each type of K and V: empty, or why the model cannot have it.
        tuned: What suits the model on this machine; None for models that pyps does not run.
        calibration: How near its answers from joined caches are to those from texts, without an adapter; None if that
            could not be measured.
    """

    file: str
    name: str
    arch: str
    layers: int
    trained_positions: int
    joinable: str
    chat: str
    kv_types: dict[str, str]
    tuned: Tuned | None
    calibration: Calibration | None = None


@dataclass(frozen=True, kw_only=True)
class KernelsReport:
    """What computes on the CPU (engine/kernels.py).

    Attributes:
        in_use: The name of pyps's kernels, or "off".
        why_off: Why none of pyps's are used; empty if some are.
        types: For each type of weights: their name, or "llama.cpp" and the reason.
    """

    in_use: str
    why_off: str
    types: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """What this machine and this build can do.

    Attributes:
        llama_cpp_python: The version of llama-cpp-python.
        system: What llama.cpp says of the machine.
        threads: Number of physical cores.
        gpu: Whether llama.cpp was built for a GPU.
        kernels: What computes on the CPU.
        model: The model that was examined, if any.
    """

    llama_cpp_python: str
    system: str
    threads: int
    gpu: bool
    kernels: KernelsReport
    model: ModelReport | None

    def to_json(self) -> str:
        """Return the report as a JSON object."""
        report = asdict(self)
        if self.model and (calibration := self.model.calibration):
            reading = {
                "share": calibration.reading.share,
                "why": calibration.reading.why,
            }  # without its thousands of lines
            report["model"]["calibration"] |= {"reading": reading}
        return json.dumps(report, ensure_ascii=False, indent=2)

    def to_text(self) -> str:
        """Return the report as lines for people."""
        lines = [
            f"llama-cpp-python  {self.llama_cpp_python}, the version pyps was built for",
            f"llama.cpp         {self.system}",
            f"threads           {self.threads} (physical cores)",
            f"GPU               {'yes' if self.gpu else 'no: built for the CPU only'}",
            f"kernels           {self.kernels.in_use}" + (f": {why}" if (why := self.kernels.why_off) else ""),
        ]
        by_kernels: dict[str, list[str]] = {}
        for name, what in self.kernels.types.items():
            by_kernels.setdefault(what, []).append(name)
        lines += [f"  {', '.join(names)}: {what}" for what, names in by_kernels.items()]
        if m := self.model:
            lines += [
                "",
                f"model             {m.file}" + (f" ({m.name})" if m.name else ""),
                f"architecture      {m.arch}, {m.layers} layers, trained on {m.trained_positions:,} positions",
                f"cache mode        {'no: ' + m.joinable if m.joinable else 'yes'}",
                f"chat template     {m.chat or 'yes'}",
            ]
            for name, reason in m.kv_types.items():
                lines.append(f"KV {name:<15}{'no: ' + reason if reason else 'yes'}")
            if m.tuned:
                lines.append(
                    f"fastest here      {m.tuned.threads} threads, {m.tuned.batch:,} tokens at once; used from now on"
                )
            if m.calibration:
                lines += ["", *_curve(m.calibration)]
            elif m.tuned and not m.joinable:
                lines.append("read again        all of it: the built-in jobs to measure it on do not fit this model")
        return "\n".join(lines)


def _curve(calibration: Calibration) -> list[str]:
    """Return lines for people on how near answers from joined caches are to those from texts."""
    lines = [
        f"without an adapter, {calibration.jobs} built-in jobs  KL to text  first token  same token     ms",
    ]
    for p in calibration.points:
        name = f"joined and corrected, {p.share:.0%} read again" if p.way == "read" else _WAYS[p.way]
        lines.append(f"  {name:<40}{p.kl:>10.3f}{p.kl_first:>13.3f}{p.agreement:>12.0%}{p.ttft_ms:>7.0f}")
    return [*lines, f"read again        {calibration.reading.describe()}; used from now on"]


_WAYS = {
    "text": "text",
    "text, backwards": "text, the last branch first",
    "join": "joined, nothing read again",
}


def examine(path: Path | None, report: Progress = no_progress) -> DoctorReport:
    """Examine the machine and the build, and a model if there is one, which takes some seconds.

    Args:
        path: The model's file; None for no model.
        report: Called with what is being tried.

    Raises:
        InputError: The model cannot be loaded, or PYPS_KERNELS is wrong.
    """
    kernels.check()
    with log.captured():
        system = llama_cpp.llama_print_system_info().decode("utf-8", "replace").strip()
    return DoctorReport(
        llama_cpp_python=llama_cpp.__version__,
        system=system,
        threads=default_threads(),
        gpu=bool(llama_cpp.llama_supports_gpu_offload()),
        kernels=_examine_kernels(),
        model=_examine_model(path, report) if path else None,
    )


_FROM_TWO = ("q6_K", "q5_K", "q4_K")  # native/kernels/weights.h

# the types that files of models have
_TYPES = (
    *("q8_0", "q6_K", "q5_K", "q5_1", "q5_0", "q4_K", "q4_1", "q4_0", "iq4_nl"),
    *("q3_K", "q2_K", "iq4_xs", "mxfp4", "bf16", "f16", "f32"),
)


def _examine_kernels() -> KernelsReport:
    ours = kernels.types()
    types = {}
    for name in _TYPES:
        if name not in ours:
            types[name] = f"llama.cpp ({kernels.why_off() or 'pyps has none for it'})"
        elif name in _FROM_TWO:
            types[name] = f"{kernels.in_use()} from two columns on; llama.cpp's own is faster for one"
        else:
            types[name] = kernels.in_use()
    return KernelsReport(in_use=kernels.in_use(), why_off=kernels.why_off(), types=types)


def _examine_model(path: Path, report: Progress) -> ModelReport:
    model = Model.load(path)
    try:
        template = "" if llama_cpp.llama_model_chat_template(model.pointer, None) else "none: ChatML is used"
        try:
            Layout(model, "shared", "A task.", None, "An instruction.")
        except InputError as error:
            template = f"no: {error}"
        kv_types = {}
        for name in KV_TYPES:
            try:
                Context(model, 256, kv_type=name).close()
                kv_types[name] = ""
            except InputError as error:
                kv_types[name] = str(error)
        report("trying what suits this machine", None)
        return ModelReport(
            file=path.name,
            name=model.metadata.get("general.name", ""),
            arch=model.arch,
            layers=model.n_layer,
            trained_positions=model.n_ctx_train,
            joinable=why_not_joinable(model),
            chat=template,
            kv_types=kv_types,
            tuned=_tune(model),
            calibration=_calibrate(model, report),
        )
    finally:
        model.close()


def _calibrate(model: Model, report: Progress) -> Calibration | None:
    """Measure a model anew, however long it takes, where its caches can be joined and the built-in jobs fit it."""
    if why_not_joinable(model):
        return None
    return calibration_of(model, ContextOptions(), report=report, anew=True)


_SURELY = 0.95  # of the default's time: what is not faster by this much may be noise
_PROMPT, _ANSWER, _LONG = 32, 8, 512  # tokens
_PATIENCE = 10.0  # seconds: a long prompt that would take longer is not tried


def _tune(model: Model) -> Tuned | None:
    """Try numbers of threads on a short prompt and a short answer, and batch sizes on a long prompt."""
    try:
        model.check_generates()
        with Context(model, 256) as ctx:
            ctx.warm_up()
    except (InputError, RefusedError):
        return None
    physical, logical = default_threads(), len(allowed_cpus())
    threads = _fastest(physical, {max(physical // 2, 1), physical, logical}, lambda n: _time_short(model, n))
    batch = 512
    with Context(model, _PROMPT, threads=threads) as ctx:
        began = time.perf_counter()
        ctx.prefill(0, [0] * _PROMPT)
        ctx.synchronize()
        expected = (time.perf_counter() - began) * _LONG / _PROMPT
    if expected < _PATIENCE:
        batch = _fastest(batch, {256, 512}, lambda n: _time_long(model, threads, n))
    fastest = Tuned(threads, batch)
    write_tuned(model, fastest)
    return fastest


def _fastest(default: int, candidates: set[int], seconds: Callable[[int], float]) -> int:
    """Return the default, unless another candidate is surely faster: all are tried in turn, three times."""
    times: dict[int, list[float]] = {n: [] for n in candidates}
    for _ in range(3):
        for n in times:
            times[n].append(seconds(n))
    best = min(times, key=lambda n: median(times[n]))
    return best if median(times[best]) < _SURELY * median(times[default]) else default


def _time_short(model: Model, threads: int) -> float:
    with Context(model, _PROMPT + _ANSWER, threads=threads) as ctx:
        ctx.warm_up()
        began = time.perf_counter()
        ctx.prefill(0, [0] * _PROMPT)
        for i in range(_ANSWER):
            ctx.decode([Token(0, _PROMPT + i, 0, logits=True)])
        ctx.synchronize()
        return time.perf_counter() - began


def _time_long(model: Model, threads: int, batch: int) -> float:
    with Context(model, _LONG, threads=threads, n_batch=batch) as ctx:
        ctx.warm_up()
        began = time.perf_counter()
        ctx.prefill(0, [0] * _LONG)
        ctx.synchronize()
        return time.perf_counter() - began
