"""The default model, served for real; a file that needs it starts it once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.daemon import Daemon


@pytest.fixture(scope="module")
def live_server() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon
