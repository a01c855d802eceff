"""Pages of a draft model: provided, cropped, released, taken from the least recently used; never mixed up."""

from __future__ import annotations

import random

import pytest
import torch

from cuda_kernels.ops import pick
from engine.drafting.draft_kv import DraftKV, DraftPiece
from engine.models.config import Layer, Rope
from engine.models.transformer import Transformer
from tests.engine.tiny import CPU, TINY, random_weights

PAGE = 16


def draft_kv(num_pages: int = 12, max_seqs: int = 4, max_len: int = 128, config=TINY) -> DraftKV:
    return DraftKV(config, pick(CPU), num_pages, PAGE, max_len, max_seqs, torch.float32, CPU)


def piece(seq_id: int, tokens: list[int], start: int = 0) -> DraftPiece:
    positions = range(start, start + len(tokens))
    return DraftPiece(seq_id, tuple(tokens), positions, start, num_logits=1)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.set_num_threads(1)
    return Transformer(TINY, random_weights(TINY), pick(CPU))


def logits(model: Transformer, kv: DraftKV, *pieces: DraftPiece) -> torch.Tensor:
    with torch.inference_mode():
        return model.forward(kv.rows(list(pieces)), kv.storage)


def alone(model: Transformer, tokens: list[int]) -> torch.Tensor:
    return logits(model, draft_kv(), piece(1, tokens))[0]


def test_pages_are_provided_cropped_and_given_back():
    kv = draft_kv()
    assert kv.length(7) == 0
    kv.rows([piece(7, [1] * 40)])
    assert (kv.length(7), kv.num_free_blocks) == (40, 9)
    kv.crop(7, 33)
    assert (kv.length(7), kv.num_free_blocks) == (33, 9)
    kv.crop(7, 32)
    assert (kv.length(7), kv.num_free_blocks) == (32, 10)
    kv.crop(7, 50)
    assert kv.length(7) == 32, "nothing is valid that was not computed"
    kv.release(7)
    kv.release(7)
    assert (kv.length(7), kv.num_free_blocks, kv.batches.num_tables) == (0, 12, 0)


def test_the_least_recently_used_loses_all_of_its_own():
    kv = draft_kv(num_pages=6)
    kv.rows([piece(1, [1] * 32)])
    kv.rows([piece(2, [1] * 32)])
    kv.rows([piece(1, [1], start=32)])
    kv.rows([piece(3, [1] * 20)])
    assert [kv.length(seq_id) for seq_id in (1, 2, 3)] == [33, 0, 20]


def test_tables_run_out_as_pages_do():
    kv = draft_kv(max_seqs=2)
    for seq_id in range(5):
        kv.rows([piece(seq_id, [1] * 3)])
    assert [kv.length(seq_id) for seq_id in range(5)] == [0, 0, 0, 3, 3]
    assert kv.reserve([(10, 4), (11, 4), (12, 4)]) == {10, 11}


def test_a_reservation_holds_for_those_who_come_first():
    kv = draft_kv(num_pages=4)
    kv.rows([piece(9, [1] * 16)])
    assert kv.reserve([(1, 32), (2, 40), (3, 20)]) == {1, 3}
    assert kv.length(9) == 0, "it was not wanted, so it made room"
    assert kv.num_free_blocks == 0
    kv.rows([piece(1, [1] * 32), piece(3, [1] * 20)])
    assert kv.reserve([(1, 1000)]) == set(), "longer than a table"


def test_no_page_is_held_twice_or_lost():
    rng = random.Random(3)
    kv = draft_kv(num_pages=20, max_seqs=5)
    for _ in range(400):
        seq_id, choice = rng.randrange(8), rng.random()
        if choice < 0.5:
            start = kv.length(seq_id)
            count = rng.randrange(1, 30)
            if start + count <= 128:
                kv.rows([piece(seq_id, [1] * count, start)])
        elif choice < 0.8:
            kv.crop(seq_id, rng.randrange(100))
        elif choice < 0.9:
            kv.release(seq_id)
        else:
            kv.reserve([(rng.randrange(8), rng.randrange(128)) for _ in range(3)])
        held = [block for one in kv._held.values() for block in one.blocks]
        assert sorted([*held, *kv._free]) == list(range(20))
        assert all(one.length <= len(one.blocks) * PAGE for one in kv._held.values())
        assert len(kv._held) <= 5


def test_logits_are_those_of_the_sequence_alone_after_every_loss_and_crop(model):
    """Pages change hands, are cropped and grow again; a table that kept an old page would show."""
    rng = random.Random(5)
    kv = draft_kv(num_pages=9, max_seqs=3)
    texts = {seq_id: [rng.randrange(300) for _ in range(60)] for seq_id in range(4)}
    for _ in range(40):
        chosen = rng.sample(sorted(texts), 2)
        for seq_id in chosen:
            kv.crop(seq_id, rng.randrange(60))
        ends = {seq_id: rng.randrange(kv.length(seq_id) + 1, 61) for seq_id in chosen}
        assert kv.reserve(ends.items()) == set(chosen)
        pieces = [piece(s, texts[s][kv.length(s) : ends[s]], kv.length(s)) for s in chosen]
        for seq_id, found in zip(chosen, logits(model, kv, *pieces), strict=True):
            torch.testing.assert_close(
                found, alone(model, texts[seq_id][: ends[seq_id]]), rtol=1e-4, atol=1e-4
            )


def test_groups_of_layers_have_pages_each():
    rope = Rope(theta=10000.0, num_rotated=16)
    config = TINY.__class__(
        **{
            **{name: getattr(TINY, name) for name in TINY.__dataclass_fields__},
            "layers": (Layer(rope=rope), Layer(rope=rope, window=20)),
        }
    )
    kv = draft_kv(config=config)
    assert (kv.num_groups, kv.num_blocks) == (2, 6)
    model = Transformer(config, random_weights(config), pick(CPU))
    text = [random.Random(1).randrange(300) for _ in range(50)]
    for begin in range(0, 50, 7):
        found = logits(model, kv, piece(1, text[begin : begin + 7], begin))[0]
    torch.testing.assert_close(
        found, logits(model, draft_kv(config=config), piece(1, text))[0], rtol=1e-4, atol=1e-4
    )


def test_pages_that_may_hold_broken_numbers_are_cleared():
    kv = draft_kv(num_pages=2)
    kv.rows([piece(1, [1] * 32)])
    kv.storage.pages.fill_(float("nan"))
    kv.storage.tainted = True
    kv.rows([piece(2, [1] * 32)])
    assert not kv.storage.pages.isnan().any()
