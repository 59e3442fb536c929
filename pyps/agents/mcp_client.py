"""Tools of an MCP server (pyps[mcp]), which is a program of the user's that pyps starts and stops."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future, TimeoutError
from pathlib import Path
from typing import Any

from pyps.agents.tools import Tool
from pyps.errors import InputError

_START_SECONDS = 30.0


class McpServer:
    """A server that speaks the Model Context Protocol on its standard input and output. Close it, or use `with`.

    Args:
        command: the program and its arguments; folder: where it runs.

    Attributes:
        tools: what it offers.

    Raises:
        InputError: the package mcp is missing, or the server does not start.
    """

    def __init__(self, command: Sequence[str], folder: Path | None = None) -> None:
        try:
            from mcp import Client, StdioServerParameters
        except ImportError:
            raise InputError("MCP servers need the package mcp: pip install 'pyps[mcp]'") from None
        parameters = StdioServerParameters(command=command[0], args=list(command[1:]), cwd=folder)
        ready: Future[list[Any]] = Future()
        self._task: asyncio.Task[None] | None = None

        async def live() -> None:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
            try:
                async with Client(parameters) as self._client:
                    ready.set_result((await self._client.list_tools()).tools)
                    await asyncio.Event().wait()  # until it is cancelled
            except BaseException as error:
                if not ready.done():
                    ready.set_exception(error)

        self._thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
        self._thread.start()
        try:
            found = ready.result(_START_SECONDS)
        except TimeoutError:
            self.close()
            raise InputError(f"the MCP server {command[0]} does not answer") from None
        except Exception as error:
            while inner := getattr(error, "exceptions", None):  # task groups put what happened into groups
                error = inner[0]
            raise InputError(f"the MCP server {command[0]} cannot be used: {error}") from None
        try:
            self.tools = tuple(self._tool(tool) for tool in found)
        except InputError:
            self.close()
            raise

    def _tool(self, tool: Any) -> Tool:
        def call(**arguments: Any) -> str:
            asked = asyncio.run_coroutine_threadsafe(self._client.call_tool(tool.name, arguments), self._loop)
            result = asked.result()
            text = "\n".join(part.text for part in result.content if part.type == "text")
            if result.is_error:
                raise RuntimeError(text)
            return text

        return Tool(tool.name, " ".join((tool.description or "").split()), tool.input_schema, call)

    def __enter__(self) -> "McpServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the server, one that has not answered yet too."""
        if self._task and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join(_START_SECONDS)
