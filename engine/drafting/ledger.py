"""What speculation won and lost against plain decoding: where it loses, it rests.

Estimates of chances and costs err, and those drafts are computed above all that were overestimated. So what
came of them is counted, in times of a plain step, for each load by itself. Credit is small; who has lost it
rests, each time longer (a bound on what exploring may lose, as in "Conservative bandits", Wu 2016): in the
long run that is `FIRST_SHARE` of the credit in `LONGEST_REST` steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_CREDIT = 4.0  # plain steps; whoever has won so much has proven itself
SPREAD = 6.0  # over the root of the load: more is none either, as the luck of many sequences levels out
FIRST_SHARE = 0.375  # of it may be lost to begin with, and after a rest
SHORTEST_REST, LONGEST_REST = 64, 1024  # steps


@dataclass(slots=True)
class _Account:
    most: float
    credit: float
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
        account.credit = min(account.most, account.credit + won)
        if account.credit >= account.most:
            account.rest = SHORTEST_REST
        elif account.credit < 0:
            account.num_left = account.rest
            account.rest = min(2 * account.rest, LONGEST_REST)
            account.credit = FIRST_SHARE * account.most

    def _account(self, num_committed: int) -> _Account:
        load = num_committed.bit_length()
        if load not in self._accounts:
            most = most_credit(num_committed)
            self._accounts[load] = _Account(most, FIRST_SHARE * most)
        return self._accounts[load]


def most_credit(num_committed: int) -> float:
    return min(MOST_CREDIT, SPREAD / math.sqrt(num_committed))
