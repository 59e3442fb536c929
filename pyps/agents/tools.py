"""Tools that a branch may call: Python functions, the built-in ones, and those of MCP servers.

    @pyps.tool
    def population(country: str) -> str:
        "How many people live in a country."
        return …

Type hints say what the arguments are, and the docstring says what the tool is for: a model sees both. No built-in tool
writes anything or runs programs.
"""

import ast
import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import itertools
import math
import operator
import re
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError, create_model
from pydantic.json_schema import GenerateJsonSchema

from pyps.errors import InputError, first_of

_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$")
ANSWER = "answer"  # what a branch "calls" when it has called enough

_MAX_LISTED = 200  # files, and matching lines
_MAX_ROWS = 100
_MAX_DESCRIBED = 1000  # characters of tables and columns in a description
_MAX_FILE = 1 << 20  # bytes that are read of a file
_MAX_YIELDED = 10_000  # what is taken of a generator


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool by a branch.

    Attributes:
        name: The tool's name.
        arguments: The arguments as the model wrote them.
        result: What the tool returned, as text, or the error.
        failed: Whether the result is an error; running out of time is one.
        ms: Milliseconds that it took.
    """

    name: str
    arguments: Any
    result: str
    failed: bool
    ms: float


@dataclass(frozen=True)
class Limits:
    """How often, and for how long, a branch may call tools.

    Attributes:
        min_calls: Calls that it must make before it answers.
        max_calls: Calls that it may make before it answers.
        seconds: Time after which a call is given up.
        result_tokens: Tokens that a result is cut to.

    Raises:
        InputError: A value is out of range.
    """

    min_calls: int = 0
    max_calls: int = 4
    seconds: float = 10.0
    result_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.min_calls <= self.max_calls <= 100:
            raise InputError(
                f"min_calls ({self.min_calls}) must be at least 0 and not larger than max_calls ({self.max_calls}), "
                "and max_calls at most 100"
            )
        if not 0 < self.seconds <= 86400:
            raise InputError(f"seconds ({self.seconds}) must be more than 0 and at most 86,400")
        if not 1 <= self.result_tokens < 2**20:
            raise InputError(f"result_tokens ({self.result_tokens}) must be at least 1 and less than {2**20:,}")


# what a branch with tools gives to the synthesizer: its answer, all that it generated, or the tools' results as well
JoinedPart = Literal["final", "generated", "everything"]


@dataclass(frozen=True)
class Tool:
    """Something that a branch may call.

    Attributes:
        name: What the model calls it by.
        description: What the model is told that it does.
        parameters: A JSON schema of its arguments, which are an object.
        call: A function that takes the arguments as keywords. The model reads what it returns, as text, or the
            message of what it raises. Several branches may call it at once, each on a thread. What it returns may be
            awaitable, or a generator: the tool waits for it, and takes a list of what is yielded.

    Raises:
        InputError: The name is not possible.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    call: Callable[..., Any]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name == ANSWER:
            raise InputError(f"a tool cannot be named {self.name!r}: letters, digits, _ and -, and not {ANSWER!r}")
        if not isinstance(self.call, _Completed):
            object.__setattr__(self, "call", _Completed(self.call))  # frozen classes are set like this

    @property
    def signature(self) -> str:
        """The tool in one line, for a prompt: sql(query) - The rows of a SELECT."""
        properties = self.parameters.get("properties")  # a server may write anything here
        names = ", ".join(properties) if isinstance(properties, dict) else ""
        return f"{self.name}({names}) - {self.description}"


class _Completed:
    """A function that returns results, where the one it is made of may return what is still to be waited for.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, **arguments: Any) -> Any:
        result = self._function(**arguments)
        if inspect.isgenerator(result):
            return list(itertools.islice(result, _MAX_YIELDED))
        return _run(_wait_for(result)) if inspect.isawaitable(result) or inspect.isasyncgen(result) else result


async def _wait_for(result: Any) -> Any:
    """Return what an awaitable or an asynchronous generator comes to."""
    while inspect.isawaitable(result):
        result = await result
    if not inspect.isasyncgen(result):
        return result
    items = []
    async with contextlib.aclosing(result):
        async for item in result:
            items.append(item)
            if len(items) >= _MAX_YIELDED:
                break
    return items


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end, also from a notebook, where this thread has an event loop that runs already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run_here(coroutine)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(_run_here, coroutine).result()


def _run_here(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        return asyncio.run(coroutine)
    except asyncio.CancelledError as error:  # which is no Exception: nobody would hear of it
        raise RuntimeError("it was cancelled") from error


def tool(function: Callable[..., Any]) -> Tool:
    """Return a function as a tool: its name, its docstring, and its parameters with their type hints.

    It may be asynchronous, and it may be a generator, of either kind.

    Raises:
        InputError: A parameter has no type hint, or one that JSON cannot express.
    """
    # partial functions and callable objects have no name of their own
    named = function.func if isinstance(function, functools.partial) else function
    title = getattr(named, "__name__", type(named).__name__)
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except Exception as error:
        # a type hint is a program: its mistakes are of every kind
        raise InputError(f"tool {title}: its parameters cannot be read: {error}") from None
    fields: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise InputError(f"tool {title}: {name!r} must be an ordinary parameter")
        if parameter.annotation is parameter.empty:
            raise InputError(f"tool {title}: parameter {name!r} needs a type hint")
        fields[name] = (parameter.annotation, ... if parameter.default is parameter.empty else parameter.default)
    try:
        arguments = create_model(title, **fields)
        schema = TypeAdapter(arguments).json_schema(schema_generator=_Plain)
    except Exception as error:
        # pydantic's complaints about types are of several kinds
        raise InputError(f"tool {title}: its parameters cannot be described in JSON: {error}") from None

    def call(**values: Any) -> Any:
        checked = arguments.model_validate(values)
        return function(**{name: getattr(checked, name) for name in fields})

    return Tool(title, " ".join((inspect.getdoc(named) or "").split()), schema, call)


class _Plain(GenerateJsonSchema):
    """A schema without titles, which say nothing and cost tokens."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Return False: no field has a title."""
        return False


def _inside(root: Path, path: str) -> Path:
    """Return a path under root. Raises ValueError if it is outside, also through symbolic links."""
    real_root = root.resolve()
    real_path = (real_root / path).resolve()
    if not real_path.is_relative_to(real_root):
        raise ValueError(f"{path} is outside the folder")
    return real_path


def file_tools(root: Path) -> list[Tool]:
    """Return the tools list_files, read_file and search_files for the files under one folder.

    Raises:
        InputError: There is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")

    def files(folder: str) -> Iterator[Path]:
        real_root = root.resolve()
        for path in sorted(_inside(root, folder).rglob("*")):
            if path.is_file() and path.resolve().is_relative_to(real_root):
                yield path

    def list_files(folder: str = ".") -> str:
        """Names of the files in a folder."""
        names = [path.relative_to(root.resolve()).as_posix() for path in files(folder)]
        return "\n".join(names[:_MAX_LISTED]) or "no files"

    def read_file(path: str) -> str:
        """The text of a file."""
        with _inside(root, path).open(encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_FILE)

    def search_files(text: str, folder: str = ".") -> str:
        """Lines of files that contain a text."""
        matches: list[str] = []
        for path in files(folder):
            with path.open(encoding="utf-8", errors="ignore") as file:
                lines = enumerate(file.read(_MAX_FILE).splitlines(), 1)
            name = path.relative_to(root.resolve()).as_posix()
            matches += [f"{name}:{n}: {line.strip()}" for n, line in lines if text.lower() in line.lower()]
            if len(matches) >= _MAX_LISTED:
                break
        return "\n".join(matches[:_MAX_LISTED]) or "no line contains it"

    return [tool(list_files), tool(read_file), tool(search_files)]


def sql_tools(database: Path, seconds: float = 5.0) -> list[Tool]:
    """Return the tools sql and tables for an SQLite file, which they cannot change.

    Args:
        database: The file. The description of sql names its tables.
        seconds: About the time after which a query is interrupted.

    Raises:
        InputError: The file is not an SQLite database.
    """
    database = Path(database)
    if not database.is_file():
        raise InputError(f"there is no database {database}")

    def rows_of(statement: str) -> str:
        connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
        try:
            connection.set_authorizer(_reads_only)
            steps = iter(range(int(seconds * 1000)))
            # asked every 100,000 instructions, about a millisecond's work
            connection.set_progress_handler(lambda: next(steps, None) is None, 100_000)
            cursor = connection.execute(statement)
            if cursor.description is None:
                return "nothing"
            rows = cursor.fetchmany(_MAX_ROWS + 1)
            lines = [" | ".join(name for name, *_ in cursor.description)]
            lines += [" | ".join("" if value is None else str(value) for value in row) for row in rows[:_MAX_ROWS]]
            if len(rows) > _MAX_ROWS:
                lines.append("…")
            return "\n".join(lines)
        finally:
            connection.close()

    def sql(query: str) -> str:
        """The rows of a SELECT."""
        return rows_of(query)

    def tables() -> str:
        """The tables of the database, and their columns."""
        return rows_of("SELECT sql AS tables FROM sqlite_master WHERE type IN ('table', 'view') AND sql IS NOT NULL")

    try:
        statements = tables().splitlines()[1:]
    except sqlite3.Error as error:
        raise InputError(f"{database}: not an SQLite database: {error}") from None
    query_tool = tool(sql)
    # so that a model need not ask, or guess, first
    schema = " ".join(" ".join(statements).split())[:_MAX_DESCRIBED]
    description = f"{query_tool.description} The database: {schema or 'no tables'}"
    return [replace(query_tool, description=description), tool(tables)]


# what a statement may do; everything else is denied, ATTACH and PRAGMA too
_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


def _reads_only(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION and second == "load_extension":
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY


_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda a, b: float(a) ** b,  # of floats: it overflows instead of taking all memory
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "sqrt": math.sqrt, "log": math.log, "exp": math.exp, "sin": math.sin, "cos": math.cos, "tan": math.tan,
    "abs": abs, "round": round, "floor": math.floor, "ceil": math.ceil, "min": min, "max": max,
}  # fmt: skip


@tool
def calculator(expression: str) -> str:
    """The value of an expression, like 17 * (3 + 4) or sqrt(2)."""
    if len(expression) > 1000:
        raise ValueError("the expression is too long")
    value = _value(ast.parse(expression.strip(), mode="eval").body)
    return str(int(value) if float(value).is_integer() and abs(value) < 1e15 else value)


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value) if isinstance(value, int) and value.bit_length() > 1000 else value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(_value, args))
        case ast.Name(id="pi"):
            return math.pi
        case ast.Name(id="e"):
            return math.e
    raise ValueError(f"cannot calculate {ast.unparse(node)}")


def explain(error: BaseException) -> str:
    """Return what a model reads about a call that failed."""
    if isinstance(error, ValidationError):
        loc, message = first_of(error)
        return f"{'.'.join(map(str, loc))}: {message}"
    return str(error) or type(error).__name__
