"""The life of the server process: listen, start the engine beside it, drain on a signal, say how it ended.

The socket listens before the engine is ready, so that probes get an answer from the first moment.
First SIGTERM or SIGINT: refuse new work, finish what runs within drain_timeout_s. Second: at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from engine.client import EngineDead
from server import logs
from server.app import create_app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from server.config import Config
    from server.service import Service

SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2048
HTTP_SHUTDOWN_S = 3  # what open connections get to flush after the drain
EXIT_OK, EXIT_FAILED = 0, 1


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling, which would close the socket before the drain."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(service: Service, config: Config) -> int:
    """Run until a signal or the engine's death; the exit status, 0 only after an asked-for stop."""
    logs.configure_logging(config.server.log_format, config.server.log_level)
    try:
        listener = bind(config.server.host, config.server.port)
    except OSError as error:
        where = f"{config.server.host}:{config.server.port}"
        logs.log(logging.ERROR, "cannot listen", address=where, cause=error.strerror or str(error))
        return EXIT_FAILED
    stop, at_once = asyncio.Event(), asyncio.Event()
    http = _http_server(service)
    with _signals(stop, at_once):
        logs.info("listening", url=url_of(listener), model=service.model_name)
        http_task = asyncio.create_task(http.serve(sockets=[listener]))
        engine_task = asyncio.create_task(_run_engine(service))
        try:
            return await _until_end(service, http_task, engine_task, stop, at_once)
        finally:
            http.should_exit = True
            http.force_exit = at_once.is_set()
            engine_task.cancel()
            await asyncio.gather(http_task, engine_task, return_exceptions=True)
            await service.close()
            listener.close()
            logs.info("stopped")


async def _until_end(
    service: Service,
    http: asyncio.Task[None],
    engine: asyncio.Task[str],
    stop: asyncio.Event,
    at_once: asyncio.Event,
) -> int:
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({http, engine, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if stop.is_set():
        return await _drain(service, at_once)
    service.stop_now()
    if engine.done():
        logs.log(logging.ERROR, "engine dead", cause=str(engine.exception() or engine.result()))
    else:
        logs.log(logging.ERROR, "http server ended", cause=str(http.exception()))
    return EXIT_FAILED


async def _drain(service: Service, at_once: asyncio.Event) -> int:
    draining = asyncio.create_task(service.drain())
    interrupted = asyncio.create_task(at_once.wait())
    await asyncio.wait({draining, interrupted}, return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    interrupted.cancel()
    if at_once.is_set():
        service.stop_now()
        return EXIT_FAILED
    return EXIT_OK


async def _run_engine(service: Service) -> str:
    """Start the engine and wait until it is dead for good -> why."""
    try:
        ready = await service.client.start()
    except EngineDead as error:
        return str(error)
    service.note_ready()
    phases = {phase.name.replace(" ", "_"): round(phase.seconds, 3) for phase in ready.phases}
    logs.info(
        "ready",
        model=service.model_name,
        device=ready.device,
        dtype=ready.dtype,
        max_model_len=ready.max_model_len,
        kv_tokens=ready.num_pages * ready.page_size,
        **phases,
    )
    return await service.client.died()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _http_server(service: Service) -> HttpServer:
    return HttpServer(
        uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=HTTP_SHUTDOWN_S,
        )
    )


@contextmanager
def _signals(stop: asyncio.Event, at_once: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def received() -> None:
        (at_once if stop.is_set() else stop).set()

    for number in SIGNALS:
        loop.add_signal_handler(number, received)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
