"""A server of our own for the length of a measurement, on a free port."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.05


class StartError(Exception):
    """The server did not become ready. The text is one line; its own log says the rest."""


class OwnServer:
    """`async with OwnServer(model) as server:` serves it at `server.url`. Its log goes to stderr."""

    def __init__(self, model: str = "", *, arguments: tuple[str, ...] = ()) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments = ["serve", *([model] if model else []), "--host", "127.0.0.1", *arguments]
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> OwnServer:
        command = [sys.executable, "-m", "server.cli", *self._arguments, "--port", str(self.port)]
        self._process = await asyncio.create_subprocess_exec(*command, stdout=sys.stderr)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._until_ready()
        except TimeoutError:
            await self._stop()
            raise StartError(f"octavo serve was not ready after {START_TIMEOUT_S:.0f} s") from None
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _until_ready(self) -> None:
        assert self._process
        while not await _is_healthy(self.port):
            if self._process.returncode is not None:
                raise StartError(f"octavo serve ended with status {self._process.returncode}")
            await asyncio.sleep(POLL_S)

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _is_healthy(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        return b" 200 " in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()
