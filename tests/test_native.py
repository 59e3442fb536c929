"""The extension and llama_cpp must be of one version, or nothing runs."""

import importlib

import llama_cpp
import pytest

from pyps.engine import native


def test_versions_agree() -> None:
    assert native.llama_cpp_version == llama_cpp.__version__


def test_another_version_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "__version__", "0.3.99")
    with pytest.raises(ImportError, match=r"pyps was built for llama-cpp-python 0\.3\.36, but 0\.3\.99 is installed"):
        importlib.reload(native)
