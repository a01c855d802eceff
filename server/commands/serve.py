"""Serve a model.

Settings come from the defaults, a TOML file (--config or $OCTAVO_CONFIG), the environment
(OCTAVO_PORT, OCTAVO_MAX_NUM_SEQS, ...) and the flags below; the later of these wins. Sizes and
counts take the binary suffixes k, m, g, t; lists are separated by commas.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from server.commands import CommandError
from server.settings import SECTIONS, SETTINGS, Resolved, Setting, SettingsError, render, resolve

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from server.config import Config, ServerConfig

TITLES = {"server": "HTTP server", "engine": "model and engine", "scheduler": "scheduler and memory"}
METAVARS = {int: "N", float: "SECONDS", str: "TEXT", tuple: "A,B"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [MODEL] [--config FILE] [--print-config] [settings]"
    parser.add_argument("target", nargs="?", metavar="MODEL", help=SETTINGS["model"].help)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings")
    parser.add_argument("--print-config", action="store_true", help="print the configuration and exit")
    parser.add_argument("--show-secrets", action="store_true", help="print the API keys too")
    for section in SECTIONS:
        group = parser.add_argument_group(TITLES[section])
        for setting in SETTINGS.values():
            if setting.section == section:
                _add_flag(group, setting)


def _add_flag(group: argparse._ArgumentGroup, setting: Setting) -> None:
    text = f"{setting.help}{_shown_default(setting)}".replace("%", "%%")
    if setting.kind is bool:
        group.add_argument(
            setting.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
        return
    metavar = "BYTES" if setting.name.endswith("_bytes") else METAVARS[setting.kind]
    group.add_argument(setting.flag, metavar=metavar, default=argparse.SUPPRESS, help=text)


def _shown_default(setting: Setting) -> str:
    """Nothing where the default is "none", which the help explains itself."""
    if setting.kind is bool:
        return f" (default {'on' if setting.default else 'off'})"
    if setting.default in (0, "", ()):
        return ""
    value = ",".join(setting.default) if setting.kind is tuple else setting.default
    return f" (default {value})"


def run(args: argparse.Namespace) -> int:
    resolved = settings_of(args)
    for warning in resolved.warnings:
        print(f"octavo serve: {warning}", file=sys.stderr)
    if args.print_config:
        print(render(resolved, show_secrets=args.show_secrets), end="")
        return 0
    return serve(resolved.config)


def settings_of(args: argparse.Namespace) -> Resolved:
    """Combine the command line with the file and the environment that it names."""
    flags = {name: value for name, value in vars(args).items() if name in SETTINGS}
    if args.target is not None:
        if flags.get("model", args.target) != args.target:
            raise SettingsError(f"MODEL is given twice: {args.target} and --model {flags['model']}")
        flags["model"] = args.target
    return environment_settings(flags, args.config)


def environment_settings(flags: Mapping[str, object] | None = None, path: Path | None = None) -> Resolved:
    """The settings of this process: flags, its environment, and the file named by either."""
    if path is None and os.environ.get("OCTAVO_CONFIG"):
        path = Path(os.environ["OCTAVO_CONFIG"])
    return resolve(flags or {}, os.environ, path)


def serve(config: Config) -> int:
    """Run until told to stop. The engine process starts before anything heavy is imported here, so
    that it loads the model while this process imports FastAPI and builds the tokeniser. It ends with
    this process, however that ends."""
    from engine.checkpoint import CheckpointError, locate
    from engine.client import EngineDead, EngineProcess

    try:
        checkpoint = locate(config.engine.model, config.engine.revision)  # the one that may download
    except CheckpointError as error:
        raise CommandError(str(error)) from None
    listener = _listen(config.server)  # before the engine costs anything
    engine = EngineProcess(
        replace(config.engine, model=checkpoint.source, revision=""),
        start_timeout_s=config.server.engine_start_timeout_s,
        stall_timeout_s=config.server.engine_stall_timeout_s,
        max_restarts=config.server.max_engine_restarts,
        log_level=config.server.log_level,
    )
    try:
        engine.spawn()

        import asyncio

        from server.serve import serve as serve_http
        from server.service import build_service

        service = build_service(config, checkpoint, engine)
    except BaseException as error:
        engine.kill()
        listener.close()
        if isinstance(error, (CheckpointError, EngineDead)):
            raise CommandError(str(error)) from None
        raise
    return asyncio.run(serve_http(service, config, listener))


def _listen(config: ServerConfig) -> socket.socket:
    from server.listener import TlsError, listen, tls_context

    try:
        tls_context(config)  # made again where it is used
        return listen(config)
    except TlsError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        cause = error.strerror or str(error)
        where = config.uds or f"{config.host}:{config.port}"
        raise CommandError(f"cannot listen on {where}: {cause}") from None
