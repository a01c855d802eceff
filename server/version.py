"""The version of the installed distribution, which pyproject.toml owns."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def octavo_version() -> str:
    """`unknown` where the source is run without being installed."""
    try:
        return version("octavo")
    except PackageNotFoundError:
        return "unknown"
