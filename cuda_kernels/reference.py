"""Every operation in plain torch: the definition that faster kernels are held against.

A row's result must not depend on what else is in the batch ("same seed, same text"). Matrix libraries
pick other loops for some small row counts, and those loops add in another order; at multiples of
`ROW_MULTIPLE` rows every row comes out bit for bit the same, so rows are padded to that. Attention walks
the keys in blocks of `KEY_BLOCK` slots counted from the start of the sequence and merges the blocks in
that order, so its sums depend on the row alone as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cuda_kernels.slices import SliceTable

ROW_MULTIPLE = 8
KEY_BLOCK = 128
MASKED = -1e30  # finite: a block that a row cannot see at all then merges with weight exactly 0
MAX_BATCHED_ROWS = 16  # slices up to this many rows share a launch; longer ones go one by one


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, N], weight [N] -> [T, N] (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N]."""
    return F.linear(x, weight, bias)


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2N], gate first -> silu(gate) * up [T, N] (SwiGLU, Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, D]; cos, sin float32 [T, 1, D/2] -> float32 [T, H, D], halves rotated (RoFormer, Su 2021)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def write_kv(cache: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> None:
    """Put new [n, Hkv, D] into cache [pages, Hkv, page_size, D] at flat (page, head, slot) rows [n * Hkv]."""
    cache.view(-1, cache.shape[-1]).index_copy_(0, rows, new.reshape(-1, new.shape[-1]).to(cache.dtype))


@dataclass(frozen=True, slots=True)
class _KeyBlock:
    """Keys `KEY_BLOCK * j ..` of a group's first `num_slices` slices."""

    num_slices: int
    gather: torch.Tensor  # [num_slices * Hkv * pages] flat (page, head)
    hidden: torch.Tensor | None  # bool [num_slices, 1, n, 1, KEY_BLOCK]: what a row may not see


@dataclass(frozen=True, slots=True)
class _Group:
    """Slices of about the same row count, longest context first, computed together."""

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
        self.groups = [self._plan_group(table, members) for members in _group_slices(table)]

    def __call__(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        scaled = query.float() * query.shape[-1] ** -0.5
        for group in self.groups:
            result = self._attend(group, scaled, keys, values)
            out.index_copy_(0, group.out_to, result.index_select(0, group.out_from))
        return out

    def _attend(
        self, group: _Group, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
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
            if block.hidden is not None:
                seen = scores[:, : places * self.group]
                seen.view(block.num_slices, heads, places, self.group, KEY_BLOCK).masked_fill_(
                    block.hidden, MASKED
                )
            peak = scores.amax(-1, keepdim=True)
            if first == 0:
                top = peak
                weights = scores.sub_(top).exp_()
                total = weights.sum(-1, keepdim=True)
                merged = torch.bmm(weights, value)
                continue
            raised = torch.maximum(top[:live], peak)
            shrink = (top[:live] - raised).exp_()
            weights = scores.sub_(raised).exp_()
            top[:live] = raised
            total[:live] = total[:live] * shrink + weights.sum(-1, keepdim=True)
            merged[:live] = merged[:live] * shrink + torch.bmm(weights, value)
        result = (merged / total)[:, : places * self.group]
        result = result.reshape(slices, heads, places, self.group, size).permute(0, 2, 1, 3, 4)
        return result.reshape(slices * places, heads * self.group, size)

    def _plan_group(self, table: SliceTable, members: list[int]) -> _Group:
        """One pass of numpy over all the group's keys, then views of it per block."""
        counts, lengths = table.num_rows[members], table.lengths[members]
        places = np.arange(counts.max())
        rows = table.first_rows[members][:, None] + np.minimum(places, counts[:, None] - 1)
        real = np.flatnonzero(places < counts[:, None])
        num_blocks = -(-int(lengths[0]) // KEY_BLOCK)
        per_block = KEY_BLOCK // table.page_size
        columns = np.arange(num_blocks * per_block)
        # Columns past a sequence's end read its own first page: finite numbers, and never seen.
        columns = columns * (columns < -(-lengths[:, None] // table.page_size))
        pages = table.pages[np.array(members)[:, None], columns]
        gather = self._tensor(pages[:, None, :] * self.num_kv_heads + self.heads)
        ends = table.ends[rows]
        # Blocks that every row sees whole need no mask; in a long context that is nearly all of them.
        first_masked = int(ends.min()) // KEY_BLOCK
        slots = np.arange(first_masked * KEY_BLOCK, num_blocks * KEY_BLOCK)
        hidden = self._tensor(~_visible(ends, table.words[rows], slots)[:, None, :, None, :])
        blocks = []
        for number in range(num_blocks):
            live = int((lengths > number * KEY_BLOCK).sum())
            index = gather[:live, :, number * per_block : (number + 1) * per_block].reshape(-1)
            column = (number - first_masked) * KEY_BLOCK
            cover = None if column < 0 else hidden[:live, ..., column : column + KEY_BLOCK]
            blocks.append(_KeyBlock(live, index, cover))
        return _Group(self._tensor(rows), self._tensor(real), self._tensor(rows.ravel()[real]), tuple(blocks))

    def _tensor(self, array: NDArray[np.int64] | NDArray[np.bool_]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def _visible(
    ends: NDArray[np.int64], words: NDArray[np.uint64], slots: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """ends, words [S, n]; slots [K] -> bool [S, n, K]; the rule of `SliceTable`."""
    seen: NDArray[np.bool_] = slots < ends[..., None]
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


def _group_slices(table: SliceTable) -> list[list[int]]:
    """Slices with up to 1, 2, 4, 8, 16 rows go together; a longer one goes alone. Longest context first."""
    groups: dict[int, list[int]] = {}
    for index, count in enumerate(table.num_rows.tolist()):
        alone = count > MAX_BATCHED_ROWS
        groups.setdefault(-1 - index if alone else (count - 1).bit_length(), []).append(index)
    lengths = table.lengths.tolist()
    for members in groups.values():
        members.sort(key=lengths.__getitem__, reverse=True)
    return list(groups.values())
