"""Common prefixes: who waits for whom to compute one, and which slices of a step share one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.plan import SharedPages

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from scheduler.page_tables import PageTables
    from scheduler.plan import Slice
    from scheduler.types import Sequence


class Frontier:
    """The pages that running sequences compute next, by the keys that they will have.

    What runs before a page of it is findable, so who finds everything up to such a page and wants that
    page too shares all before it, and may wait for the rest.
    """

    def __init__(self, tables: PageTables, running: Iterable[Sequence]) -> None:
        self._tables = tables
        self._computing: dict[bytes, Sequence] = {}
        for sequence in running:
            if sequence.num_computed < sequence.num_known:
                self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        """A running sequence; one without a whole known page to compute is ignored."""
        tables = self._tables
        number = sequence.num_computed // tables.page_size
        whole = (number + 1) * tables.page_size
        if (
            whole <= min(sequence.num_known, len(sequence.tokens))
            and sequence.num_findable == sequence.num_computed
        ):
            self._computing.setdefault(tables.key(sequence, number * tables.num_groups), sequence)

    def computing_for(
        self, sequence: Sequence, num_found: int, min_tokens: int
    ) -> tuple[Sequence, int] | None:
        """Who computes the block after the `num_found` found ones, and up to which token both are the
        same; None if that would save fewer than `min_tokens`."""
        tables = self._tables
        if not self._computing or num_found >= tables.num_shareable(sequence):
            return None
        other = self._computing.get(tables.key(sequence, num_found * tables.num_groups))
        if other is None:
            return None
        size = tables.page_size
        last = min(tables.num_shareable(sequence), other.num_known // size)
        end = num_found + 1
        while (
            end < last
            and sequence.tokens[end * size : end * size + size]
            == (other.tokens[end * size : end * size + size])
        ):
            end += 1
        return (other, end * size) if (end - num_found) * size >= min_tokens else None


def shared_pages(
    tables: PageTables, sequences: Mapping[int, Sequence], slices: Iterable[Slice], min_tokens: int
) -> tuple[SharedPages, ...]:
    """Groups of two or more of a step's sequences with the same leading blocks, all computed before, as
    many as hold `min_tokens`; in the layers that see everything, for the others see too little of them."""
    size, num_groups = tables.page_size, tables.num_groups
    if not tables.spans.num_whole:
        return ()
    least = -(-min_tokens // size)  # the blocks that all of a group have at least
    least_tokens, references = least * size, tables.pool.references
    last, end = (least - 1) * num_groups, least * num_groups
    groups: dict[tuple[int, ...], list[tuple[Sequence, int]]] = {}
    for piece in slices:
        if piece.start >= least_tokens:
            sequence = sequences[piece.seq_id]
            if references[sequence.pages[last]] > 1:
                group = groups.setdefault(tuple(sequence.pages[:end:num_groups]), [])
                group.append((sequence, piece.start // size))
    return tuple(
        SharedPages(_common(members, num_groups), tuple(sequence.seq_id for sequence, _ in members))
        for members in groups.values()
        if len(members) > 1
    )


def _common(members: list[tuple[Sequence, int]], num_groups: int) -> int:
    """How many leading blocks, of the full ones that each has, all have in common."""
    tables = [sequence.pages for sequence, _ in members]
    if num_groups > 1:
        tables = [pages[::num_groups] for pages in tables]
    limit = min(full_blocks for _, full_blocks in members)
    # What the least and the greatest of several lists begin with, all of them begin with.
    for number, (one, other) in enumerate(zip(min(tables), max(tables), strict=False)):
        if one != other or number == limit:
            return number
    return limit
