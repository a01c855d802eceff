"""What all drafters guess for one sequence, as one tree: a draft that several propose is computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from engine.drafting.acceptance import SUREST
from engine.drafting.guess import ROOT, Guess, take
from engine.messages import Verified
from scheduler.types import Visibility, Window

if TYPE_CHECKING:
    from collections.abc import Collection
    from collections.abc import Sequence as SequenceOf


class Proposal(NamedTuple):
    """One drafter's guess. `chances[k]`: that draft k stands if the one that it follows does."""

    drafter: str
    guess: Guess
    chances: SequenceOf[float]


class DraftTree:
    """Draft k follows draft `parents[k]` < k; `chances[k]` is that it stands, and so all that it follows.

    Where drafters agree on a draft the most hopeful is believed, and counts as its author.
    """

    def __init__(self, proposals: SequenceOf[Proposal]) -> None:
        self.proposals = proposals
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.authors: list[str] = []
        self.places: list[list[int]] = []  # of each proposal's drafts
        alone: list[float] = []  # chances where what they follow stands
        found: dict[tuple[int, int], int] = {}  # what it follows, token -> draft
        for drafter, guess, chances in proposals:
            places: list[int] = []
            for token, before, chance in zip(guess.tokens, guess.parents, chances, strict=True):
                parent = places[before] if before != ROOT else ROOT
                place = found.setdefault((parent, token), len(self.tokens))
                places.append(place)
                if place == len(self.tokens):
                    self.tokens.append(token)
                    self.parents.append(parent)
                    self.authors.append(drafter)
                    alone.append(chance)
                elif chance > alone[place]:
                    self.authors[place] = drafter
                    alone[place] = chance
            self.places.append(places)
        self.chances = self._chances(alone)

    def _chances(self, alone: list[float]) -> list[float]:
        """Only one of several drafts can stand at a place: together they have no more than `SUREST`."""
        sums: dict[int, float] = {}
        for parent, chance in zip(self.parents, alone, strict=True):
            sums[parent] = sums.get(parent, 0.0) + chance
        chances: list[float] = []
        for parent, chance in zip(self.parents, alone, strict=True):
            before = chances[parent] if parent != ROOT else 1.0
            chances.append(before * chance * min(1.0, SUREST / sums[parent]) if chance else 0.0)
        return chances

    def __len__(self) -> int:
        return len(self.tokens)

    def within(self, room: int) -> list[int]:
        """The drafts that may be computed where a tree has room for so many: all of a line, as it needs
        none; else the likeliest line or the likeliest part of the tree, whichever promises more."""
        if len(self) <= room or self.parents == list(range(ROOT, len(self) - 1)):
            return list(range(len(self)))
        ordered = sorted(range(len(self)), key=lambda draft: (-self.chances[draft], draft))
        part = sorted(ordered[: max(0, room)])
        line: list[int] = []
        at = ROOT
        children: dict[int, int] = {}
        for draft in ordered:
            children.setdefault(self.parents[draft], draft)
        while (draft := children.get(at, ROOT)) != ROOT:
            line.append(draft)
            at = draft
        return max(part, line, key=lambda drafts: sum(self.chances[draft] for draft in drafts))

    def window(self, drafts: SequenceOf[int]) -> Window:
        """Some drafts, in their order and each with all that it follows, as a window to be verified."""
        number = {draft: index for index, draft in enumerate(drafts)}
        tokens = tuple(self.tokens[draft] for draft in drafts)
        parents = [number[self.parents[draft]] if self.parents[draft] != ROOT else ROOT for draft in drafts]
        if parents == list(range(ROOT, len(drafts) - 1)):
            return Window(tokens, tuple(range(len(drafts))), optional=True)
        depths: list[int] = []
        words: list[int] = []
        for index, parent in enumerate(parents):
            depths.append(depths[parent] + 1 if parent != ROOT else 0)
            words.append((words[parent] if parent != ROOT else 0) | 1 << index)
        return Window(tokens, tuple(depths), Visibility.ANCESTORS, tuple(words), optional=True)

    def beside(self, path: SequenceOf[int], text: SequenceOf[int]) -> tuple[set[int], set[int]]:
        """The text went on with these tokens, along a path that stood -> drafts of which it says whether they
        were right, computed or not: the path's and those beside it; and those that were."""
        following = dict(zip((ROOT, *path), text, strict=False))
        known = {draft for draft, parent in enumerate(self.parents) if parent in following}
        return known, {draft for draft in known if self.tokens[draft] == following[self.parents[draft]]}

    def part_of(self, number: int, drafts: Collection[int], stood: Collection[int]) -> tuple[Guess, set[int]]:
        """Of a proposal what is known, and which of it stood; `drafts`, `stood` are of the tree."""
        places = self.places[number]
        kept = [draft for draft, place in enumerate(places) if place in drafts]
        right = {index for index, draft in enumerate(kept) if places[draft] in stood}
        return take(self.proposals[number].guess, kept), right

    def verified(self, drafts: SequenceOf[int], path: SequenceOf[int]) -> tuple[Verified, ...]:
        """Drafts that were computed, and the path that stood -> what became of them, by author."""
        counts: dict[str, int] = {}
        for draft in drafts:
            counts[self.authors[draft]] = counts.get(self.authors[draft], 0) + 1
        return tuple(
            Verified(
                author,
                count,
                tuple(depth for depth, draft in enumerate(path) if self.authors[draft] == author),
            )
            for author, count in counts.items()
        )
