"""Attention over pages in plain torch: the definition that faster kernels are held against.

It walks the keys in blocks of `KEY_BLOCK` slots counted from the start of the sequence and merges the
blocks in that order, from the first one that a row of the slice can see; so a row's sums depend on the row
alone, whatever else is in the batch.

In the block of its own slot a row's sums over keys are matrix products, that of its weights too. They add in
the order of the keys, and a weight of exactly 0 adds nothing: the sums depend on what the row sees, in which
order, and not on what lies hidden between. So a row of a tree has the bits of plain decoding, as long as the
whole tree lies in one block. In other blocks nothing lies hidden between, and `Tensor.sum` is faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from cuda_kernels.reference import ROW_MULTIPLE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cuda_kernels.slices import SliceTable

KEY_BLOCK = 128
MASKED = -1e30  # finite: a block that a row cannot see at all then merges with weight exactly 0
LEAST_EXPONENT = -80.0  # of e; libraries take up to 15 times as long over a result that underflows
LEAST_WEIGHT = 2e-35  # a bit more than that result: smaller weights are exactly 0, those of hidden slots too
SUM_COLUMNS = 16  # of ones: with fewer, matrix libraries pick loops that are slower, or add in another order
MAX_BATCHED_ROWS = 16  # slices up to this many rows share a launch; longer ones go one by one


@dataclass(frozen=True, slots=True)
class _KeyBlock:
    """Of each of a group's first `num_slices` slices, the j-th block that it can see."""

    num_slices: int
    gather: torch.Tensor  # [num_slices * Hkv * pages] flat (page, head)
    hidden: torch.Tensor | None  # bool [num_slices, 1, n, 1, KEY_BLOCK]: what a row may not see
    own: torch.Tensor | None  # bool [num_slices * Hkv, padded n * group, 1]: rows whose slot lies in it


@dataclass(frozen=True, slots=True)
class _Group:
    """Slices of about the same row count, those that see the most blocks first, computed together."""

    rows: torch.Tensor  # [S, n] row of the batch behind each place; padding repeats the last row
    out_from: torch.Tensor  # flat places that are real
    out_to: torch.Tensor  # the batch rows they belong to
    blocks: tuple[_KeyBlock, ...]


class ReferenceAttention:
    """Grouped-query attention over pages with slice visibility, online softmax over fixed key blocks."""

    def __init__(self, table: SliceTable, num_heads: int, num_kv_heads: int, device: torch.device) -> None:
        assert KEY_BLOCK % table.page_size == 0, "a key block must hold whole pages"
        self.num_kv_heads = num_kv_heads
        self.group = num_heads // num_kv_heads
        self.device = device
        self.heads = np.arange(num_kv_heads)[:, None]
        self.ones = torch.ones(KEY_BLOCK, SUM_COLUMNS, device=device)
        first_blocks = np.minimum.reduceat(table.starts, table.first_rows) // KEY_BLOCK
        counts = -(-table.lengths // KEY_BLOCK) - first_blocks
        self.groups = [
            self._plan_group(table, members, first_blocks[members], counts[members])
            for members in _group_slices(table.num_rows, counts)
        ]

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        scaled = query.float() * scale
        for group in self.groups:
            result = self._attend(group, scaled, keys, values, soft_cap, sinks)
            out.index_copy_(0, group.out_to, result.index_select(0, group.out_from))
        return out

    def _attend(
        self,
        group: _Group,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        soft_cap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """-> [S * n, Hq, D]"""
        slices, places = group.rows.shape
        heads, size = self.num_kv_heads, query.shape[-1]
        folded = query[group.rows].view(slices, places, heads, self.group, size).permute(0, 2, 1, 3, 4)
        folded = folded.reshape(slices * heads, places * self.group, size)
        padding = -folded.shape[1] % ROW_MULTIPLE
        folded = F.pad(folded, (0, 0, 0, padding))
        top = total = merged = torch.empty(0)
        for first, block in enumerate(group.blocks):
            live = block.num_slices * heads
            key = _gather(keys, block.gather, live)
            value = _gather(values, block.gather, live)
            scores = torch.bmm(folded[:live], key.transpose(1, 2))
            if soft_cap:
                scores = scores.div_(soft_cap).tanh_().mul_(soft_cap)
            if block.hidden is not None:
                seen = scores[:, : places * self.group]
                seen.view(block.num_slices, heads, places, self.group, KEY_BLOCK).masked_fill_(
                    block.hidden, MASKED
                )
            peak = scores.amax(-1, keepdim=True)
            if first == 0:
                top = peak
                weights = _weights(scores, top)
                total = self._total(weights, block.own)
                merged = torch.bmm(weights, value)
                continue
            raised = torch.maximum(top[:live], peak)
            shrink = (top[:live] - raised).exp_()
            weights = _weights(scores, raised)
            top[:live] = raised
            total[:live] = total[:live] * shrink + self._total(weights, block.own)
            merged[:live] = merged[:live] * shrink + torch.bmm(weights, value)
        top, total, merged = (part[:, : places * self.group] for part in (top, total, merged))
        if sinks is not None:
            sink = sinks.view(1, heads, 1, self.group).expand(slices, heads, places, self.group)
            sink = sink.reshape(top.shape)
            raised = torch.maximum(top, sink)
            shrink = (top - raised).exp_()
            total, merged = total * shrink + (sink - raised).exp_(), merged * shrink
        result = (merged / total).reshape(slices, heads, places, self.group, size).permute(0, 2, 1, 3, 4)
        return result.reshape(slices * places, heads * self.group, size)

    def _total(self, weights: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
        """[.., n, KEY_BLOCK] -> [.., n, 1]"""
        total = weights.sum(-1, keepdim=True)
        if own is None:
            return total
        product = torch.mm(weights.view(-1, KEY_BLOCK), self.ones)
        return torch.where(own, product[:, :1].view(total.shape), total)

    def _plan_group(
        self,
        table: SliceTable,
        members: list[int],
        first_blocks: NDArray[np.int64],
        num_blocks: NDArray[np.int64],
    ) -> _Group:
        """One pass of numpy over all the group's keys, then views of it per block. Slots are counted from
        each slice's own first block."""
        counts, per_block = table.num_rows[members], KEY_BLOCK // table.page_size
        places = np.arange(counts.max())
        rows = table.first_rows[members][:, None] + np.minimum(places, counts[:, None] - 1)
        real = np.flatnonzero(places < counts[:, None])
        first_columns = first_blocks[:, None] * per_block
        columns = first_columns + np.arange(num_blocks[0] * per_block)
        # Columns past a sequence's end read the first page instead: finite numbers, and never seen.
        past = columns >= -(-table.lengths[members][:, None] // table.page_size)
        pages = table.pages[np.array(members)[:, None], np.where(past, first_columns, columns)]
        gather = self._tensor(pages[:, None, :] * self.num_kv_heads + self.heads)
        base = first_blocks[:, None] * KEY_BLOCK
        starts, ends = table.starts[rows] - base, table.ends[rows] - base
        masked = _masked_blocks(starts, ends, int(num_blocks[0]))
        slots = (masked[:, None] * KEY_BLOCK + np.arange(KEY_BLOCK)).ravel()
        hidden = self._tensor(~_visible(starts, ends, table.words[rows], slots)[:, None, :, None, :])
        own_slots = table.lengths[members][:, None] - np.maximum(counts[:, None] - places, 1)
        own_blocks = (own_slots - base) // KEY_BLOCK
        covers = {number: KEY_BLOCK * place for place, number in enumerate(masked.tolist())}
        blocks = []
        for number in range(num_blocks[0]):
            live = int((num_blocks > number).sum())
            index = gather[:live, :, number * per_block : (number + 1) * per_block].reshape(-1)
            column = covers.get(number)
            cover = None if column is None else hidden[:live, ..., column : column + KEY_BLOCK]
            blocks.append(_KeyBlock(live, index, cover, self._own(own_blocks[:live] == number)))
        return _Group(self._tensor(rows), self._tensor(real), self._tensor(rows.ravel()[real]), tuple(blocks))

    def _own(self, rows: NDArray[np.bool_]) -> torch.Tensor | None:
        """rows [S, n] -> for `_KeyBlock.own`; the padding does not matter."""
        if not rows.any():
            return None
        folded = np.repeat(np.repeat(rows, self.group, axis=1), self.num_kv_heads, axis=0)
        padded = np.pad(folded, ((0, 0), (0, -folded.shape[1] % ROW_MULTIPLE)))
        return self._tensor(padded[..., None])

    def _tensor(self, array: NDArray[np.int64] | NDArray[np.bool_]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def _weights(scores: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """e ** (scores - top), in the place of the scores."""
    return torch.threshold_(scores.sub_(top).clamp_(min=LEAST_EXPONENT).exp_(), LEAST_WEIGHT, 0.0)


def _masked_blocks(starts: NDArray[np.int64], ends: NDArray[np.int64], num_blocks: int) -> NDArray[np.int64]:
    """The blocks that some row does not see whole; without a window, in a long context, only the last."""
    begins = np.arange(num_blocks) * KEY_BLOCK
    return np.flatnonzero((begins < starts.max()) | (begins + KEY_BLOCK > ends.min()))


def _visible(
    starts: NDArray[np.int64], ends: NDArray[np.int64], words: NDArray[np.uint64], slots: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """starts, ends, words [S, n]; slots [K] -> bool [S, n, K]; the rule of `SliceTable`."""
    seen: NDArray[np.bool_] = slots < ends[..., None]
    if starts.any():
        seen &= slots >= starts[..., None]
    if words.any():
        beyond = slots - ends[..., None]
        bits = (words[..., None] >> np.clip(beyond, 0, 63).astype(np.uint64)) & np.uint64(1)
        seen |= (beyond >= 0) & (beyond < 64) & (bits == 1)
    return seen


def _gather(cache: torch.Tensor, index: torch.Tensor, live: int) -> torch.Tensor:
    """-> float32 [live, KEY_BLOCK, D]; pages and heads in one copy."""
    pages, heads, page_size, size = cache.shape
    found = cache.view(pages * heads, page_size * size).index_select(0, index)
    return found.view(live, KEY_BLOCK, size).float()


def _group_slices(num_rows: NDArray[np.int64], num_blocks: NDArray[np.int64]) -> list[list[int]]:
    """Slices with up to 1, 2, 4, 8, 16 rows go together; a longer one goes alone. Most blocks first."""
    groups: dict[int, list[int]] = {}
    for index, count in enumerate(num_rows.tolist()):
        alone = count > MAX_BATCHED_ROWS
        groups.setdefault(-1 - index if alone else (count - 1).bit_length(), []).append(index)
    blocks = num_blocks.tolist()
    for members in groups.values():
        members.sort(key=blocks.__getitem__, reverse=True)
    return list(groups.values())
