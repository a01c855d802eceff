"""The target's own KV as a draft may use it: read where it is committed, written to pages of nobody.

A sequence's page table is followed up to the slot where the draft begins; from that slot's block on scratch
pages stand in its place, the first of them with a copy of what the block holds. Nothing outlives a call: what
the target makes of the drafts, it computes itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.batch import BatchBuilder
from engine.models.kv_groups import kv_groups
from scheduler.plan import Slice, StepPlan
from scheduler.spans import NO_PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.surroundings import Surroundings
    from engine.models.config import TransformerConfig
    from engine.models.transformer import Rows
    from scheduler.types import Sequence

SCRATCH_BLOCKS = 32  # of pages: two or three for each sequence that is drafted for at a time


def num_scratch_pages(config: TransformerConfig) -> int:
    """How many a `KVStorage` needs that drafts may be computed in."""
    return SCRATCH_BLOCKS * len(kv_groups(config))


class Stretch(NamedTuple):
    """`length` slots of a sequence from `start` on, that are to be computed; those before it are."""

    sequence: Sequence
    start: int
    length: int


class Piece(NamedTuple):
    """Tokens of a sequence, in its slots from `start` on."""

    seq_id: int
    start: int
    tokens: tuple[int, ...]


class ScratchPages:
    def __init__(self, around: Surroundings) -> None:
        self._storage = around.storage
        self._page_size = around.batches.page_size
        self._groups = around.batches.groups
        self.max_slots = around.batches.max_slots
        self.num_blocks = len(self._storage.scratch) // len(self._groups)
        self._builder = BatchBuilder(
            around.model.config, around.ops, self._page_size, self.max_slots, self.num_blocks, around.device
        )
        self._lent: list[int] = []
        self._unsaid: dict[int, tuple[int, ...]] = {}  # page tables that the builder does not know yet

    def fits(self, start: int) -> int:
        """The most slots from `start` on that there can be pages for."""
        return min(self.num_blocks * self._page_size - start % self._page_size, self.max_slots - start)

    def readable(self, sequence: Sequence, start: int) -> bool:
        """Whether all that a token in slot `start` sees is still there: windows let go of pages."""
        firsts = [max(0, start + 1 - group.span) if group.span else 0 for group in self._groups]
        entries = [first // self._page_size * len(self._groups) + group for group, first in enumerate(firsts)]
        return start == 0 or all(sequence.pages[entry] != NO_PAGE for entry in entries)

    def batches(self, stretches: Iterable[Stretch]) -> Iterator[list[Stretch]]:
        """In order, as many at a time as there are pages for."""
        together: list[Stretch] = []
        taken = 0
        for stretch in stretches:
            needed = self._num_blocks(stretch)
            if taken + needed > self.num_blocks:
                yield together
                together, taken = [], 0
            together.append(stretch)
            taken += needed
        if together:
            yield together

    def lend(self, stretches: SequenceOf[Stretch]) -> None:
        """Pages for these; those lent before are taken back."""
        for seq_id in self._lent:
            self._builder.release(seq_id)
        self._lent = [stretch.sequence.seq_id for stretch in stretches]
        width, scratch = len(self._groups), self._storage.scratch
        taken = 0
        copies: list[tuple[int, int]] = []
        for stretch in stretches:
            pages, first = stretch.sequence.pages, stretch.start // self._page_size * width
            lent = scratch[taken : taken + self._num_blocks(stretch) * width]
            taken += len(lent)
            self._unsaid[stretch.sequence.seq_id] = (*pages[:first], *lent)
            if stretch.start % self._page_size:
                begun = zip(pages[first : first + width], lent, strict=False)
                copies += [(page, copy) for page, copy in begun if page != NO_PAGE]
        # Finite everywhere, also where no row looks: a NaN would spread even from a weight of 0.
        self._storage.clear(list(scratch[:taken]))
        self._copy(copies)

    def rows(self, pieces: Iterable[Piece]) -> Rows:
        """Of sequences that have pages; logits are wanted of every token."""
        slices = tuple(
            Slice(
                piece.seq_id,
                piece.start,
                piece.tokens,
                range(piece.start, piece.start + len(piece.tokens)),
                0,
                self._unsaid.pop(piece.seq_id, ()),
                num_logits=len(piece.tokens),
            )
            for piece in pieces
        )
        return self._builder.build(StepPlan(0, slices))

    def _num_blocks(self, stretch: Stretch) -> int:
        size = self._page_size
        return (stretch.start + stretch.length - 1) // size - stretch.start // size + 1

    def _copy(self, pages: list[tuple[int, int]]) -> None:
        """Each (from, to)."""
        if pages:
            cells = self._storage.pages
            sources, targets = torch.tensor(pages, dtype=torch.int64, device=cells.device).unbind(1)
            cells[targets] = cells[sources]
