"""A row of a draft tree has the very bits that plain decoding would have had along its path."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cuda_kernels.ops import pick
from cuda_kernels.slices import SliceTable

CPU = torch.device("cpu")
OPS = pick(CPU)
PAGE = 16
NUM_PAGES = 30  # of one sequence


@dataclass
class Tree:
    """Node k is in slot `begin + k`, and follows node `parents[k]`; -1: the last committed token."""

    begin: int
    parents: list[int]

    def path(self, node: int) -> list[int]:
        above = self.parents[node]
        return [*(self.path(above) if above >= 0 else ()), node]


@dataclass
class World:
    """Sequences, each with pages of its own; `window`: how far back rows see, by position."""

    heads: int
    kv_heads: int
    window: int
    keys: torch.Tensor
    values: torch.Tensor
    pages: np.ndarray  # [sequences, NUM_PAGES]

    def query(self, count: int) -> torch.Tensor:
        return torch.randn(count, self.heads, self.keys.shape[-1])

    def table(self, slices: list[tuple[int, list[tuple[int, int, int]], int]]) -> SliceTable:
        """slices: sequence, rows as (start, end, word), filled slots"""
        counts = np.array([len(rows) for _, rows, _ in slices])
        starts, ends, words = zip(*(row for _, rows, _ in slices for row in rows), strict=True)
        return SliceTable(
            first_rows=np.cumsum(counts) - counts,
            num_rows=counts,
            lengths=np.array([length for _, _, length in slices]),
            pages=self.pages[[sequence for sequence, _, _ in slices]],
            starts=np.array(starts),
            ends=np.array(ends),
            words=np.array(words, dtype=np.uint64),
            page_size=PAGE,
        )

    def causal(self, begin: int, count: int) -> list[tuple[int, int, int]]:
        return [(self.start(slot), slot + 1, 0) for slot in range(begin, begin + count)]

    def start(self, position: int) -> int:
        return max(0, position + 1 - self.window)

    def tree_rows(self, tree: Tree) -> list[tuple[int, int, int]]:
        """The last committed token's row, where there is one, and the nodes'."""
        rows = self.causal(tree.begin - 1, 1) if tree.begin else []
        for node in range(len(tree.parents)):
            path = tree.path(node)
            start = self.start(tree.begin + len(path) - 1)
            seen = [one for depth, one in enumerate(path) if tree.begin + depth >= start]
            rows.append((start, tree.begin, sum(1 << one for one in seen)))
        return rows

    def lay_out(self, tree: Tree, path: list[int], sequence: int, target: int) -> None:
        """Into `target`: what comes before the tree, then the path, as plain decoding fills slots."""
        slots = np.array([*range(tree.begin), *(tree.begin + node for node in path)])
        at = np.arange(len(slots))
        for cache in (self.keys, self.values):
            found = cache[self.pages[sequence, slots // PAGE], :, slots % PAGE]
            cache[self.pages[target, at // PAGE], :, at % PAGE] = found

    def attend(self, table: SliceTable, query: torch.Tensor, options: dict[str, object]) -> torch.Tensor:
        plan = OPS.plan_attention(table, self.heads, self.kv_heads, CPU)
        return plan(query, self.keys, self.values, query.shape[-1] ** -0.5, **options)  # type: ignore[arg-type]


def make_world(rng: random.Random, sequences: int, dtype: torch.dtype, window: int) -> World:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    kv_heads = rng.choice([1, 2, 3])
    shape = (sequences * NUM_PAGES, kv_heads, PAGE, rng.choice([16, 64, 80]))
    keys = torch.randn(shape, generator=generator)
    keys[torch.rand(shape, generator=generator) < 0.001] *= 100
    order = np.array(rng.sample(range(shape[0]), shape[0]))
    return World(
        kv_heads * rng.choice([1, 2, 3, 7]),
        kv_heads,
        window,
        keys.to(dtype),
        torch.randn(shape, generator=generator).to(dtype),
        order.reshape(sequences, NUM_PAGES),
    )


def make_tree(rng: random.Random) -> Tree:
    count = rng.choice([1, 2, 5, 8, 14, 30, 64])
    block = OPS.tree_block
    begin = rng.randrange(3) * block + rng.choice([0, block - count, rng.randrange(block - count + 1)])
    bushy = rng.random()
    return Tree(begin, [k - 1 if rng.random() > bushy else rng.randrange(-1, k) for k in range(count)])


def options(rng: random.Random, heads: int) -> dict[str, object]:
    chosen: dict[str, object] = {}
    if rng.random() < 0.4:
        chosen["soft_cap"] = rng.choice([2.0, 30.0])
    if rng.random() < 0.4:
        chosen["sinks"] = torch.tensor([rng.choice([-3.0, 0.5, 20.0]) for _ in range(heads)])
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [10**6, 150, 20, 3])
def test_a_trees_rows_have_the_bits_of_plain_decoding_whatever_is_in_the_batch(window, dtype):
    rng = random.Random(f"{window} {dtype}")
    for _ in range(20):
        trees = [make_tree(rng) for _ in range(rng.choice([1, 2, 5]))]
        spare = len(trees) + 1
        world = make_world(rng, spare + 1, dtype, window)
        slices = [
            (number, world.tree_rows(tree), tree.begin + len(tree.parents))
            for number, tree in enumerate(trees)
        ]
        if rng.random() < 0.5:  # beside a chunk of a prompt
            begin, count = rng.randrange(200), rng.choice([1, 3, 40, 200])
            slices.insert(0, (len(trees), world.causal(begin, count), begin + count))
        table = world.table(slices)
        query = world.query(len(table.starts))
        extra = options(rng, world.heads)
        together = world.attend(table, query, extra)
        for (number, rows, _), first in zip(slices, table.first_rows.tolist(), strict=True):
            if number == len(trees):
                continue
            tree = trees[number]
            base = first + len(rows) - len(tree.parents)
            for node in rng.sample(range(len(tree.parents)), min(4, len(tree.parents))):
                path = tree.path(node)
                world.lay_out(tree, path, number, spare)
                slot = tree.begin + len(path) - 1
                plain = world.table([(spare, world.causal(slot, 1), slot + 1)])
                row = slice(base + node, base + node + 1)
                assert torch.equal(world.attend(plain, query[row], extra), together[row])


def test_what_lies_hidden_between_the_nodes_of_a_path_changes_nothing():
    rng = random.Random(5)
    world = make_world(rng, 1, torch.float32, 10**6)
    tree = Tree(100, [-1, -1, 0, 1, 2])
    table = world.table([(0, world.tree_rows(tree), 105)])
    query = world.query(6)
    before = world.attend(table, query, {})
    world.keys[world.pages[0, 101 // PAGE], :, 101 % PAGE] = 1e4  # node 1
    world.values[world.pages[0, 101 // PAGE], :, 101 % PAGE] = -1e4
    after = world.attend(table, query, {})
    assert torch.equal(before[[0, 1, 3, 5]], after[[0, 1, 3, 5]])
    assert not torch.equal(before[2], after[2])
    assert not torch.equal(before[4], after[4])
