"""Shared models. The default model is prepared once, in the user's cache, as `pyps run` would do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.exactness import Record, write_pages
from support.tiny import write_model

from pyps.engine.find import find_model
from pyps.engine.model import Model


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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-exactness", action="store_true", help="write docs/exactness.md from test_oracle.py")


_records: list[Any] = []


@pytest.fixture(scope="session")
def exactness() -> list[Any]:
    """(case, its distance from the oracle, the distance without a join) of every combination that was run."""
    return _records


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _records:
        return
    terminalreporter.write_line(f"{len(_records)} combinations compared with the oracle")
    if config.getoption("--write-exactness"):
        docs = Path(__file__).parent.parent / "docs"
        write_pages((Record(c.model, c.kv_type, c.flash_attn, c.lora, *distances) for c, *distances in _records), docs)
        terminalreporter.write_line(f"wrote exactness.md and exactness.csv in {docs}")
