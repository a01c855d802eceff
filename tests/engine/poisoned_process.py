"""The real engine, but for one thing: it crashes in a step that computes a prompt with a certain token."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[2]))

from engine.process import main

if TYPE_CHECKING:
    from engine.runner import Outcome, Runner
    from scheduler.plan import StepPlan

POISON = 666


def poison() -> None:
    from engine.runner import Runner

    execute = Runner.execute

    def crash(self: Runner, plan: StepPlan) -> tuple[Outcome, ...]:
        if any(POISON in self.scheduler.sequence(piece.seq_id).request.prompt_ids for piece in plan.slices):
            os.kill(os.getpid(), signal.SIGSEGV)
        return execute(self, plan)

    Runner.execute = crash  # type: ignore[method-assign]


if __name__ == "__main__":
    poison()
    sys.exit(main(sys.argv[1:]))
