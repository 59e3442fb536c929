"""What the pages in docs/ say can be typed is typed here; what they list is there; and the site can be built."""

import os
import re
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.tiny import write_adapter, write_model
from test_convert import save, trained

import pyps
import pyps.engine
from pyps.convert.gguf import to_gguf
from pyps.engine.find import find_model
from pyps.workflow import Step, read_workflow

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# page -> what makes its commands short
PAGES = {
    "run": " --max-tokens 16 --temperature 0",
    "workflows": " --max-tokens 16 --temperature 0",
    "slots": " --max-tokens 16 --temperature 0",
    "data": "",
    "doctor": "",
    "reading": " --max-tokens 8 --temperature 0",
    "eval": " --limit 1 --max-tokens 8",
    "bench": " --branches 2 --tokens 8 --prompt 4 --task 4 --repeat 1",
    "kernels": " --branches 2 --tokens 8 --prompt 4 --task 4 --repeat 1",
}
# test_train.py runs train.md, test_conversions runs convert.md; install.md would need a build
OTHER_PAGES = {"train", "convert", "install"}
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
BLOCKS = [(page, *b) for page, text in TEXTS.items() for b in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)]


def sources(*folders: str) -> dict[str, str]:
    """The texts of the repository's files under these folders, or of all of them; those that git ignores are none."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *folders]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = {}
    for name in listing.split("\0"):
        path = ROOT / name
        if path.is_file() and path.suffix not in (".gguf", ".png", ".svg"):
            texts[name] = path.read_text(encoding="utf-8")
    return texts


def headings(page: str) -> list[str]:
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def anchors(page: str) -> set[str]:
    """As mkdocs makes them of headings."""
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings(page)}


def test_pages_with_commands_are_executed() -> None:
    assert {page for page, language, _ in BLOCKS if language == "sh"} == PAGES.keys() | OTHER_PAGES


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
    commands = "".join(text for p, language, text in BLOCKS if p == page and language == "sh")
    for line in commands.splitlines():
        line = line.replace("pyps ", f"{shlex.quote(sys.executable)} -m pyps.cli ", 1)
        line = re.sub(r" {2,}#.*", "", line).replace("--shape 1b", f"--model {tiny}")  # that one needs a gigabyte
        shortened = {"eval": "eval", "bench": "bench", "kernels": "bench"}.get(page, "run")
        if f"pyps.cli {shortened} " in f"{line} " and "--list" not in line:
            line += PAGES[page]
        process = subprocess.run(
            line, shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment
        )
        assert process.returncode == 0, process.stderr
        assert process.stdout.strip() or line.startswith("echo")


def test_conversions(tmp_path: Path) -> None:
    """Each in a folder of its own, on a small model of the architecture."""
    blocks = [text for page, language, text in BLOCKS if (page, language) == ("convert", "sh")]
    commands = [line for block in blocks for line in block.splitlines()]
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
        process = subprocess.run(arguments, capture_output=True, text=True, cwd=folder, timeout=300)
        assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(("page", "program"), [(p, text) for p, language, text in BLOCKS if language == "python"])
def test_programs(page: str, program: str, tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip()


def test_workflow(tmp_path: Path) -> None:
    whole, part = (text for p, language, text in BLOCKS if p == "workflows" and language == "yaml")
    sqlite3.connect(tmp_path / "shop.sqlite").execute("CREATE TABLE orders (id)").connection.close()
    for text in (whole, f"steps:\n- name: a\n  task: Look.\n  {part.strip().replace(chr(10), chr(10) + '  ')}\n"):
        (tmp_path / "w.yaml").write_text(text)
        command = [sys.executable, "-m", "pyps.cli", "run", "w.yaml", *PAGES["workflows"].split()]
        process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert process.returncode == 0, process.stderr


def test_every_key_of_a_workflow_is_on_its_page() -> None:
    for name, field in Step.model_fields.items():
        assert f"`{field.alias or name}`" in TEXTS["workflows"]


def test_workflows_that_come_with_pyps_are_described() -> None:
    paths = list((ROOT / "workflows").glob("*.yaml"))
    assert paths
    for path in paths:
        assert read_workflow(path).description


def test_the_site_builds(tmp_path: Path) -> None:
    """With every link checked, and without anything that a browser would fetch from elsewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    for path in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=[\"']?(https?:[^\"'>]*)", path.read_text())
        assert not fetched, path


def test_the_page_of_the_command_line_is_what_help_prints() -> None:
    command = [sys.executable, "-m", "cogapp", "--check", "-I", "tools", "docs/cli.md"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, "docs/cli.md is not what --help prints: make docs"


@pytest.mark.parametrize(("module", "page"), [(pyps, "python"), (pyps.engine, "engine")], ids=["pyps", "engine"])
def test_every_public_name_is_on_a_page(module: ModuleType, page: str) -> None:
    """Names of both modules are on the page of pyps; a union of types cannot be rendered, and is named in the text."""
    names = set(module.__all__)
    if module is pyps.engine:
        names -= set(pyps.__all__)
    named = set(re.findall(rf"^::: {re.escape(module.__name__)}\.(\w+)$", TEXTS[page], re.MULTILINE))
    missing = "\n".join(f"::: {module.__name__}.{name}" for name in sorted(names - named - {"Event"}))
    assert not missing, f"docs/{page}.md lacks\n{missing}"
    assert not named - names


def test_the_architecture_lists_every_file() -> None:
    """The list under "Files": a folder at the left, and its files under it, each with what it is for."""
    section = TEXTS["architecture"].split("## Files")[1]
    listing = re.findall(r"```text\n(.*?)```", section, re.DOTALL)[0]
    listed: set[str] = set()
    folder = ""
    for line in listing.splitlines():
        name, _, purpose = line.strip().partition(" ")
        assert purpose.strip(), f"{name}: say what it is for"
        if not line.startswith(" "):
            folder = name
        listed.add(name if folder == name else folder + name)
    files = {
        name
        for name in sources("native", "pyps", "convert")
        if Path(name).name not in ("__init__.py", "__main__.py", "py.typed", ".clang-format")
    }
    actual = files | {f"{Path(name).parent}/" for name in files} | {"pyps/convert/"}
    assert not actual - listed, "docs/architecture.md lacks\n" + "\n".join(sorted(actual - listed))
    assert not listed - actual, "docs/architecture.md has too much\n" + "\n".join(sorted(listed - actual))


def test_what_the_code_cites_exists() -> None:
    """Pages, their numbered sections ("docs/method.md, section 2"), and anchors."""
    code = sources("pyps", "convert", "native", "tests", "tools", "benchmarks", "Makefile", "CMakeLists.txt")
    del code["tests/test_docs.py"]
    for file, text in code.items():
        for page, anchor in re.findall(r"docs/(\w+)\.md(?:#([\w-]+))?", text):
            assert page in TEXTS, f"{file} cites docs/{page}.md"
            assert not anchor or anchor in anchors(page), f"{file} cites docs/{page}.md#{anchor}"
        for page, first, last in re.findall(
            r"docs/(\w+)\.md,\s+(?:[#/*]+\s+)?sections?\s+(\d+)(?:\s+(?:to|and)\s+(\d+))?", text
        ):
            for number in filter(None, (first, last)):
                assert any(h.startswith(f"{number}. ") for h in headings(page)), f"{file} cites {page}.md, {number}"


def test_pip_is_never_told_to_install_another_project() -> None:
    """`pyps` on PyPI is not ours: what pip gets is pyps-llama, or a path."""
    command = re.compile(r"\bpip3?\s+(?:install|download|wheel)\b[^\n`);]*[\s'\"]pyps(?![\w/.-])")
    requirement = re.compile(r"(?<![\w.-])pyps\[[\w{]")
    texts = sources()
    assert 'name = "pyps-llama"' in texts["pyproject.toml"]
    wrong = {file: command.findall(text) + requirement.findall(text) for file, text in texts.items()}
    assert not {file: places for file, places in wrong.items() if places}


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "models/README.md", *TEXTS])
def test_prose_has_120_columns(file: str) -> None:
    """Tables, programs and pictures aside."""
    path = ROOT / file if file.endswith(".md") else DOCS / f"{file}.md"
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for line in text.splitlines():
        assert len(line) <= 120 or line.startswith(("|", "![")), line


def test_links_to_files() -> None:
    for page, text in TEXTS.items():
        for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([\w-]+))?\)", text):
            assert link.startswith("https://") or not link or (DOCS / link).exists(), (page, link)
            target = link.removesuffix(".md") or page
            assert not anchor or anchor in anchors(target), (page, link, anchor)


def test_the_way_of_a_span_is_true() -> None:
    """CONTRIBUTING.md names the lines that lead from ForkJoin.run to the graph: they are there, six at most."""
    text = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    stops = re.findall(r"^\| \d\. [^|]+ \| (\S+):(\d+) \| `(.+)` \|$", text, re.MULTILINE)
    assert 1 < len(stops) <= 6
    for path, number, line in stops:
        lines = (DOCS.parent / path).read_text(encoding="utf-8").splitlines()
        assert lines[int(number) - 1].strip() == line
