"""Shared models. The default model is prepared once, in the user's cache, as `pyps run` would do."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
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
        "largest",
        "KL",
        "bound",
    ]
    lines = [
        "# Exactness",
        "",
        "Written by `make exact` (tests/test_oracle.py): the runtime against an independent PyTorch computation of",
        "the method, on random-weight models and, as smollm2, on the default model with its weights in F32. Each row",
        "has the worst of all combinations of unified cache or streams, prefix or none, equal or unequal branches,",
        "mapper or none (a quarter of them for smollm2), over nine tokens of a prompt and twenty of an answer: root",
        "mean square of the logits' errors, the largest of them, and mean KL divergence in nats. `cache` is the type",
        "of K and V, or of K/V. The bounds are twice the error, and four times the KL, of the worst of eight sequences",
        "in the same kind of cache without any join, read in batches of the same sizes; and 1e-5. (gemma3 is 1e-4 off",
        "in f32, with a join and without: llama.cpp looks its GELU up in a table of half-precision numbers.)",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    for key, records in groups.items():
        found, plain = [r[1] for r in records], records[0][2]
        values = (
            max(d.rms for d in found),
            2 * plain.rms + 1e-5,
            max(d.worst for d in found),
            max(d.kl for d in found),
            4 * plain.kl + 1e-10,
        )
        numbers = [f"{x:.1e}" for x in values]
        lines.append(f"| {' | '.join([*key, str(len(records)), *numbers])} |")
    return "\n".join([*lines, "", f"{len(_records)} combinations.", ""])
