"""Shared models. The default model is prepared once, in the user's cache, as `pyps run` would do."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.exactness import Record, write_pages
from support.tiny import TinyModel, write_model

from pyps.engine import kernels
from pyps.engine.find import find_model
from pyps.engine.model import Model

_RECORDS = pytest.StashKey[list[Record]]()


@pytest.fixture
def kernels_off() -> Iterator[None]:
    """llama.cpp's own kernels, as on a CPU for which there are none of ours."""
    in_use = kernels.in_use()
    kernels.use(kernels.OFF)
    yield
    kernels.use(in_use)


@pytest.fixture(params=["ours", "off"])
def either_kernels(request: pytest.FixtureRequest) -> None:
    """Our kernels and llama.cpp's own: with those a context has no flash attention, and V lies transposed in it."""
    if request.param == "off":
        request.getfixturevalue("kernels_off")


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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """Models of any architecture: `tiny_model("gemma3", n_layers=7)`, with what write_model takes.

    The same words give the same model, which is written and loaded once and closed after the last test.
    """
    folder = tmp_path_factory.mktemp("tiny")
    models: dict[str, Model] = {}
    with ExitStack() as stack:

        def load(arch: str = "llama", **changes: Any) -> Model:
            key = repr((arch, sorted(changes.items())))
            if key not in models:
                models[key] = Model.load(write_model(folder / f"{len(models)}.gguf", arch, **changes))
                stack.callback(models[key].close)
            return models[key]

        yield load


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-exactness", action="store_true", help="write docs/exactness.md from test_oracle.py")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = []


@pytest.fixture(scope="session")
def exactness(pytestconfig: pytest.Config) -> list[Record]:
    """What test_oracle.py measured of every combination that was run."""
    return pytestconfig.stash[_RECORDS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    records = config.stash[_RECORDS]
    if not records:
        return
    terminalreporter.write_line(f"{len(records)} combinations compared with the oracle")
    if config.getoption("--write-exactness"):
        docs = Path(__file__).parent.parent / "docs"
        write_pages(records, docs)
        terminalreporter.write_line(f"wrote exactness.md and exactness.csv in {docs}")
