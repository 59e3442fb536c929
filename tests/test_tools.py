"""Tools do what they are for, and nothing else."""

import math
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import pytest
from mcp import MCPError

from pyps import InputError, Sampling, Tool, calculator, file_tools, sql_tools, tool
from pyps.agents.mcp_client import McpServer


def named(tools: list[Tool], name: str) -> Tool:
    return next(t for t in tools if t.name == name)


def test_a_function_with_type_hints() -> None:
    @tool
    def weather(city: str, unit: Literal["C", "F"] = "C", days: int = 1) -> str:
        """The weather
        of a city."""
        return f"{city} {unit} {days + 1}"

    assert (weather.name, weather.description) == ("weather", "The weather of a city.")
    assert weather.signature == "weather(city, unit, days) - The weather of a city."
    assert weather.parameters["required"] == ["city"]
    assert weather.call(city="Oslo", days="2") == "Oslo C 3", "arguments are checked, and made what they should be"
    for wrong in ({}, {"city": "Oslo", "unit": "K"}, {"city": "Oslo", "days": "x"}):
        with pytest.raises(ValueError, match="weather"):
            weather.call(**wrong)


def test_functions_that_are_no_tools() -> None:
    def unknown(x) -> str:  # type: ignore[no-untyped-def]
        return ""

    def many(*x: str) -> str:
        return ""

    def strange(x: math) -> str:  # type: ignore[valid-type]
        return ""

    def answer(x: str) -> str:
        return ""

    for function, message in (
        (unknown, "type hint"),
        (many, "ordinary"),
        (strange, "JSON"),
        (answer, "named 'answer'"),
    ):
        with pytest.raises(InputError, match=message):
            tool(function)


@pytest.mark.parametrize(
    ("expression", "value"),
    [("17 * (3 + 4)", "119"), ("-2 ** 2", "-4"), ("sqrt(2)", str(math.sqrt(2))), ("max(1, 2.5)", "2.5"),
     ("7 / 2", "3.5"), ("7 // 2", "3"), ("10 % 4", "2"), ("pi", str(math.pi))],
)  # fmt: skip
def test_calculator(expression: str, value: str) -> None:
    assert calculator.call(expression=expression) == value


@pytest.mark.parametrize(
    "evil",
    ["__import__('os')", "9 ** 9 ** 9", "(1).__class__", "[1] * 9", "'a' * 9", "1 if 2 else 3", "1 /", "1 / 0", "", "x",
     "(" * 500 + "1" + ")" * 500, "lambda: 1", "9" * 1001, "sqrt(-1)", "log(x=1)", "1e999 - 1e999 // 0"],
)  # fmt: skip
def test_the_calculator_only_calculates(evil: str) -> None:
    with pytest.raises((ValueError, ArithmeticError, SyntaxError, MemoryError, RecursionError)):
        calculator.call(expression=evil)


def test_files_under_a_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("one\nTwo\n")
    (root / "sub" / "b.txt").write_text("two times\n")
    (tmp_path / "secret.txt").write_text("two secrets\n")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    (root / "up").symlink_to(tmp_path)
    tools = file_tools(root)
    assert named(tools, "list_files").call() == "a.txt\nsub/b.txt"
    assert named(tools, "list_files").call(folder="sub") == "sub/b.txt"
    assert named(tools, "read_file").call(path="a.txt") == "one\nTwo\n"
    assert named(tools, "search_files").call(text="two") == "a.txt:2: Two\nsub/b.txt:1: two times"
    for path in ("../secret.txt", "link.txt", "up/secret.txt", str(tmp_path / "secret.txt"), "sub/../../secret.txt"):
        with pytest.raises(ValueError, match="outside"):
            named(tools, "read_file").call(path=path)
    with pytest.raises(ValueError, match="outside"):
        named(tools, "list_files").call(folder="..")
    with pytest.raises(ValueError, match="outside"):
        named(tools, "search_files").call(text="two", folder="up")
    with pytest.raises(InputError, match="no folder"):
        file_tools(tmp_path / "nowhere")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "x.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE people (name TEXT, age INTEGER)")
        connection.executemany("INSERT INTO people VALUES (?, ?)", [("Anna", 30), ("Bo", None)])
    connection.close()
    return path


def test_sql_reads(database: Path) -> None:
    tools = sql_tools(database)
    assert named(tools, "sql").call(query="SELECT * FROM people ORDER BY name") == "name | age\nAnna | 30\nBo | "
    assert (
        named(tools, "sql").description
        == "The rows of a SELECT. The database: CREATE TABLE people (name TEXT, age INTEGER)"
    )
    assert "CREATE TABLE people" in named(tools, "tables").call()
    assert named(tools, "sql").call(query="WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n LIMIT 200) "
                                    "SELECT i FROM n").endswith("\n…")  # fmt: skip


@pytest.mark.parametrize(
    "evil",
    ["DELETE FROM people", "DROP TABLE people", "INSERT INTO people VALUES ('x', 1)", "UPDATE people SET age = 1",
     "CREATE TABLE x (y)", "ATTACH 'y.sqlite' AS y", "PRAGMA journal_mode = WAL", "VACUUM INTO 'copy.sqlite'",
     "SELECT load_extension('x')", "SELECT 1; DROP TABLE people", "BEGIN", "nonsense", "SELECT writefile('x', 'y')",
     "CREATE TEMP TABLE t (x)"],
)  # fmt: skip
def test_sql_does_not_write(database: Path, evil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(database.parent)
    before = database.read_bytes()
    with pytest.raises((sqlite3.Error, sqlite3.Warning)):
        named(sql_tools(database), "sql").call(query=evil)
    assert database.read_bytes() == before
    assert list(database.parent.iterdir()) == [database]


def test_sql_without_end(database: Path) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT count(*) FROM n"
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        named(sql_tools(database, seconds=0.2), "sql").call(query=endless)


def test_no_database(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("This is a text, which is not a database, however long it may be." * 20)
    for path in (tmp_path / "x", tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match="database"):
            sql_tools(path)


SERVER = """
from mcp.server import MCPServer
server = MCPServer("test")

@server.tool()
def add(a: int, b: int) -> str:
    "The sum."
    return str(a + b)

@server.tool()
def fail() -> str:
    "Nothing."
    raise ValueError("out of order")

@server.tool()
def die() -> str:
    "The end."
    import os
    os._exit(1)

@server.tool()
def hang() -> str:
    "No end."
    import time
    time.sleep(1000)

server.run()
"""


def test_an_mcp_server(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    with McpServer([sys.executable, "server.py"], tmp_path) as server:
        assert named(list(server.tools), "add").call(a=2, b=3) == "5"
        assert named(list(server.tools), "add").description == "The sum."
        with pytest.raises(RuntimeError, match="fail"):
            named(list(server.tools), "fail").call()
    for command in (["/nowhere/at/all"], [sys.executable, "-c", "print('no')"]):
        with pytest.raises(InputError, match="cannot be used"):
            McpServer(command)


def test_an_mcp_server_that_dies(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    with McpServer([sys.executable, "server.py"], tmp_path) as server:
        for name in ("die", "add"):
            with pytest.raises(MCPError, match="closed"):
                named(list(server.tools), name).call()


# a server that notes its process number, and does not mind when its input ends or when it is asked to stop
DEAF = "import os, signal, time; open('pid', 'w').write(str(os.getpid())); signal.signal(15, lambda *_: None)\n"


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_mcp_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyps.agents.mcp_client._START_SECONDS", 2)
    threads = threading.active_count()
    with pytest.raises(InputError, match="does not answer"):
        McpServer([sys.executable, "-c", DEAF + "time.sleep(1000)"], tmp_path)
    assert not is_running(int((tmp_path / "pid").read_text()))
    assert threading.active_count() == threads


def test_an_mcp_server_is_stopped_while_it_works(tmp_path: Path) -> None:
    """A call that was given up is over with the server, and its thread."""
    (tmp_path / "server.py").write_text(DEAF + SERVER)
    server = McpServer([sys.executable, "server.py"], tmp_path)
    failures: list[BaseException] = []

    def call() -> None:
        try:
            named(list(server.tools), "hang").call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(1)
    server.close()
    thread.join(10)
    assert not thread.is_alive()
    assert len(failures) == 1
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_program_that_does_not_close_its_mcp_server_ends(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(DEAF + SERVER)
    program = "import sys; from pyps.agents.mcp_client import McpServer; s = McpServer([sys.executable, 'server.py'])"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, timeout=60, check=True)


def test_grammars_of_schemas() -> None:
    assert "root" in Sampling.grammar_of({"type": "object", "properties": {"x": {"type": "integer"}}})
    with pytest.raises(InputError, match="JSON schema"):
        Sampling.grammar_of({"type": "nonsense"})
