"""What speculation won and lost against plain decoding: where it loses, it rests.

Estimates of chances and costs err, and those drafts are computed above all that were overestimated. So what
came of them is counted, in times of a plain step, for each load by itself. Credit is small; who has lost it
rests, each time longer (a bound on what exploring may lose, as in "Conservative bandits", Wu 2016): in the
long run that is `FIRST_CREDIT` of `LONGEST_REST` steps.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_CREDIT = 1.5  # plain steps that may be lost
MOST_CREDIT = 4.0  # whoever has won so much has proven itself
SHORTEST_REST, LONGEST_REST = 64, 1024  # steps


@dataclass(slots=True)
class _Account:
    credit: float = FIRST_CREDIT
    rest: int = SHORTEST_REST  # the next one
    num_left: int = 0  # steps, of the present one


class Ledger:
    def __init__(self) -> None:
        self._accounts: dict[int, _Account] = {}  # by load: its binary order of magnitude

    def may_speculate(self, num_committed: int) -> bool:
        """In the step to come, which commits so many tokens without drafts. To be asked once a step."""
        account = self._account(num_committed)
        if not account.num_left:
            return True
        account.num_left -= 1
        return False

    def note(self, num_committed: int, won: float) -> None:
        """A step with speculation at this load was so much better than plain decoding, in plain steps;
        negative: worse."""
        account = self._account(num_committed)
        account.credit = min(MOST_CREDIT, account.credit + won)
        if account.credit >= MOST_CREDIT:
            account.rest = SHORTEST_REST
        elif account.credit < 0:
            account.num_left = account.rest
            account.rest = min(2 * account.rest, LONGEST_REST)
            account.credit = FIRST_CREDIT

    def _account(self, num_committed: int) -> _Account:
        return self._accounts.setdefault(num_committed.bit_length(), _Account())
