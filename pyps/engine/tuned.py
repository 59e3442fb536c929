"""How many threads and which batch size suit a model on this machine.

`pyps doctor MODEL` measures it (measure/doctor.py) and writes the result here; every context uses it from then on.
"""

import contextlib
import hashlib
import json
import os
import platform
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_cpp

from pyps.engine import kernels
from pyps.engine.find import cache_dir
from pyps.engine.model import Model
from pyps.files import whole


@dataclass(frozen=True)
class Tuned:
    """The settings that suit a model on a machine.

    Attributes:
        threads: How many threads compute.
        batch: How many tokens of a prompt are computed at once.
    """

    threads: int
    batch: int


def default_threads() -> int:
    """Count the physical cores that this process may use: two threads on one core slow llama.cpp down."""
    cores = set()
    for cpu in allowed_cpus():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def allowed_cpus() -> set[int]:
    """Return the numbers of the CPUs that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not a PC
        return platform.processor() or platform.machine()


_tuned: "weakref.WeakKeyDictionary[Model, Tuned]" = weakref.WeakKeyDictionary()


def tuned(model: Model) -> Tuned:
    """Return what suits this model on this machine, read from disk once for each model that is open.

    It is what `pyps doctor` has measured, or else the number of physical cores and batches of 512 tokens.
    """
    if model not in _tuned:
        _tuned[model] = _read_tuned(model)
    return _tuned[model]


def _read_tuned(model: Model) -> Tuned:
    try:
        values = json.loads(_path(model).read_text())
        settings = Tuned(int(values["threads"]), int(values["batch"]))
        if 1 <= settings.threads <= 512 and 1 <= settings.batch <= 2**16:
            return settings
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not measured yet, or not a file of ours
    return Tuned(default_threads(), 512)


def write_tuned(model: Model, settings: Tuned) -> None:
    """Keep settings for `tuned`. If the cache cannot be written to, nothing is kept."""
    path = _path(model)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            partial.write_text(json.dumps(asdict(settings)))


def _path(model: Model) -> Path:
    description = model.metadata.get("general.file_type"), model.n_layer, model.n_embd, model.n_vocab, model.arch
    build = llama_cpp.__version__, llama_cpp.llama_supports_gpu_offload(), kernels.in_use()
    machine = cpu_name(), sorted(allowed_cpus()), *build
    return cache_dir() / "tuned" / f"{hashlib.sha256(repr((description, machine)).encode()).hexdigest()[:32]}.json"
