"""The seam between drafters and the rest: a drafter guesses what comes next; it is never trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from scheduler.types import Sequence


class Guess(NamedTuple):
    """A line of tokens that may follow. `evidence` classes how well founded it is (larger is not better,
    only other): acceptance is learned for each class."""

    tokens: tuple[int, ...]
    evidence: int


NO_GUESS = Guess((), 0)


class Drafter(Protocol):
    """Keeps what it needs between calls; sequences are read, never changed."""

    def guess(self, sequence: Sequence, limit: int) -> Guess:
        """At most `limit` tokens after the sequence's committed ones; it may have none."""
        ...

    def observe(self, sequence: Sequence, computed: SequenceOf[int], drawn: SequenceOf[int]) -> None:
        """A step has computed the last committed token and then drafts (`computed`), whoever guessed them;
        `drawn[k]` is what the target says after `computed[k]`, if those before it were right. The sequence
        is as it was before."""
        ...

    def release(self, sequence: Sequence) -> None:
        """The sequence has ended; its tokens are final."""
        ...
