"""What an engine keeps from one process to the next: where it lies, and the output lengths it has learned."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scheduler.lengths import Lengths

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.config import EngineConfig

logger = logging.getLogger("octavo.engine")

NOWHERE: Final = "-"  # the value of `state_folder` for which nothing is kept
SAVE_EVERY_S: Final = 300.0
SAVE_PAUSE_S: Final = 0.0005  # between two histograms: beside a thread that never pauses steps are slow
SAVE_TIMEOUT_S: Final = 10.0  # for which the end of the process waits for a disk that does not answer


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
        self._saving: threading.Thread | None = None
        self.lengths = Lengths()
        if self._path is not None:
            self.lengths, problem = Lengths.load(self._path)
            if problem:
                logger.warning("learned output lengths begin anew: %s", problem)

    def save_when_due(self) -> None:
        """Call it between steps: every `SAVE_EVERY_S` what is known is copied, and a thread writes it."""
        now_s = time.monotonic()
        if self._path is None or now_s - self._saved_s < SAVE_EVERY_S:
            return
        self._saved_s = now_s
        if self._saving is not None and self._saving.is_alive():
            return  # a slow disk: the next time
        pause = partial(time.sleep, SAVE_PAUSE_S)
        self._saving = threading.Thread(
            target=self._write, args=(self.lengths.copy(), pause), name="octavo-lengths", daemon=True
        )
        try:
            self._saving.start()
        except RuntimeError as error:
            self._saving = None
            logger.warning("learned output lengths are not kept: %s", error)

    def save(self) -> None:
        """Now, at the end, behind whatever is under way."""
        if self.wait():
            self._write(self.lengths)
        else:
            logger.warning("learned output lengths are not kept: the disk takes over %g s", SAVE_TIMEOUT_S)

    def wait(self) -> bool:
        """For at most `SAVE_TIMEOUT_S` -> whether nothing is being written any more"""
        if self._saving is not None:
            self._saving.join(SAVE_TIMEOUT_S)
        return self._saving is None or not self._saving.is_alive()

    def _write(self, lengths: Lengths, pause: Callable[[], object] = lambda: None) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lengths.save(self._path, pause)
        except Exception as error:  # in a thread nobody else would hear of it
            logger.warning("learned output lengths are not kept: %s", error)
