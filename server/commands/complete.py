"""Continue one prompt, from the argument or standard input, to standard output."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from server.commands import CommandError
from server.commands.connection import add_connection, add_sampling, open_client, request_body

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="text to continue (default: standard input)")
    add_connection(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    from server.openai_client import ApiError

    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    if not prompt:
        raise CommandError("the prompt is empty")
    try:
        client = open_client(args)
        body = request_body(client, args)
        for text in client.stream("/v1/completions", {**body, "prompt": prompt}):
            print(text, end="", flush=True)
    except ApiError as error:
        raise CommandError(str(error)) from None
    print()
    return 0
