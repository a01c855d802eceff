"""Types of numeric flags. argparse puts the text of their error on one line, after the flag's name."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError


def positive_int(text: str) -> int:
    """Raises ArgumentTypeError unless it is a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return number


def positive_float(text: str) -> float:
    """Raises ArgumentTypeError unless it is a finite number over 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not (math.isfinite(number) and number > 0):
        raise ArgumentTypeError(f"must be a number over 0, not {text!r}")
    return number
