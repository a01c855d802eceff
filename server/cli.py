"""The `octavo` command: picks a sub-command and turns what goes wrong into one line and a status.

Status 0 = done, 1 = it could not be done, 2 = it was asked wrongly, 130 = interrupted.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, NoReturn, Protocol

from server.commands import CommandError, bench, chat, complete, models, serve, simulate, version
from server.settings import SettingsError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence


class Command(Protocol):
    """What a module of `server.commands` offers. The first line of its docstring is its help."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


COMMANDS: dict[str, Command] = {
    "serve": serve,
    "chat": chat,
    "complete": complete,
    "bench": bench,
    "simulate": simulate,
    "models": models,
    "version": version,
}


class Parser(argparse.ArgumentParser):
    """Errors on one line, without the usage in front, and no guessing at abbreviated flags."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class VersionFlag(argparse.Action):
    """`octavo --version` is `octavo version`."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> None:
        parser.exit(version.run(namespace))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="octavo", description="An OpenAI-compatible LLM serving daemon.")
    parser.add_argument("--version", action=VersionFlag, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, command in COMMANDS.items():
        about = (command.__doc__ or "").strip()
        summary = about.splitlines()[0].rstrip(".")
        child = commands.add_parser(
            name, help=summary, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_arguments(child)
        child.set_defaults(parser=child)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; an unknown flag is answered with the nearest known one."""
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        child: argparse.ArgumentParser = args.parser
        flags = [flag for action in child._actions for flag in action.option_strings]
        child.error(f"unknown argument {unknown[0]}{nearest(unknown[0].partition('=')[0], flags)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        return COMMANDS[args.command].run(args)
    except SettingsError as error:
        return _fail(args.command, str(error), 2)
    except CommandError as error:
        return _fail(args.command, str(error), 1)
    except BrokenPipeError:  # the reader of a pipe left: `octavo complete … | head`
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return 130


def _fail(command: str, message: str, status: int) -> int:
    print(f"octavo {command}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
