"""What the pages in docs/ say can be typed is typed here."""

import re
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pyps.workflow import Step, read_workflow

DOCS = Path(__file__).parent.parent / "docs"
# the others' commands measure or train for long, or need what is not there; their tests are their own
PAGES = ("run", "workflows")
TEXTS = {page: (DOCS / f"{page}.md").read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [(page, *b) for page, text in TEXTS.items() for b in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)]
LIMIT = " --max-tokens 16 --temperature 0"


@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str, tmp_path: Path) -> None:
    """One after the other, in one folder: later ones use what earlier ones wrote."""
    found = [text for p, language, text in BLOCKS if p == page and language == "sh"]
    assert found
    for line in "".join(found).splitlines():
        line = line.replace("pyps ", f"{shlex.quote(sys.executable)} -m pyps.cli ", 1)
        if " run " in line and "--list" not in line:
            line += LIMIT
        done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.parametrize(("page", "program"), [(p, text) for p, language, text in BLOCKS if language == "python"])
def test_programs(page: str, program: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_workflow(tmp_path: Path) -> None:
    whole, part = (text for p, language, text in BLOCKS if p == "workflows" and language == "yaml")
    sqlite3.connect(tmp_path / "shop.sqlite").execute("CREATE TABLE orders (id)").connection.close()
    for text in (whole, f"steps:\n- name: a\n  task: Look.\n  {part.strip().replace(chr(10), chr(10) + '  ')}\n"):
        (tmp_path / "w.yaml").write_text(text)
        command = [sys.executable, "-m", "pyps.cli", "run", "w.yaml", *LIMIT.split()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr


def test_every_key_of_a_workflow_is_on_its_page() -> None:
    page = (DOCS / "workflows.md").read_text(encoding="utf-8")
    for name, field in Step.model_fields.items():
        assert f"`{field.alias or name}`" in page


def test_examples_are_described() -> None:
    for path in (DOCS.parent / "examples").glob("*.yaml"):
        assert read_workflow(path).description


def test_links_to_files() -> None:
    for page in DOCS.glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (DOCS / link).exists(), (page, link)
