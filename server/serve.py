"""The life of the server process: listen, start the engine beside it, drain on a signal, say how it ended.

The socket listens before the engine is ready, so that probes get an answer from the first moment.
First SIGTERM or SIGINT: refuse new work, finish what runs within drain_timeout_s. Second: at once.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from engine.client import EngineDead
from server import logs
from server.app import create_app
from server.connection import Connection
from server.connections import Connections
from server.listener import is_loopback, tls_context, url_of

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from server.config import Config, ServerConfig
    from server.service import Service

SIGNALS = (signal.SIGTERM, signal.SIGINT)
HTTP_SHUTDOWN_S = 3  # what open connections get to flush after the drain
OTHER_FILES = 256  # open files beside the connections
EXIT_OK, EXIT_FAILED = 0, 1


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling, which would close the socket before the drain, and with
    our connections."""

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self.connections = connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        self.should_exit = self.should_exit or self.lifespan.should_exit
        loop = asyncio.get_running_loop()
        self.servers = [await loop.create_server(self._connection, sock=each) for each in sockets or []]
        self.started = True

    def _connection(self) -> Connection:
        app, state = self.config.loaded_app, dict(self.lifespan.state)
        return Connection(self.connections, app, self.server_state, state)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves it to be cancelled, with a traceback
            await self.lifespan.shutdown()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(service: Service, config: Config, listener: socket.socket) -> int:
    """Run until a signal or the engine's death; the exit status, 0 only after an asked-for stop.

    The service and the listener are closed at the end.
    """
    logs.configure_logging(config.server.log_format, config.server.log_level)
    _allow_open_files(config.server.max_connections + OTHER_FILES)
    stop, at_once = asyncio.Event(), asyncio.Event()
    http = http_server(service)
    with _signals(stop, at_once):
        logs.info(
            "listening", url=url_of(listener, tls=http.connections.tls is not None), model=service.model_name
        )
        _warn_if_open(listener, config.server)
        _say_defaults(service)
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
    if stop.is_set() and not engine.done():
        await _drain(service, engine, at_once)
        if not engine.done() and not at_once.is_set():
            return EXIT_OK
    service.stop_now()
    if engine.done():
        logs.log(logging.ERROR, "engine dead", cause=str(engine.exception() or engine.result()))
    elif http.done():
        logs.log(logging.ERROR, "http server ended", cause=str(http.exception()))
    return EXIT_FAILED


async def _drain(service: Service, engine: asyncio.Task[str], at_once: asyncio.Event) -> None:
    """Until what runs has ended, or may not go on: a second signal, or the engine's death."""
    draining = asyncio.create_task(service.drain())
    interrupted = asyncio.create_task(at_once.wait())
    await asyncio.wait({draining, interrupted, engine}, return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    interrupted.cancel()


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
        host_pages=ready.host_pages or None,  # left out where there are none
        disk_pages=ready.disk_pages or None,
        **phases,
    )
    return await service.client.died()


def http_server(service: Service) -> HttpServer:
    limits = service.config.server
    return HttpServer(
        uvicorn.Config(
            create_app(service),
            http=Connection,  # made by HttpServer
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=HTTP_SHUTDOWN_S,
        ),
        Connections(limits, service.buffers, service.metrics, tls_context(limits)),
    )


def _warn_if_open(listener: socket.socket, config: ServerConfig) -> None:
    if not config.api_keys and not is_loopback(listener):
        logs.log(logging.WARNING, "no api_keys: whoever reaches this address may use it", host=config.host)


def _say_defaults(service: Service) -> None:
    """A model's own temperature surprises those who know OpenAI's API."""
    if problem := service.checkpoint.generation_problem:
        logs.log(logging.WARNING, "the model's generation defaults cannot be read", cause=problem)
    changed = service.defaults.changed()
    changed.pop("eos_token_ids", None)
    if changed:
        logs.info("generation defaults", **changed)


def _allow_open_files(count: int) -> None:
    """Raise the soft limit, often 1024, as far as the hard one lets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
