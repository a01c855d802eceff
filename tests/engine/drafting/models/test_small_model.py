"""A smaller model drafts: with the right arithmetic, within its bounds, and as the target would draw."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from engine.drafting.guess import CATCHING_UP, NO_GUESS, Want
from engine.drafting.models import following
from tests.engine.drafting.models.small import (
    VOCAB,
    next_tokens,
    paths,
    plain_logits,
    sequence,
    small_model,
    transformer,
)  # fmt: skip
from tests.engine.tiny import TINY

SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 0.7, "top_p": 0.9},
    "hot": {"temperature": 1.5, "top_p": 0.95, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.3, "logit_bias": ((17, 4.0),)},
    "banned": {"temperature": 0.5, "bad_words": ((12, 13), (40,)), "allowed_token_ids": tuple(range(50))},
}
PROMPT = [11, 12, 13, 14, 15, 16, 17, 18] * 5


@pytest.fixture(scope="module")
def model():
    return transformer()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=list(SAMPLINGS))
def test_its_own_next_tokens_are_among_the_drafts(model, sampling):
    """A target that is its own drafter: what it goes on with is a path of the tree, at any temperature."""
    drafter = small_model(model)
    one = sequence(PROMPT, **sampling)
    right = next_tokens(model, one, 40)
    depths = []
    while len(right) > 10:
        (guess,) = drafter.guess([Want(one, 8)])
        depths.append(
            max((len(path) for path in paths(guess) if list(path) == right[: len(path)]), default=0)
        )
        one.tokens += right[: depths[-1] + 1]
        del right[: depths[-1] + 1]
    assert min(depths) >= 1
    assert max(depths) >= 4, "as its drafts stand, trees grow deeper"


def test_nodes_are_computed_with_the_logits_of_their_path_alone(model, monkeypatch):
    drafter = small_model(model, cost=0.02)
    seen: list[tuple[tuple[int, ...], torch.Tensor]] = []
    successors = drafter.draft.successors

    def spy(logits, after):
        seen.extend((tuple(one.tokens) + path, row) for (one, path), row in zip(after, logits, strict=True))
        return successors(logits, after)

    monkeypatch.setattr(drafter.draft, "successors", spy)
    rng = random.Random(1)
    wants = [
        Want(sequence([rng.randrange(VOCAB) for _ in range(length)], seq_id, temperature=0.9), 30)
        for seq_id, length in enumerate((5, 40, 17))
    ]
    for _ in range(3):
        for guess in drafter.guess(wants):
            paths(guess)
        for want in wants:
            want.sequence.tokens.extend(rng.choices(range(VOCAB), k=rng.randrange(1, 4)))
    assert any(len(tree.computed) > 2 and not tree.is_line for _, tree in drafter.following._trees.values())
    for text, row in seen:
        torch.testing.assert_close(row, plain_logits(model, text)[0], rtol=1e-4, atol=1e-4)


def test_of_its_tree_what_stood_is_kept_and_not_computed_again(model):
    drafter = small_model(model, cost=0.02)
    one = sequence(PROMPT, temperature=1.2)
    computed = 0
    logits = drafter.draft.logits

    def counting(pieces):
        nonlocal computed
        computed += sum(len(piece.tokens) for piece in pieces if not piece.num_window)
        return logits(pieces)

    drafter.draft.logits = counting
    for _ in range(6):
        drafter.guess([Want(one, 40)])
        _, tree = drafter.following._trees[one.seq_id]
        # A path through nodes that were computed, not the one whose slots come first.
        deepest = max(tree.computed, key=lambda node: (tree.nodes[node].depth, node), default=None)
        assert deepest is not None
        one.tokens += [*tree.path(deepest), 250]
        before = drafter.draft.kv.length(one.seq_id)
        computed = 0
        expected = plain_logits(model, one.tokens)[0]
        stretch = drafter.following.stretches([Want(one, 1)])[0]
        assert (stretch.start, stretch.end) == (len(one.tokens) - 1, len(one.tokens)), before
        with torch.inference_mode():
            found = drafter.draft.logits([drafter.following.piece(stretch)])[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_long_prompts_are_caught_up_with_over_several_guesses(model, monkeypatch):
    monkeypatch.setattr(following, "CATCH_UP_TOKENS", 64)
    drafter = small_model(model)
    long, short = sequence(PROMPT * 5, 1), sequence(PROMPT[:20], 2)
    guesses = [drafter.guess([Want(long, 8), Want(short, 8)]) for _ in range(5)]
    assert all(guess.tokens for _, guess in guesses), "the short one waits for nobody"
    assert [bool(guess.tokens) for guess, _ in guesses] == [False, False, False, True, True]
    assert drafter.guess([Want(sequence(PROMPT * 2, 3), 8)])[0] is CATCHING_UP, "nobody is ready"
    monkeypatch.undo()
    drafter = small_model(model)
    assert drafter.guess([Want(long, 8)])[0] is CATCHING_UP, (
        "a guess with so much to read takes longer than others"
    )
    (alone,) = drafter.guess([Want(long, 8)])
    assert guesses[3][0].tokens[0] == alone.tokens[0]


def test_with_few_pages_some_are_served_and_nothing_is_lost(model):
    drafter = small_model(model, num_pages=17)
    wants = [Want(sequence(PROMPT, seq_id), 8) for seq_id in range(6)]
    for _ in range(3):
        served = [bool(guess.tokens) for guess in drafter.guess(wants)]
        assert served == [True, True, False, False, False, False]
    served = [bool(guess.tokens) for guess in drafter.guess(wants[2:4])]
    assert served == [True, True], "who is not asked for makes room"
    for want in wants:
        drafter.release(want.sequence)
    assert drafter.draft.kv.num_free_blocks == 17


def test_what_does_not_fit_the_model_gets_no_guess(model):
    drafter = small_model(model, max_len=64)
    assert drafter.guess([]) == []
    wants = [Want(sequence([5] * 65, 1), 8), Want(sequence([5] * 64, 2), 8), Want(sequence([5], 3), 0)]
    first, second, third = drafter.guess(wants)
    assert (first, third) == (NO_GUESS, NO_GUESS)
    assert second.tokens
    assert len(drafter.guess([Want(sequence([7] * 20, 4), 1000)])[0].tokens) <= 64


def test_limits_are_kept(model):
    drafter = small_model(model, cost=0.02)
    for limit in (1, 2, 3, 7, 64):
        (guess,) = drafter.guess([Want(sequence(PROMPT, 1), limit)])
        assert 0 < len(paths(guess)) <= limit


def test_a_drafter_that_costs_as_much_as_the_target_makes_one_pass(model, monkeypatch):
    drafter = small_model(model, cost=1.0)
    passes = []
    logits = drafter.draft.logits
    monkeypatch.setattr(drafter.draft, "logits", lambda pieces: passes.append(1) or logits(pieces))
    (guess,) = drafter.guess([Want(sequence(PROMPT, 1), 8)])
    assert guess.tokens
    assert len(passes) == 1


def test_broken_numbers_end_the_guessing_for_that_sequence_alone(model):
    drafter = small_model(model)
    sick, well = Want(sequence(PROMPT, 1), 8), Want(sequence(PROMPT[:30], 2), 8)
    drafter.guess([sick, well])
    block = drafter.draft.kv._held[1].blocks[0]
    drafter.draft.kv.storage.pages[block] = float("nan")
    for want in (sick, well):
        want.sequence.tokens.append(299)
    first, second = drafter.guess([sick, well])
    assert not first.tokens
    assert second.tokens
    drafter.release(sick.sequence)
    for seq_id in range(3, 9):
        (guess,) = drafter.guess([Want(sequence(PROMPT, seq_id), 8)])
        assert guess.tokens, "a page of the sick one's was handed out as it was"


@pytest.mark.parametrize("vocab_size", [200, 340])
def test_vocabularies_of_another_size_agree_on_the_tokens_that_both_have(vocab_size):
    drafter = small_model(transformer(replace(TINY, vocab_size=vocab_size)), cost=0.02)
    one = sequence([1, 299, 250, 7], temperature=1.0, logit_bias=((299, 90.0),))
    (guess,) = drafter.guess([Want(one, 20)])
    found = paths(guess)
    assert max(token for path in found for token in path) < min(vocab_size, VOCAB)


def test_what_two_threads_read_was_counted_before(model):
    """A guess that takes no pass asks no processor; going ahead, it must not count beside the target."""
    drafter = small_model(model, cost=0.02)
    one = sequence(PROMPT, temperature=0.0, presence_penalty=0.4)
    processor = drafter.draft.processor_of(one)
    drafter.draft.processor_of = lambda sequence: processor
    drafter.guess([Want(one, 8)])
    for _ in drafter.ahead([one]):
        pass
    tree = drafter.following.grown(one)
    one.tokens += tree.path(
        next(node.parent for node in tree.nodes if node.depth)
    )  # it has grown behind that
    drafter.cost = 10.0
    assert drafter.guess([Want(one, 8)])[0].tokens
    assert processor._num_counted < one.num_output, "it was not asked"
    drafter.ahead([one])
    assert processor._num_counted == one.num_output
