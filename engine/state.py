"""What an engine keeps from one process to the next: where it lies, and the output lengths it has learned."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scheduler.lengths import Lengths

if TYPE_CHECKING:
    from engine.config import EngineConfig

logger = logging.getLogger("octavo.engine")

NOWHERE: Final = "-"  # the value of `state_folder` for which nothing is kept
SAVE_EVERY_S: Final = 300.0


def state_folder(config: EngineConfig) -> Path | None:
    """As the XDG base directory specification says: a relative path there counts as unset."""
    if config.state_folder == NOWHERE:
        return None
    if config.state_folder:
        return Path(config.state_folder).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "octavo"


class LengthsFile:
    """The learned lengths of one model. A file that cannot be read or written is a line in the log."""

    def __init__(self, folder: Path | None, identity: bytes) -> None:
        name = hashlib.sha256(identity).hexdigest()[:32]
        self._path = folder / "lengths" / f"{name}.json" if folder else None
        self._saved_s = time.monotonic()
        self.lengths = Lengths()
        if self._path is not None:
            self.lengths, problem = Lengths.load(self._path)
            if problem:
                logger.warning("learned output lengths begin anew: %s", problem)

    def save_when_due(self) -> None:
        """Call it between steps; it writes a few hundred kilobytes every `SAVE_EVERY_S`."""
        if time.monotonic() - self._saved_s >= SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        self._saved_s = time.monotonic()
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.lengths.save(self._path)
        except OSError as error:
            logger.warning("learned output lengths are not kept: %s", error)
