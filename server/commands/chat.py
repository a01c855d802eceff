"""Talk to a server in the terminal.

/reset forgets the conversation, /exit (or end of input) leaves. Ctrl-C stops an answer, and at the
prompt leaves. Piped input is read one message per line, and only the answers are printed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from server.commands import CommandError
from server.commands.connection import add_connection, add_sampling, open_client, request_body

if TYPE_CHECKING:
    import argparse

    from server.openai_client import OpenAIClient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument("--stats", action="store_true", help="print the speed after each answer")
    add_connection(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    from server.openai_client import ApiError

    try:
        client = open_client(args)
        conversation = Conversation(client, request_body(client, args), args.system, stats=args.stats)
    except ApiError as error:
        raise CommandError(str(error)) from None
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() history and line editing)

        print(f"{conversation.body['model']} at {client.url}; /reset, /exit")
    return _converse(conversation)


def _converse(conversation: Conversation) -> int:
    """Answer line after line. A failed answer is told and does not end a person's session."""
    from server.openai_client import ApiError

    interactive = sys.stdin.isatty()
    status = 0
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            if interactive:
                print()
            return status
        if line == "/exit":
            return status
        if line == "/reset":
            conversation.reset()
        elif line:
            try:
                conversation.answer(line)
            except ApiError as error:
                print(f"octavo chat: {error}", file=sys.stderr)
                status = 0 if interactive else 1


class Conversation:
    """The messages so far, and the request that goes with them."""

    def __init__(self, client: OpenAIClient, body: dict[str, Any], system: str, *, stats: bool) -> None:
        self.body = body
        self._client = client
        self._system = system
        self._stats = stats
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def answer(self, message: str) -> None:
        """Stream an answer to the terminal. Ctrl-C keeps what has come; an error forgets the message."""
        asked = [*self.messages, {"role": "user", "content": message}]
        pieces: list[str] = []
        stream = self._client.stream("/v1/chat/completions", {**self.body, "messages": asked})
        try:
            for text in stream:
                print(text, end="", flush=True)
                pieces.append(text)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        finally:
            stream.close()  # closes the connection, so that the server stops too
            if pieces:
                print()
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        if self._stats and (timing := self._client.timing):
            print(
                f"[{timing.output_tokens} tokens, first after {timing.first_s:.2f} s, "
                f"then {timing.tokens_per_s:.1f} tokens/s]"
            )
