"""The README's commands and programs run, and what it names is there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
PROGRAMS = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    shlex.split(line)
    for language, text in BLOCKS
    if language == "sh"
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("pyps ")
]


def test_there_is_something_to_run() -> None:
    assert len(PROGRAMS) == 2
    assert len(COMMANDS) == 3


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program: str) -> None:
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c)[:40])
def test_commands(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("The meeting is on Tuesday at ten. Anna brings the plans.")
    arguments = [sys.executable, "-m", "pyps.cli", *command[1:], "--max-tokens", "32"]
    process = subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([\w-]+)", README) + re.findall(r"`make ([\w-]+)", contributing)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_to_files() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md"):
        for link in re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            assert link.startswith("https://") or (ROOT / link.partition("#")[0]).exists(), (name, link)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130


def test_no_stray_environment() -> None:
    """What the README says about variables is what the code reads."""
    sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "pyps").rglob("*.py"))
    variables = set(re.findall(r"PYPS_[A-Z]+", sources))
    assert variables
    assert variables == set(re.findall(r"PYPS_[A-Z]+", README))
    assert os.environ.get("PYPS_LOG") is None
