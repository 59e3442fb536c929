"""Shared models. The default model is prepared once, in the user's cache, as `pyps run` would do."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import write_model

from pyps.model import Model
from pyps.models import find_model


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return find_model("smollm2")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Iterator[Model]:
    model = Model.load(smollm2_path)
    yield model
    model.close()


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Iterator[Model]:
    model = Model.load(tiny_path)
    yield model
    model.close()
