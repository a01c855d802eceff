"""Who kills engines, by proof: whoever does it alone.

After a death that was the engine's own, whoever it had computed something of is a suspect. Suspects are
computed apart: in groups, of which the next engine is given one, while everyone else waits. A group is
cleared as each of its members gets on; then the engine is given the next group as well, and after the last of
them everyone. An engine that dies before its group is cleared leaves the two halves of the rest of that group
to try, and one that had a single request, and never another, has shown who it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Verdict(NamedTuple):
    num_suspects: int = 0
    culprit: str | None = None
    is_closer: bool = False  # to knowing who it is: this cannot go on for ever


class Blame:
    """By request ids. An engine is given requests, gets on with them, and dies."""

    def __init__(self) -> None:
        self.patient = False  # the one on probation may only be slow
        self._groups: list[list[str]] = []  # the last one is on probation; none is empty
        self._num_given = 0  # to the engine that runs

    def may_be_given(self, request_id: str) -> bool:
        return not self._groups or request_id in self._groups[-1]

    def give(self) -> None:
        """The engine that runs is given one more."""
        self._num_given += 1

    def clear(self, request_id: str) -> bool:
        """It got on, or is over. -> whether there are others now who may be given"""
        for group in self._groups:
            if request_id in group:
                group.remove(request_id)
                break
        else:
            return False
        is_over = not self._groups[-1]
        self._groups = [group for group in self._groups if group]
        self.patient = self.patient and not is_over
        return is_over

    def spare(self) -> None:
        """The engine died, by no request's doing: whoever was on probation still is."""
        self._num_given = 0

    def judge(self, begun: Sequence[str], *, stalled: bool = False) -> Verdict:
        """The engine died by itself. `begun`: of whom it computed something. `stalled`: it was killed for its
        silence."""
        num_given, self._num_given = self._num_given, 0
        if not num_given:
            return Verdict()
        if not self._groups:
            self._push(begun)
            return Verdict(len(begun), is_closer=bool(begun))
        group = self._groups.pop()
        if len(group) == 1 and num_given == 1 and (self.patient or not stalled):
            self.patient = False
            return Verdict(1, culprit=group[0], is_closer=True)
        self.patient = stalled and len(group) == 1 and num_given == 1
        self._push(group)
        return Verdict(len(group), is_closer=True)

    def _push(self, suspects: Sequence[str]) -> None:
        """The first half comes first."""
        half = (len(suspects) + 1) // 2
        self._groups += [list(part) for part in (suspects[half:], suspects[:half]) if part]
