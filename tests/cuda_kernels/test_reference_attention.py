"""Paged attention against an obvious loop, on ragged steps with every kind of visibility."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cuda_kernels.reference_attention import KEY_BLOCK, ReferenceAttention
from cuda_kernels.slices import SliceTable

PAGE = 16
HEADS, KV_HEADS, SIZE = 6, 2, 32


def make_step(lengths: list[int], counts: list[int], seed: int = 0, window: int = 10**6):
    """A table over shuffled pages, its caches (spiky on purpose) and queries."""
    rng = np.random.default_rng(seed)
    per = -(-max(lengths) // PAGE)
    order = rng.permutation(len(lengths) * per + 3)
    pages = order[: len(lengths) * per].reshape(len(lengths), per)
    counts_array = np.array(counts)
    first = np.cumsum(counts_array) - counts_array
    slots = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
    table = SliceTable(
        first_rows=first,
        num_rows=counts_array,
        lengths=np.array(lengths),
        pages=pages,
        starts=np.maximum(slots + 1 - window, 0),
        ends=slots + 1,
        words=np.zeros(len(slots), np.uint64),
        page_size=PAGE,
    )
    generator = torch.Generator().manual_seed(seed)
    shape = (len(order), KV_HEADS, PAGE, SIZE)
    keys = torch.randn(shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    keys[torch.rand(shape, generator=generator) < 0.001] *= 100
    query = torch.randn(len(slots), HEADS, SIZE, generator=generator)
    return table, query, keys, values


def obvious(
    table: SliceTable,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row by row, in double."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    for index, (first, count, length) in enumerate(
        zip(table.first_rows, table.num_rows, table.lengths, strict=True)
    ):
        pages = torch.from_numpy(table.pages[index])
        k = keys[pages].permute(1, 0, 2, 3).reshape(KV_HEADS, -1, SIZE)[:, :length].double()
        v = values[pages].permute(1, 0, 2, 3).reshape(KV_HEADS, -1, SIZE)[:, :length].double()
        for row in range(first, first + count):
            start, end, word = int(table.starts[row]), int(table.ends[row]), int(table.words[row])
            seen = [
                start <= slot < end or (0 <= slot - end < 64 and word >> (slot - end) & 1 == 1)
                for slot in range(length)
            ]
            for head in range(HEADS):
                kv = head // (HEADS // KV_HEADS)
                scores = k[kv] @ query[row, head].double() * SIZE**-0.5
                if soft_cap:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                scores[~torch.tensor(seen)] = -torch.inf
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head : head + 1].double()))
                out[row, head] = torch.softmax(scores, -1)[: len(seen)] @ v[kv]
    return out


def attend(table, query, keys, values, soft_cap=0.0, sinks=None):
    plan = ReferenceAttention(table, HEADS, KV_HEADS, torch.device("cpu"))
    return plan(query, keys, values, SIZE**-0.5, soft_cap, sinks).view(query.shape)


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        ([1], [1]),
        ([KEY_BLOCK, KEY_BLOCK + 1, 5], [1, 1, 1]),
        ([300, 40, 17, 129, 256], [1, 40, 3, 17, 64]),
        ([20, 500, 33], [20, 2, 1]),
    ],
)
def test_equals_the_obvious_loop(lengths, counts):
    step = make_step(lengths, counts)
    torch.testing.assert_close(attend(*step).double(), obvious(*step), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 24, 128, 200])
def test_windows_soft_caps_and_sinks(window):
    step = make_step([700, 300, 40, 17, 600], [3, 1, 40, 3, 500], window=window)
    sinks = torch.tensor([0.5, -3.0, 20.0, 0.0, 3.0, -40.0])
    for options in ({}, {"soft_cap": 5.0}, {"sinks": sinks}, {"soft_cap": 2.0, "sinks": sinks}):
        result = attend(*step, **options).double()
        torch.testing.assert_close(result, obvious(*step, **options), atol=2e-5, rtol=1e-4)


def test_behind_a_window_nothing_is_read_but_its_first_block():
    """Pages there may belong to others by now; within the block that the window begins in they are masked."""
    table, query, keys, values = make_step([700, 300], [1, 1], window=100)
    expected = attend(table, query, keys, values)
    for index, start in ((0, 600), (1, 200)):
        gone = table.pages[index][: start // KEY_BLOCK * KEY_BLOCK // PAGE]
        keys[gone], values[gone] = torch.nan, torch.nan
    assert torch.equal(attend(table, query, keys, values), expected)


def test_rows_that_see_their_whole_slice_and_rows_that_see_ancestors():
    table, query, keys, values = make_step([140, 130, 70], [12, 6, 1])
    table.ends[:12] = 140  # a block that sees all of itself
    table.ends[12:18] = 124  # a tree of six: 0 -> {1, 2}, 1 -> {3}, 2 -> {4, 5}
    table.words[12:18] = [0b1, 0b11, 0b101, 0b1011, 0b10101, 0b100101]
    step = (table, query, keys, values)
    torch.testing.assert_close(attend(*step).double(), obvious(*step), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [10**6, 50, 1])
def test_a_row_is_the_same_bits_alone_in_a_batch_and_in_any_chunk(window):
    lengths = [300, 40, 150, 129]
    table, query, keys, values = make_step(lengths, [40, 40, 40, 40], window=window)
    together = attend(table, query, keys, values)
    for index, length in enumerate(lengths):
        for begin, end in ((0, 1), (3, 5), (7, 20), (0, 40), (39, 40)):
            rows = slice(40 * index + begin, 40 * index + end)
            part = SliceTable(
                np.array([0]),
                np.array([end - begin]),
                np.array([length - 40 + end]),
                table.pages[index : index + 1],
                table.starts[rows],
                table.ends[rows],
                table.words[rows],
                PAGE,
            )
            assert torch.equal(attend(part, query[rows], keys, values), together[rows])


def test_numbers_that_went_wrong_in_slots_nobody_sees_do_not_spread():
    table, query, keys, values = make_step([20, 30], [1, 4])
    expected = attend(table, query, keys, values)
    for index, length in ((0, 20), (1, 30)):
        page, offset = table.pages[index][length // PAGE], length % PAGE
        keys[page, :, offset:] = torch.nan
    assert torch.equal(attend(table, query, keys, values), expected)
