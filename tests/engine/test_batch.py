"""Trees of tokens through a tiny model have the bits of plain decoding: at once, level by level, kept."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from cuda_kernels.ops import pick
from engine.batch import BatchBuilder
from engine.kv_storage import KVStorage
from engine.models.config import Layer, Rope, TransformerConfig
from engine.models.kv_groups import kv_groups
from engine.models.transformer import Transformer
from scheduler.plan import Slice, StepPlan
from scheduler.types import Visibility
from tests.engine.tiny import CPU, TINY, random_weights

PAGE_SIZE = 4
WHOLE = Layer(rope=Rope(theta=10000.0, num_rotated=16))
MODELS = {
    "whole": (WHOLE, WHOLE),
    "all_slide": (replace(WHOLE, window=3), replace(WHOLE, window=21)),
    "few_whole": (*[replace(WHOLE, window=5)] * 3, WHOLE),
    "chunks": (replace(WHOLE, chunk=8), replace(WHOLE, chunk=8), Layer()),
}
STEM = [(7 * n * n + 3 * n) % 300 for n in range(200)]
PLACES = [9, 31, 120, 129]  # where a window begins: within pages and blocks of keys, and at their edges
PARENTS = [-1, -1, 0, 0, 1, 2, 5, 6]
TOKENS = [5, 6, 7, 8, 7, 9, 10, 11]


class Steps:
    """Two sequences over shuffled pages: 0 has windows, 1 is there for company."""

    def __init__(self, name: str) -> None:
        config: TransformerConfig = replace(TINY, layers=MODELS[name])
        num_entries = len(kv_groups(config)) * 160 // PAGE_SIZE
        order = random.Random(3).sample(range(2 * num_entries), 2 * num_entries)
        self.pages = {0: order[:num_entries], 1: order[num_entries:]}
        self.model = Transformer(config, random_weights(config), pick(CPU))
        self.storage = KVStorage(config, len(order), PAGE_SIZE, torch.float32, CPU)
        self.batches = BatchBuilder(config, self.model.ops, PAGE_SIZE, 160, 2, CPU)

    def compute(self, *slices: Slice) -> list[torch.Tensor]:
        """-> float32 [tokens, vocab] of each slice"""
        with torch.inference_mode():
            logits = self.model.forward(self.batches.build(StepPlan(0, slices)), self.storage)
        return list(logits.split([piece.num_logits for piece in slices]))

    def line(self, start: int, tokens: list[int], seq_id: int = 0) -> Slice:
        positions = range(start, start + len(tokens))
        pages = tuple(self.pages[seq_id])
        return Slice(seq_id, start, tuple(tokens), positions, 0, pages, len(tokens))

    def nodes(self, place: int, chosen: range) -> Slice:
        """Some nodes of the tree whose first slot is `place`."""
        paths = [path(node) for node in chosen]
        return Slice(
            seq_id=0,
            start=place + chosen.start,
            tokens=tuple(TOKENS[node] for node in chosen),
            positions=[place + len(one) - 1 for one in paths],
            first_new_page=0,
            new_pages=(),
            num_logits=len(chosen),
            num_window=chosen.stop,
            visibility=Visibility.ANCESTORS,
            ancestors=tuple(sum(1 << node for node in one) for one in paths),
        )


def path(node: int) -> list[int]:
    return [*(path(PARENTS[node]) if PARENTS[node] >= 0 else ()), node]


def plain(name: str, place: int, tokens: list[int]) -> list[torch.Tensor]:
    """The logits after each of the tokens behind the stem, one step each."""
    steps = Steps(name)
    steps.compute(steps.line(0, STEM[:place]))
    return [steps.compute(steps.line(place + n, [token]))[0][0] for n, token in enumerate(tokens)]


def around_a_tree(name: str, place: int) -> tuple[Steps, torch.Tensor]:
    """The last committed token and the tree in one step, beside another sequence."""
    steps = Steps(name)
    steps.compute(steps.line(0, STEM[: place - 1]))
    whole = steps.nodes(place, range(len(PARENTS)))
    whole = whole._replace(
        start=place - 1,
        tokens=(STEM[place - 1], *whole.tokens),
        positions=[place - 1, *whole.positions],
        num_logits=1 + len(PARENTS),
    )
    return steps, steps.compute(steps.line(0, STEM[20:45], seq_id=1), whole)[1][1:]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_each_path_of_a_tree_has_the_bits_of_plain_decoding(name, place):
    _, logits = around_a_tree(name, place)
    for leaf in (3, 4, 7):
        nodes = path(leaf)
        expected = plain(name, place, [TOKENS[node] for node in nodes])
        assert torch.equal(logits[nodes], torch.stack(expected))


@pytest.mark.parametrize("leaf", [1, 3, 4, 7])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_what_follows_a_path_that_was_moved_in_place_has_the_bits_of_plain_decoding(name, place, leaf):
    steps, _ = around_a_tree(name, place)
    kept, following = path(leaf), [40, 41, 42, 43, 44]
    steps.batches.move(steps.storage, [(1, 30, (0, 1)), (0, place, tuple(kept))])
    end = place + len(kept)
    found = [steps.compute(steps.line(end + n, [token]))[0][0] for n, token in enumerate(following)]
    expected = plain(name, place, [TOKENS[node] for node in kept] + following)
    assert torch.equal(torch.stack(found), torch.stack(expected[len(kept) :]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_a_tree_level_by_level_is_the_tree_at_once(name, place):
    _, expected = around_a_tree(name, place)
    steps = Steps(name)
    steps.compute(steps.line(0, STEM[:place]))
    levels = [range(2), range(2, 5), range(5, 6), range(6, 8)]
    found = [steps.compute(steps.nodes(place, level))[0] for level in levels]
    assert torch.equal(torch.cat(found), expected)


def test_moves_of_many_sequences_overlap_and_touch_nothing_else():
    steps = Steps("few_whole")
    steps.compute(steps.line(0, STEM[:60]), steps.line(0, STEM[60:120], seq_id=1))
    kv = steps.storage.pages
    kv.copy_(torch.arange(kv.numel(), dtype=torch.float32).view(kv.shape))

    def slots(seq_id: int) -> torch.Tensor:
        """-> [slot, groups, ..]"""
        table = torch.tensor(steps.pages[seq_id]).view(-1, len(steps.batches.groups))
        return kv[table].movedim(-2, 1).flatten(0, 1)

    before = {seq_id: slots(seq_id).clone() for seq_id in (0, 1)}
    steps.batches.move(steps.storage, [(0, 30, (1, 2, 5, 13)), (1, 7, (0, 3)), (1, 40, ())])
    before[0][30:34] = before[0][[31, 32, 35, 43]]
    before[1][8] = before[1][10]
    for seq_id in (0, 1):
        assert torch.equal(slots(seq_id), before[seq_id])
