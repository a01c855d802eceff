"""The KV of a draft model, in pages of its own.

Nobody is promised room here: when pages run out, the sequence that was used least recently loses all of its
own, and its drafter computes them again when it is asked for that sequence next. Windows do not slide: the
pages of every group are kept as long as their sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from engine.batch import BatchBuilder
from engine.kv_storage import KVStorage
from engine.models.kv_groups import kv_groups, page_values
from engine.weights.errors import CheckpointError
from scheduler.plan import Slice, StepPlan
from scheduler.types import Visibility

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

    import torch

    from cuda_kernels.ops import Operations
    from engine.drafting.surroundings import Surroundings
    from engine.models.config import TransformerConfig
    from engine.models.transformer import Rows

TREE_SLOTS = 64  # beyond a sequence's own: nodes of a tree, or masks
FREE_SHARE = 0.5  # of the memory that is free, at most


class DraftPiece(NamedTuple):
    """Tokens of one sequence that one pass of a draft model computes; see `scheduler.plan.Slice`.

    They fill slots `start ..`, at most as many as hold valid KV already. Of a tree, `num_window` nodes end
    with the last of the tokens: where that is more than there are tokens, the earlier nodes lie in the slots
    before `start`. `ancestors` has a word over all of them for each of the tokens that is a node.
    """

    seq_id: int
    tokens: tuple[int, ...]
    positions: SequenceOf[int]
    start: int
    num_logits: int
    num_window: int = 0
    visibility: Visibility = Visibility.CAUSAL
    ancestors: tuple[int, ...] = ()


@dataclass(slots=True)
class _Held:
    blocks: list[int] = field(default_factory=list)
    num_sent: int = 0  # leading blocks that the page table knows
    length: int = 0  # leading slots that hold valid KV


class DraftKV:
    """`max_len`: the most slots of a sequence, nodes of trees included."""

    def __init__(
        self,
        config: TransformerConfig,
        ops: Operations,
        num_pages: int,
        page_size: int,
        max_len: int,
        max_seqs: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        self.max_seqs = max_seqs
        self.num_groups = len(kv_groups(config))  # a block is a page of each
        self.num_blocks = num_pages // self.num_groups
        self.storage = KVStorage(config, num_pages, page_size, dtype, device)
        self.batches = BatchBuilder(config, ops, page_size, max_len, max_seqs, device)
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._held: OrderedDict[int, _Held] = OrderedDict()  # least recently used first

    @classmethod
    def beside(cls, around: Surroundings, config: TransformerConfig, free_bytes: int) -> DraftKV:
        """Room for as many tokens as the target has, in at most a share of the memory that is free. `config`:
        from `for_context`. Raises CheckpointError where that does not hold one sequence."""
        page_size = around.batches.page_size
        max_len = min(around.max_model_len, config.max_positions) + TREE_SLOTS
        of_target = around.storage.pages.shape[0] // len(around.batches.groups)
        of_one = -(-max_len // page_size)
        block_bytes = page_values(config, page_size) * len(kv_groups(config)) * around.dtype.itemsize
        num_blocks = min(
            max(of_target, of_one), of_one * around.max_num_seqs, int(free_bytes * FREE_SHARE) // block_bytes
        )
        if num_blocks < of_one:
            raise CheckpointError(
                f"the KV of a draft model takes {of_one * block_bytes} bytes for one sequence, and may take "
                f"half of {max(free_bytes, 0)} free: lower max_model_len or kv_cache_bytes"
            )
        return cls(
            config,
            around.ops,
            num_blocks * len(kv_groups(config)),
            page_size,
            max_len,
            around.max_num_seqs,
            around.dtype,
            around.device,
        )

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def length(self, seq_id: int) -> int:
        """Leading slots of the sequence that hold valid KV; 0 when it is unknown."""
        held = self._held.get(seq_id)
        return held.length if held is not None else 0

    def crop(self, seq_id: int, length: int) -> None:
        """Slots from `length` on hold nothing that is valid any more; whole blocks of them are free."""
        held = self._held.get(seq_id)
        if held is None or held.length <= length:
            return
        held.length = length
        self._give_back(held, -(-length // self.page_size))

    def release(self, seq_id: int) -> None:
        """Forget the sequence. Unknown ones are ignored."""
        held = self._held.pop(seq_id, None)
        if held is not None:
            self._give_back(held, 0)
            self.batches.release(seq_id)

    def reserve(self, wanted: Iterable[tuple[int, int]]) -> set[int]:
        """wanted: (seq_id, slots) -> those, from the first on, that now have room for so many at the same
        time. Others lose theirs for them, least recently used first; those wanted before them do not."""
        kept: set[int] = set()
        for seq_id, num_slots in wanted:
            if self._provide(seq_id, num_slots, kept | {seq_id}):
                kept.add(seq_id)
        return kept

    def rows(self, pieces: list[DraftPiece]) -> Rows:
        """What a transformer computes, with pages for it; their KV counts as valid from now on. Of what was
        not reserved before there must be enough beside the pieces themselves."""
        users = {piece.seq_id for piece in pieces}
        slices = []
        for piece in pieces:
            assert piece.start <= self.length(piece.seq_id), "a hole before the piece"
            end = piece.start + len(piece.tokens)
            fits = self._provide(piece.seq_id, end, users)
            assert fits, "a piece without room: reserve it first"
            held = self._held[piece.seq_id]
            slices.append(self._slice(piece, held))
            held.length = end
        return self.batches.build(StepPlan(0, tuple(slices)))

    def keep(self, paths: list[tuple[int, int, tuple[int, ...]]]) -> None:
        """paths: (seq_id, slot, nodes) of sequences that hold a tree from `slot` on. The nodes of these
        numbers, a path, move to the tree's first slots; the rest of the tree is gone."""
        scattered = [path for path in paths if path[2] and path[2][-1] >= len(path[2])]
        if scattered:
            self.batches.move(self.storage, scattered)
        for seq_id, begin, nodes in paths:
            self.crop(seq_id, begin + len(nodes))

    def _slice(self, piece: DraftPiece, held: _Held) -> Slice:
        first, held.num_sent = held.num_sent, len(held.blocks)
        pages = tuple(self._pages(held.blocks[first:]))
        return Slice(
            seq_id=piece.seq_id,
            start=piece.start,
            tokens=piece.tokens,
            positions=piece.positions,
            first_new_page=first * self.num_groups,
            new_pages=pages,
            num_logits=piece.num_logits,
            num_window=piece.num_window,
            visibility=piece.visibility,
            ancestors=piece.ancestors,
        )

    def _provide(self, seq_id: int, num_slots: int, users: set[int]) -> bool:
        """Blocks for the first `num_slots` slots, taken from those who are no users if need be."""
        if num_slots > self.batches.max_slots:
            return False
        held = self._held.get(seq_id)
        missing = -(-num_slots // self.page_size) - (len(held.blocks) if held is not None else 0)
        is_short = missing > len(self._free) or (held is None and len(self._held) == self.max_seqs)
        if is_short and not self._make_room(missing, held is None, users):
            return False
        if held is None:
            held = self._held[seq_id] = _Held()
        self._held.move_to_end(seq_id)
        fresh = [self._free.pop() for _ in range(missing)]
        if fresh and self.storage.tainted:
            self.storage.clear(self._pages(fresh))
        held.blocks += fresh
        return True

    def _make_room(self, num_blocks: int, is_new: bool, users: set[int]) -> bool:
        """So many free blocks, and a table for a new sequence, or nothing changes."""
        others = [other for other in self._held if other not in users]
        room = len(self._free) + sum(len(self._held[other].blocks) for other in others)
        if num_blocks > room or (is_new and len(self._held) - len(others) >= self.max_seqs):
            return False
        for other in others:
            if num_blocks <= len(self._free) and not (is_new and len(self._held) == self.max_seqs):
                break
            self.release(other)
        return True

    def _give_back(self, held: _Held, num_kept: int) -> None:
        self._free += reversed(held.blocks[num_kept:])
        del held.blocks[num_kept:]
        held.num_sent = min(held.num_sent, num_kept)

    def _pages(self, blocks: list[int]) -> list[int]:
        groups = range(self.num_groups)
        return [block * self.num_groups + group for block in blocks for group in groups]
