"""Tools do what they are for, and nothing else."""

import asyncio
import functools
import json
import math
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from mcp import MCPError

from pyps import InputError, Sampling, Tool, calculator, file_tools, sql_tools, tool
from pyps.agents import mcp_client, tools
from pyps.agents.agent import _RunningCall
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


async def double(x: int) -> str:
    """Twice as much."""
    await asyncio.sleep(0.001)
    return f"{2 * x}"


async def count(x: int) -> AsyncIterator[int]:
    for i in range(x):
        await asyncio.sleep(0)
        yield i


def count_now(x: int) -> Iterator[int]:
    yield from range(x)


def later(x: int) -> Awaitable[str]:
    return double(x)


async def later_still(x: int) -> Awaitable[str]:
    return double(x)


async def nested(x: int) -> AsyncIterator[int]:
    return count(x)


def lazily(x: int) -> AsyncIterator[int]:
    return count(x)


@functools.wraps(double)
def decorated(x: int) -> Any:
    return double(x)


class Doubling:
    """Twice as much, from an object."""

    async def __call__(self, x: int) -> str:
        return await double(x)

    async def method(self, x: int) -> str:
        return await double(x)


class Promise:
    def __await__(self) -> Any:
        return double(3).__await__()


def promise(x: int) -> Promise:
    return Promise()


def plain(x: int) -> str:
    return str(2 * x)


FUNCTIONS: list[tuple[Any, object]] = [
    (double, "6"),
    (count, [0, 1, 2]),
    (count_now, [0, 1, 2]),
    (later, "6"),
    (later_still, "6"),
    (nested, [0, 1, 2]),
    (lazily, [0, 1, 2]),
    (decorated, "6"),
    (Doubling(), "6"),
    (Doubling().method, "6"),
    (functools.partial(double), "6"),
    (functools.partial(functools.partial(plain)), "6"),
    (promise, "6"),
    (plain, "6"),
]


def result_of(one: Tool, **arguments: object) -> tuple[str, bool]:
    """What a model reads of a call, and whether it has failed."""
    running = _RunningCall(one.name, arguments, {one.name: one}, 5.0)
    while True:
        if call := running.poll():
            return call.result, call.failed
        time.sleep(0.001)


@pytest.mark.parametrize(("function", "result"), FUNCTIONS)
def test_what_is_still_to_be_waited_for(function: Any, result: object) -> None:
    """The result of a call is there: on a thread, here, and where a loop runs already; with @tool, and with Tool."""
    one = tool(function)
    assert result_of(one, x=3) == (str(result), False)
    assert one.call(x="3") == result

    async def within_a_loop() -> Any:
        return one.call(x=3)

    assert asyncio.run(within_a_loop()) == result
    by_hand = Tool("by_hand", "", {}, function)
    assert by_hand.call(x=3) == result


def test_names_and_descriptions_of_callables() -> None:
    assert (tool(Doubling()).name, tool(Doubling()).description) == ("Doubling", "Twice as much, from an object.")
    partial = tool(functools.partial(double))
    assert (partial.name, partial.description) == ("double", "Twice as much.")
    with pytest.raises(InputError, match="<lambda>"):
        tool(lambda: "")
    with pytest.raises(InputError, match="tool hinted: its parameters cannot be read"):

        @tool
        def hinted(x: "Nowhere") -> str:  # type: ignore[name-defined]  # noqa: F821
            return ""


async def _raises(error: BaseException) -> str:
    await asyncio.sleep(0)
    raise error


async def _yields_and_raises(error: BaseException) -> AsyncIterator[str]:
    yield "one"
    raise error


async def _of_another_loop() -> Any:
    return await asyncio.new_event_loop().create_future()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _raises(ValueError("out of order")), "error: out of order"),
        (lambda: _raises(asyncio.CancelledError()), "error: it was cancelled"),
        (lambda: _raises(SystemExit(3)), "error: 3"),
        (lambda: _raises(TimeoutError()), "error: TimeoutError"),
        (lambda: _yields_and_raises(KeyError("gone")), "error: 'gone'"),
        (lambda: (1 / i for i in (1, 0)), "error: division by zero"),
        (_of_another_loop, "error: Task"),
    ],
)
def test_failures_of_what_is_waited_for(call: Any, message: str) -> None:
    result, failed = result_of(Tool("fails", "", {}, call))
    assert failed
    assert result.startswith(message)


def test_generators_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_MAX_YIELDED", 5)
    closed: list[bool] = []

    async def endless() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    def endless_now() -> Iterator[int]:
        while True:
            yield 1

    assert tool(endless).call() == tool(endless_now).call() == [1] * 5
    assert closed == [True]


def test_async_tools_that_wait_are_given_up() -> None:
    @tool
    async def slow() -> str:
        await asyncio.sleep(1)
        return "late"

    running = _RunningCall("slow", {}, {"slow": slow}, 0.05)
    time.sleep(0.1)
    call = running.poll()
    assert call
    assert (call.failed, call.result) == (True, "error: no result after 0.05 seconds")


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


# a server that answers by hand, so that it can be as odd as those of other people
ODD_SERVER = """
import json, os, sys
options = json.loads(sys.argv[1])
pages = options["pages"]
def tool(name): return {"name": name, "description": "D.", "inputSchema": {"type": "object", "properties": {}}}
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message: continue
    parameters, reply = message.get("params") or {}, {"jsonrpc": "2.0", "id": message["id"]}
    if message["method"] == "initialize":
        version = parameters["protocolVersion"]
        server = {"name": "odd", "version": "1"}
        reply["result"] = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": server}
    elif message["method"] == "tools/list":
        page = int(parameters.get("cursor") or 0)
        reply["result"] = {"tools": [tool(name) for name in pages[min(page, len(pages) - 1)]]}
        following = {"end": page + 1 if page + 1 < len(pages) else None, "empty": page + 1 if page + 1 < len(pages)
                     else "", "same": 1, "more": page + 1}[options.get("cursors", "end")]
        if following is not None: reply["result"]["nextCursor"] = str(following)
    elif message["method"] == "tools/call":
        content = options.get("content") or [{"type": "text", "text": parameters["name"]}]
        if options.get("env"): content = [{"type": "text", "text": str(os.environ.get(n))} for n in options["env"]]
        if "structured" in options: content = []
        reply["result"] = {"content": content, "isError": options.get("fails", False)}
        if "structured" in options: reply["result"]["structuredContent"] = options["structured"]
    else: reply["error"] = {"code": -32601, "message": "no such method"}
    print(json.dumps(reply), flush=True)
"""


def odd_server(folder: Path, pages: list[list[str]], env: dict[str, str] | None = None, **options: Any) -> McpServer:
    (folder / "odd.py").write_text(ODD_SERVER)
    return McpServer([sys.executable, "odd.py", json.dumps({"pages": pages, **options})], folder, env)


@pytest.mark.parametrize(
    ("names", "written"),
    [
        (["first"], ["first"]),
        (["calendar.updateEvent"], ["calendar_updateEvent"]),
        (["admin/list"], ["admin_list"]),
        (["3d_render"], ["_3d_render"]),
        (["-x"], ["_-x"]),
        (["answer"], ["_answer"]),
        (["wörter", "日本"], ["w_rter", "__"]),
        (["a b\nc\x1b[2J"], ["a_b_c__2J"]),
        ([""], ["_"]),
        (["a.b", "a/b", "a_b", "a b"], ["a_b_2", "a_b_3", "a_b", "a_b_4"]),
        (["a_b", "a.b"], ["a_b", "a_b_2"]),
        (["a.b", "a_b_2", "a:b"], ["a_b", "a_b_2", "a_b_3"]),
        (["x" * 200, "x" * 201], ["x" * 64, "x" * 62 + "_2"]),
        (["x" * 64], ["x" * 64]),
        (["9" * 64], ["_" + "9" * 63]),
        (["answer", "_answer"], ["answer_2", "_answer"]),
        (["get", "GET", "get"], ["get", "GET"]),
    ],
)
def test_names_of_mcp_tools(tmp_path: Path, names: list[str], written: list[str]) -> None:
    """A model can write them all, no two are the same, and the server is called by its own."""
    with odd_server(tmp_path, [names]) as server:
        assert [one.name for one in server.tools] == written
        assert [one.call() for one in server.tools] == list(dict.fromkeys(names))


@pytest.mark.parametrize(
    ("pages", "cursors", "names"),
    [
        ([["a"], ["b"]], "end", "ab"),
        ([["a"], ["b"], ["c"]], "empty", "abc"),
        ([["a", "b"], ["b", "c"]], "end", "abc"),
        ([["a"], ["b"]], "same", "ab"),
        ([["a"], [], ["b"]], "end", "ab"),
        ([[]], "end", ""),
        ([[c] for c in "abcdefghijklmnopqrstuvwxyz"], "end", "abcdefghijklmnopqrstuvwxyz"),
    ],
)
def test_pages_of_mcp_tools(tmp_path: Path, pages: list[list[str]], cursors: str, names: str) -> None:
    with odd_server(tmp_path, pages, cursors=cursors) as server:
        assert [one.name for one in server.tools] == list(names)


def test_mcp_tools_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_client, "_MAX_TOOLS", 10)
    for pages in ([["a"]], [[f"t{i}" for i in range(11)]]):
        with pytest.raises(InputError, match="cannot be used: it has more than 10 tools, or 100 pages"):
            odd_server(tmp_path, pages, cursors="more")


@pytest.mark.parametrize(
    ("options", "result"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "a\nb"),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "image", "data": "aGk=", "mimeType": "image/png"}]},
            "a\n[image: image/png]",
        ),
        ({"content": [{"type": "audio", "data": "aGk=", "mimeType": "audio/wav"}]}, "[audio: audio/wav]"),
        ({"content": [{"type": "resource_link", "name": "n", "uri": "file:///x"}]}, "[n: file:///x]"),
        ({"content": [{"type": "resource", "resource": {"uri": "file:///x", "text": "inside"}}]}, "inside"),
        (
            {"content": [{"type": "resource", "resource": {"uri": "file:///x", "blob": "aGk=", "mimeType": "a/b"}}]},
            "[a/b: file:///x]",
        ),
        ({"content": [{"type": "resource", "resource": {"uri": "file:///x", "blob": "aGk="}}]}, "[data: file:///x]"),
        ({"structured": {"total": 5, "é": None}}, '{"total": 5, "é": null}'),
    ],
)
def test_results_of_mcp_tools(tmp_path: Path, options: dict[str, Any], result: str) -> None:
    with odd_server(tmp_path, [["a"]], **options) as server:
        assert server.tools[0].call() == result
    with odd_server(tmp_path, [["a"]], fails=True, **options) as server, pytest.raises(RuntimeError) as error:
        server.tools[0].call()
    assert str(error.value) == result


def test_the_environment_of_mcp_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server has what is passed on, and nothing else of ours."""
    monkeypatch.setenv("MY_SECRET", "secret")
    names = ["MY_TOKEN", "MY_SECRET", "PATH"]
    (tmp_path / "odd.py").write_text(ODD_SERVER)
    path = os.environ["PATH"]
    command = [sys.executable, str(tmp_path / "odd.py"), json.dumps({"pages": [["a"]], "env": names})]
    for env, result in (({"MY_TOKEN": "a b=c"}, f"a b=c\nNone\n{path}"), (None, f"None\nNone\n{path}")):
        with McpServer(command, env=env) as server:
            assert server.tools[0].call() == result
    with pytest.raises(InputError, match="cannot be used"):
        McpServer(command, env={"A": "nul\0"})


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
