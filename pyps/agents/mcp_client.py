"""Tools of an MCP server (pyps-llama[mcp]), which is a program of the user's that pyps starts and stops."""

import contextlib
import math
import weakref
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyps.agents.tools import Tool
from pyps.errors import InputError, missing_extra

if TYPE_CHECKING:
    import mcp
    import mcp_types

_START_SECONDS = 30.0


class McpServer:
    """A server that speaks the Model Context Protocol on its standard input and output. Close it, or use `with`.

    Args:
        command: The program and its arguments.
        folder: Where it runs; None for the current folder.

    Attributes:
        tools: The tools that it offers.

    Raises:
        InputError: The package mcp is missing, or the server does not start.
    """

    def __init__(self, command: Sequence[str], folder: Path | None = None) -> None:
        try:
            import anyio.from_thread
            from mcp import StdioServerParameters
        except ImportError:
            raise missing_extra("MCP servers need the package mcp", "mcp") from None
        parameters = StdioServerParameters(command=command[0], args=list(command[1:]), cwd=folder)
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
            self.tools = tuple(map(self._tool, specs))
            # at the interpreter's exit too, since its end would wait for the portal's thread forever
            self._stop = weakref.finalize(self, _stop, stack.pop_all())

    def _tool(self, spec: "mcp_types.Tool") -> Tool:
        def call(**arguments: Any) -> str:
            result = self._portal.call(self._client.call_tool, spec.name, arguments)
            text = "\n".join(part.text for part in result.content if part.type == "text")
            if result.is_error:
                raise RuntimeError(text)
            return text

        return Tool(spec.name, " ".join((spec.description or "").split()), spec.input_schema, call)

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
            specs = (await client.list_tools()).tools
            scope.deadline = math.inf
            yield client, specs
