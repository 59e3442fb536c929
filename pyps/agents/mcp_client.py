"""Tools of an MCP server (pyps-llama[mcp]), which is a program of the user's that pyps starts and stops."""

import contextlib
import itertools
import json
import math
import re
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyps.agents.tools import ANSWER, Tool
from pyps.errors import InputError, missing_extra

if TYPE_CHECKING:
    import mcp
    import mcp_types

_START_SECONDS = 30.0
_MAX_PAGES, _MAX_TOOLS = 100, 1000
_MAX_NAME = 64  # characters, as Tool has it
_MAX_RESULT = 1 << 20  # characters of a result


class McpServer:
    """A server that speaks the Model Context Protocol on its standard input and output. Close it, or use `with`.

    Args:
        command: The program and its arguments.
        folder: Where it runs; None for the current folder.
        env: Variables of its environment. Beside them it has a few of this process, such as PATH and HOME.

    Attributes:
        tools: The tools that it offers, on all its pages. A tool whose name a model cannot write ("calendar.update")
            has a similar one ("calendar_update"); the server is called by its own.

    Raises:
        InputError: The package mcp is missing, the server does not start, or it has more tools than could be used.
    """

    def __init__(
        self, command: Sequence[str], folder: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        try:
            import anyio.from_thread
            from mcp import StdioServerParameters
        except ImportError:
            raise missing_extra("MCP servers need the package mcp", "mcp") from None
        parameters = StdioServerParameters(command=command[0], args=list(command[1:]), cwd=folder, env=dict(env or {}))
        with contextlib.ExitStack() as stack:  # which stops the server if anything here fails, Ctrl-C included
            self._portal = stack.enter_context(anyio.from_thread.start_blocking_portal())
            # calls that were given up may never end: they are cancelled, where the portal alone would wait for them
            stack.callback(self._portal.call, self._portal.stop, True)
            try:
                connection = self._portal.wrap_async_context_manager(_connect(parameters))
                self._client, specs = stack.enter_context(connection)
            except TimeoutError:
                raise InputError(f"the MCP server {command[0]} does not answer") from None
            except Exception as error:
                while inner := getattr(error, "exceptions", None):  # task groups put what happened into groups
                    error = inner[0]
                raise InputError(f"the MCP server {command[0]} cannot be used: {error}") from None
            self.tools = tuple(map(self._tool, _names([spec.name for spec in specs]), specs))
            # at the interpreter's exit too, since its end would wait for the portal's thread forever
            self._stop = weakref.finalize(self, _stop, stack.pop_all())

    def _tool(self, name: str, spec: "mcp_types.Tool") -> Tool:
        def call(**arguments: Any) -> str:
            result = self._portal.call(self._client.call_tool, spec.name, arguments)
            text = _text_of(result)
            if result.is_error:
                raise RuntimeError(text or "the server says that it failed, and nothing else")
            return text

        return Tool(name, " ".join((spec.description or "").split()), spec.input_schema, call)

    def __enter__(self) -> "McpServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server, whatever it is doing."""
        self._stop()


def _stop(stack: contextlib.ExitStack) -> None:
    with contextlib.suppress(Exception):  # a server that has died already
        stack.close()


@contextlib.asynccontextmanager
async def _connect(
    parameters: "mcp.StdioServerParameters",
) -> AsyncIterator[tuple["mcp.Client", list["mcp_types.Tool"]]]:
    """Start a server, and yield a client and the tools. Raises TimeoutError if it does not answer in time."""
    import anyio
    from mcp import Client

    # the scope must be around all of the client's life, since scopes nest: once there is an answer, it has no end
    with anyio.fail_after(_START_SECONDS) as scope:
        async with Client(parameters) as client:
            specs = await _list_tools(client)
            scope.deadline = math.inf
            yield client, specs


async def _list_tools(client: "mcp.Client") -> list["mcp_types.Tool"]:
    """Return the tools of all pages, each name once. Raises InputError if there are too many."""
    specs: dict[str, mcp_types.Tool] = {}
    cursors: set[str] = set()
    cursor: str | None = None
    for _ in range(_MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        for spec in page.tools:
            specs.setdefault(spec.name, spec)
        if len(specs) > _MAX_TOOLS:
            break
        cursor = page.next_cursor
        if not cursor or cursor in cursors:  # some servers send an empty one at their end, or the same one for ever
            return list(specs.values())
        cursors.add(cursor)
    raise InputError(f"it has more than {_MAX_TOOLS:,} tools, or {_MAX_PAGES} pages of them: no model can choose there")


def _names(names: Sequence[str]) -> list[str]:
    """Return a name for each tool that a model can write: its own where that is possible.

    The same tools get the same names, whatever else the server does: numbers are given in the order of the list.
    """
    usable = {name for name in names if _usable(name) == name}
    written = []
    for name in names:
        if name not in usable:
            numbered = (_usable(name, f"_{i}" if i > 1 else "") for i in itertools.count(1))
            name = next(candidate for candidate in numbered if candidate not in usable)
            usable.add(name)
        written.append(name)
    return written


def _usable(name: str, end: str = "") -> str:
    """Return a name with `end` and without what Tool does not allow: other characters, a digit first, some lengths."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if not re.match(r"[A-Za-z_]", name) or name + end == ANSWER:
        name = f"_{name}"
    return name[: _MAX_NAME - len(end)] + end


def _text_of(result: "mcp_types.CallToolResult") -> str:
    """Return a result's parts as text. A model hears of what is not text: a picture that is left out is no silence."""
    texts = []
    for part in result.content:
        match part.type:
            case "text":
                texts.append(part.text)
            case "resource":
                resource = part.resource
                texts.append(getattr(resource, "text", f"[{resource.mime_type or 'data'}: {resource.uri}]"))
            case "resource_link":
                texts.append(f"[{part.name}: {part.uri}]")
            case _:
                texts.append(f"[{part.type}: {part.mime_type}]")
    if not texts and result.structured_content is not None:
        texts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join(texts)[:_MAX_RESULT]
