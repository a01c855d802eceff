"""Flags that the commands which talk to a running server share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from server.commands.numbers import positive_int

if TYPE_CHECKING:
    import argparse

    from server.openai_client import OpenAIClient

DEFAULT_URL = "http://127.0.0.1:8000"


def add_connection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--url",
        default=os.environ.get("OCTAVO_URL", DEFAULT_URL),
        help=f"an OpenAI-compatible server (default $OCTAVO_URL or {DEFAULT_URL})",
    )
    group.add_argument(
        "--api-key", default=os.environ.get("OCTAVO_API_KEY", ""), help="bearer key (default $OCTAVO_API_KEY)"
    )
    group.add_argument("--model", default="", help="model id (default: the first that the server lists)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, metavar="X", help="0 = greedy (default: the server's)")
    group.add_argument("--max-tokens", type=positive_int, metavar="N", help="length of an answer at most")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")


def open_client(args: argparse.Namespace) -> OpenAIClient:
    from server.openai_client import OpenAIClient

    return OpenAIClient(args.url, args.api_key)


def request_body(client: OpenAIClient, args: argparse.Namespace) -> dict[str, Any]:
    """The model and what was given of the sampling flags."""
    body: dict[str, Any] = {"model": args.model or client.first_model()}
    for name in ("temperature", "max_tokens", "seed"):
        if (value := getattr(args, name)) is not None:
            body[name] = value
    return body
