"""An engine that drafts whenever it can: the most drafts there can be, right or wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.speculation import StepEconomy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine.core import EngineCore


def eager(core: EngineCore) -> EngineCore:
    """Every draft pays, everybody is always asked, and losses do not count."""
    core.speculation.costs = Generous()
    core.speculation.yields = Asking()
    core.speculation.ledger = Endless()
    return core


class Generous:
    """Costs under which every draft pays."""

    def economy(self, slices: Iterable[tuple[int, int]], num_committed: int) -> StepEconomy:
        return StepEconomy(
            step_s=1.0,
            num_committed=max(1, num_committed),
            num_rows=sum(count for _, count in slices),
            row_block=8,
            block_s=0.0,
            draft_s=0.0,
        )

    def lacks_plain(self, slices: object) -> bool:
        return False

    def note(self, plan: object, seconds: float) -> None:
        pass


class Asking:
    """Yields of which nothing is learned."""

    def at(self, num_committed: int) -> None:
        pass

    def worth_asking(self, name: str, rivals: dict[int, float], tokens_per_s: float) -> list[int]:
        return list(rivals)

    def is_paying(self, name: str) -> bool:
        return True

    def took(self, name: str, num_asked: int, seconds: float, *, num_behind: int = 0) -> None:
        pass

    def gained(self, name: str, asked: object) -> None:
        pass

    def release(self, seq_id: int) -> None:
        pass


class Endless:
    """A ledger of a stake that is never lost."""

    def may_speculate(self, num_committed: int) -> bool:
        return True

    def note(self, num_committed: int, won: float) -> None:
        pass
