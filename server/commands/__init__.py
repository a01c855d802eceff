"""One module per command: `add_arguments(parser)` and `run(args) -> int`.

Their top levels import the standard library and the settings only; what is heavy is imported by
`run`, so that `octavo --help` and `octavo version` answer at once.
"""

from __future__ import annotations


class CommandError(Exception):
    """A command cannot do its work; the text is one line for the user."""
