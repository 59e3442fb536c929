"""What the pages in docs/ say can be typed is typed here."""

import os
import re
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import write_adapter, write_model
from test_convert import save, trained

from pyps.convert.gguf import to_gguf
from pyps.engine.find import find_model
from pyps.workflow import Step, read_workflow

DOCS = Path(__file__).parent.parent / "docs"
# page -> what makes its commands short. Those of train.md are run by test_train.py, those of convert.md below
PAGES = {
    "run": " --max-tokens 16 --temperature 0",
    "workflows": " --max-tokens 16 --temperature 0",
    "slots": " --max-tokens 16 --temperature 0",
    "data": "",
    "doctor": "",
    "eval": " --limit 1 --max-tokens 8",
    "bench": " --branches 2 --tokens 8 --prompt 4 --task 4 --repeat 1",
}
TEXTS = {page: (DOCS / f"{page}.md").read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [(page, *b) for page, text in TEXTS.items() for b in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str, tmp_path: Path) -> None:
    """One after the other, in one folder: later ones use what earlier ones wrote."""
    tiny = write_model(tmp_path / "model.gguf")
    write_adapter(tmp_path / "adapter.gguf")
    (tmp_path / "my-examples.jsonl").write_text('{"task": "Why?", "branches": [{"text": "So."}, {"text": "No."}]}\n')
    # what doctor measures now, while other things run, is not for keeps
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").symlink_to(find_model("smollm2").parent)
    environment = os.environ | ({"PYPS_CACHE": str(tmp_path / "cache")} if page == "doctor" else {})
    found = [text for p, language, text in BLOCKS if p == page and language == "sh"]
    assert found
    for line in "".join(found).splitlines():
        line = line.replace("pyps ", f"{shlex.quote(sys.executable)} -m pyps.cli ", 1)
        line = re.sub(r" {2,}#.*", "", line).replace("--shape 1b", f"--model {tiny}")  # that one needs a gigabyte
        command = page if page in ("eval", "bench") else "run"
        if f"pyps.cli {command} " in f"{line} " and "--list" not in line:
            line += PAGES[page]
        done = subprocess.run(
            line, shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() or line.startswith("echo")


def test_conversions(tmp_path: Path) -> None:
    """Each in a folder of its own, on a small model of the architecture."""
    text = (DOCS / "convert.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 3
    for i, command in enumerate(commands):
        folder = tmp_path / str(i)
        folder.mkdir()
        path, synthesis = trained(folder, "qwen3")
        for name in ("qwen3-14b-q4_k_m.gguf", "base.gguf"):
            (folder / name).symlink_to(path)
        for name in set(re.findall(r"step-\d+|checkpoint(?= --base)", command)):
            save(folder / name, synthesis)
        if "convert adapter.gguf" in command:
            to_gguf([save(folder / "c", synthesis)], folder / "adapter.gguf", path, layout="paper", type="f16")
        arguments = [sys.executable, "-m", "pyps.cli", *shlex.split(command)[1:]]
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=folder, timeout=300)
        assert done.returncode == 0, done.stderr


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
        command = [sys.executable, "-m", "pyps.cli", "run", "w.yaml", *PAGES["workflows"].split()]
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
