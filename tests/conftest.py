"""Shared models. The default model is prepared once, in the user's cache, as `pyps run` would do."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-exactness", action="store_true", help="write docs/exactness.md from test_oracle.py")


_records: list[Any] = []


@pytest.fixture(scope="session")
def exactness() -> list[Any]:
    """(case, logit error, logit error without a join, KL, KL without a join) of every combination that was run."""
    return _records


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _records:
        return
    terminalreporter.write_line(f"{len(_records)} combinations compared with the oracle")
    if config.getoption("--write-exactness"):
        path = Path(__file__).parent.parent / "docs" / "exactness.md"
        path.write_text(_table(), encoding="utf-8")
        terminalreporter.write_line(f"wrote {path}")


def _table() -> str:
    groups: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    for record in _records:
        case = record[0]
        key = (case.model, case.kv_type, "on" if case.flash_attn else "off", "on" if case.lora else "off")
        groups[key].append(record)
    head = [
        "model",
        "cache",
        "flash attention",
        "LoRA",
        "combinations",
        "logit error",
        "bound",
        "KL",
        "KL without a join",
    ]
    lines = [
        "# Exactness",
        "",
        "Written by `make exact` (tests/test_oracle.py): the runtime against an independent PyTorch computation of",
        "the method, on random-weight models. Each row has the worst of all combinations of unified cache or streams,",
        "prefix or none, equal or unequal branches, mapper or none. The bound is twice the logit error that the same",
        "cache type shows without any join, in batches of the same sizes, and 1e-5.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    for key, records in groups.items():
        error, divergence = max(r[1] for r in records), max(r[3] for r in records)
        numbers = [f"{x:.1e}" for x in (error, 2 * records[0][2] + 1e-5, divergence, records[0][4])]
        lines.append(f"| {' | '.join([*key, str(len(records)), *numbers])} |")
    return "\n".join([*lines, "", f"{len(_records)} combinations.", ""])
