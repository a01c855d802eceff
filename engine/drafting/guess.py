"""The seam between drafters and the rest: a drafter guesses what comes next; it is never trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence as SequenceOf

    import torch

    from scheduler.types import Sequence

ROOT = -1  # the parent of drafts that follow the last committed token


class Want(NamedTuple):
    """A sequence with only its last token left to compute, and how many drafts it may have."""

    sequence: Sequence
    limit: int


class Guess(NamedTuple):
    """Tokens that may follow, as a tree: draft k follows draft `parents[k]` < k. Siblings differ.

    `kinds[k]` classes how well founded draft k is (small numbers; larger is not better, only other): how
    often drafts of a kind stand where their parent stands is learned. `beliefs[k]`, of 0 .. 1, is what the
    drafter thinks of that before anything is learned.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    kinds: tuple[int, ...] = ()
    beliefs: tuple[float, ...] = ()


NO_GUESS = Guess()
# Known by its identity: the drafter still reads what the sequence has, and drafts for it later. This says
# nothing of the worth of its drafts, nor does the time of such a call say what guesses take.
CATCHING_UP = Guess()


def line(tokens: SequenceOf[int], kinds: SequenceOf[int], belief: float) -> Guess:
    """Each token follows the one before it."""
    count = len(tokens)
    return Guess(tuple(tokens), tuple(range(ROOT, count - 1)), tuple(kinds), (belief,) * count)


def take(guess: Guess, drafts: SequenceOf[int]) -> Guess:
    """Some drafts of a guess, in their order, and with each the one that it follows."""
    number = {ROOT: ROOT} | {draft: index for index, draft in enumerate(drafts)}
    return Guess(
        tuple(guess.tokens[draft] for draft in drafts),
        tuple(number[guess.parents[draft]] for draft in drafts),
        tuple(guess.kinds[draft] for draft in drafts),
        tuple(guess.beliefs[draft] for draft in drafts),
    )


class Seen(NamedTuple):
    """What a step has computed of one sequence, which is as it was before the step.

    `tokens` fill its slots from `start` on: committed ones, then drafts, whoever guessed them, where draft k
    follows draft `parents[k]`. `drawn` is what the target says after the last committed token, then after
    each draft, if those before it were right (where they were not, it may be the likeliest token instead of
    a draw); it is empty when the slice ends before the last committed token. `kept` are the drafts that
    stood, from the root on. `features` [tokens, hidden]: the target's hidden states at each of the drafter's
    taps, in the model's dtype; they live as long as the step.
    `logits` float32 [drawn, vocab] likewise.
    """

    sequence: Sequence
    start: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    drawn: tuple[int, ...]
    kept: tuple[int, ...]
    features: tuple[torch.Tensor, ...]
    logits: torch.Tensor | None


class Drafter(Protocol):
    """Keeps what it needs between calls; sequences are read, never changed. No two calls run at a time.

    `taps`: hidden states of the target that it wants to see (`Transformer.compute`), of every slice of the
    sequences that it may draft for, prompts included, except what was found in a cache.
    """

    taps: tuple[int, ...]

    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        """One for each want, of at most `limit` drafts; it may be empty."""
        ...

    def observe(self, seen: SequenceOf[Seen]) -> None:
        """After a step, before its tokens are committed."""
        ...

    def release(self, sequence: Sequence) -> None:
        """The sequence has ended; its tokens are final."""
        ...


@runtime_checkable
class DraftsAhead(Protocol):
    """A drafter that can go on with its guesses while the target verifies them."""

    def ahead(self, sequences: SequenceOf[Sequence]) -> Iterator[None]:
        """Of sequences that it has just guessed for. Each item is a piece of work that ends soon. They are
        taken in another thread, as many as there is time for, before anything else is asked of the drafter.
        """
        ...
