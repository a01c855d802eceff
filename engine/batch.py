"""A plan's slices as arrays: page tables live here, everything else is rebuilt each step."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from cuda_kernels.slices import SliceTable
from engine.models.kv_groups import KVGroup, kv_groups
from engine.models.layers import Rows
from scheduler.types import Visibility

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from numpy.typing import NDArray

    from cuda_kernels.ops import Operations
    from engine.kv_storage import KVStorage
    from engine.models.config import TransformerConfig
    from scheduler.plan import Slice, StepPlan


class BatchBuilder:
    """Keeps the page table of every sequence that holds pages; nothing about tokens. Entry
    `block * groups + group` of a table is a page, as in `scheduler.plan.Slice`."""

    def __init__(
        self,
        config: TransformerConfig,
        ops: Operations,
        page_size: int,
        max_model_len: int,
        max_num_seqs: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.groups = kv_groups(config)
        self.ops = ops
        self.page_size = page_size
        self.max_slots = -(-max_model_len // page_size) * page_size
        self.device = device
        num_entries = self.max_slots // page_size * len(self.groups)
        self._tables = np.zeros((max_num_seqs, num_entries), dtype=np.int64)
        self._row_of: dict[int, int] = {}  # sequence -> row of the tables
        self._free_rows = list(range(max_num_seqs))

    @property
    def num_tables(self) -> int:
        return len(self._row_of)

    def release(self, seq_id: int) -> None:
        """The sequence holds no pages any more. Unknown ones are ignored."""
        row = self._row_of.pop(seq_id, None)
        if row is not None:
            self._free_rows.append(row)

    def build(self, plan: StepPlan) -> Rows:
        """What a plan's slices are computed from. Doing it again changes nothing."""
        slices = plan.slices
        rows_of_tables = [self._extended_table(piece) for piece in slices]
        counts = np.array([len(piece.tokens) for piece in slices], dtype=np.int64)
        starts = np.array([piece.start for piece in slices], dtype=np.int64)
        first_rows = np.cumsum(counts) - counts
        owner = np.repeat(np.arange(len(slices)), counts)
        slots = np.arange(len(owner)) + (starts - first_rows)[owner]
        lengths = starts + counts
        begins = lengths - np.array([piece.num_window for piece in slices], dtype=np.int64)
        num_entries = -(-int(lengths.max()) // self.page_size) * len(self.groups)
        entries = self._tables[rows_of_tables, :num_entries]
        pages = [self._pages(entries, group, np.minimum(starts, begins)) for group in range(len(self.groups))]
        ends, words = _visibility(slices, slots, first_rows, begins)
        positions = np.fromiter(
            chain.from_iterable(piece.positions for piece in slices), np.int64, len(owner)
        )
        blocks, offsets = np.divmod(slots, self.page_size)
        config = self.config
        tables = []
        for group, table in zip(self.groups, pages, strict=True):
            seen_from = _starts(group, positions)
            shown = _nearest(words, positions + 1 - seen_from) if group.span else words
            tables.append(
                SliceTable(first_rows, counts, lengths, table, seen_from, ends, shown, self.page_size)
            )
        return Rows(
            tokens=self._padded(list(chain.from_iterable(piece.tokens for piece in slices))),
            positions=self._padded(positions.tolist()),
            num_rows=len(owner),
            kv_rows=tuple(self._kv_rows(table[owner, blocks], offsets) for table in pages),
            attention=tuple(
                self.ops.plan_attention(table, config.num_heads, config.num_kv_heads, self.device)
                for table in tables
            ),
            wanted=self.row_index(_wanted_rows(slices, first_rows)),
        )

    def row_index(self, rows: list[int]) -> torch.Tensor:
        """Rows of a batch as the model takes them."""
        return self._tensor(np.array(rows, dtype=np.int64))

    def move(self, storage: KVStorage, moves: SequenceOf[tuple[int, int, tuple[int, ...]]]) -> None:
        """Of each sequence (its id, the slot where its window begins, the window's tokens that stay, in
        their order): the KV of the i-th that stays comes to lie in the window's slot i, in every layer."""
        found = [
            (self._row_of[seq_id], begin + token, begin + place)
            for seq_id, begin, kept in moves
            for place, token in enumerate(kept)
            if token != place
        ]
        if found:
            tables, sources, targets = np.array(found, dtype=np.int64).T
            storage.move(self._cells(tables, sources), self._cells(tables, targets))

    def clear(self, storage: KVStorage, pieces: SequenceOf[Slice]) -> None:
        """The KV of these slices, in every layer, becomes zero."""
        for piece in pieces:
            slots = np.arange(piece.start, piece.start + len(piece.tokens))
            storage.clear_slots(self._cells(np.full_like(slots, self._extended_table(piece)), slots))

    def _cells(self, tables: NDArray[np.int64], slots: NDArray[np.int64]) -> torch.Tensor:
        """Slots of sequences -> flat rows in [num_pages, Hkv, page_size], those of every group and head."""
        num_groups = len(self.groups)
        blocks, offsets = np.divmod(slots, self.page_size)
        pages = self._tables[tables[:, None], blocks[:, None] * num_groups + np.arange(num_groups)]
        return self._kv_rows(pages.reshape(-1), np.repeat(offsets, num_groups))

    def _extended_table(self, piece: Slice) -> int:
        """-> the row of the slice's page table, which knows its new pages"""
        row = self._row_of.get(piece.seq_id)
        if row is None:
            row = self._row_of[piece.seq_id] = self._free_rows.pop()
        if piece.new_pages:
            first = piece.first_new_page
            self._tables[row, first : first + len(piece.new_pages)] = piece.new_pages
        return row

    def _pages(self, entries: NDArray[np.int64], group: int, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tables [S, entries] and the first positions that are computed -> pages of one group [S, blocks].

        Pages behind a window may be another's by now: the first one that is seen stands for them, so that
        a kernel that reads whole blocks of keys reads finite numbers there.
        """
        pages = entries[:, group :: len(self.groups)]
        span = self.groups[group].span
        if not span or int(starts.max()) < span:
            return pages
        first_seen = np.maximum(starts + 1 - span, 0) // self.page_size
        seen = np.maximum(np.arange(pages.shape[1]), first_seen[:, None])
        return np.take_along_axis(pages, seen, axis=1)

    def _kv_rows(self, pages: NDArray[np.int64], offsets: NDArray[np.int64]) -> torch.Tensor:
        """Flat rows in [num_pages, Hkv, page_size]: one per token and head."""
        heads = np.arange(self.config.num_kv_heads)
        flat = (pages[:, None] * self.config.num_kv_heads + heads) * self.page_size + offsets[:, None]
        return self._tensor(flat.reshape(-1))

    def _padded(self, values: list[int]) -> torch.Tensor:
        values.extend([0] * (-len(values) % self.ops.row_multiple))
        return self._tensor(np.array(values, dtype=np.int64))

    def _tensor(self, array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _wanted_rows(slices: tuple[Slice, ...], first_rows: NDArray[np.int64]) -> list[int]:
    wanted: list[int] = []
    for piece, first in zip(slices, first_rows.tolist(), strict=True):
        end = first + len(piece.tokens)
        wanted.extend(range(end - piece.num_logits, end))
    return wanted


def _starts(group: KVGroup, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first slot that each row may see; committed slots are positions."""
    if group.window:
        return np.maximum(positions + 1 - group.window, 0)
    return positions // group.chunk * group.chunk if group.chunk else np.zeros_like(positions)


def _visibility(
    slices: tuple[Slice, ...],
    slots: NDArray[np.int64],
    first_rows: NDArray[np.int64],
    begins: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The rule of `SliceTable`: causal everywhere, except in windows (from slot `begins` on) that say
    otherwise. A drafter computes a window in parts: then the slice has only its last tokens."""
    ends = slots + 1
    words = np.zeros(len(slots), dtype=np.uint64)
    for piece, first, begin in zip(slices, first_rows.tolist(), begins.tolist(), strict=True):
        if piece.visibility is Visibility.CAUSAL or not piece.num_window:
            continue
        count = len(piece.tokens)
        rows = slice(first + max(0, count - piece.num_window), first + count)
        if piece.visibility is Visibility.ALL:
            ends[rows] = piece.start + count
        else:
            ends[rows] = begin
            words[rows] = piece.ancestors
    return ends, words


def _nearest(words: NDArray[np.uint64], num_seen: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Of each row's ancestors, itself included, only the last `num_seen`; what is further up lies behind its
    window. A tree's slots are no positions, but from one ancestor to the next is one position."""
    nearest = words.copy()
    for row in np.flatnonzero(words).tolist():
        word = int(words[row])
        for _ in range(word.bit_count() - int(num_seen[row])):
            word &= word - 1  # the earliest one goes
        nearest[row] = word
    return nearest
