"""The sampler against obvious arithmetic, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.messages import TokenLogprobs
from engine.noise import NoiseKeys
from engine.sampling import ranking, sampler
from engine.sampling.places import Place
from engine.sampling.processors import LogitsProcessor, needs_processing
from engine.sampling.sampler import logprobs_of, sample
from scheduler.types import Request, SamplingParams, Sequence

VOCABULARY = 1000


def place(prompt=(1, 2), output=(), drafted=(), index=0, vocabulary=VOCABULARY, **sampling) -> Place:
    asked = Request(request_id="r", prompt_ids=tuple(prompt), sampling=SamplingParams(**sampling))
    sequence = Sequence(0, asked, index, [*prompt, *output])
    needed = needs_processing(asked.sampling)
    processor = LogitsProcessor(sequence, vocabulary, torch.device("cpu")) if needed else None
    return Place(sequence, tuple(drafted), processor)


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def kept_by_hand(row: np.ndarray, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0) -> set[int]:
    """Sort, walk, stop: no thresholds, no candidates. Double precision."""
    row = row.astype(np.float64)
    probs = np.exp(row - row.max())
    probs /= probs.sum()
    if typical_p < 1.0:
        surprise = -np.log(probs)
        order = np.argsort(np.abs(surprise - (probs * surprise).sum()), kind="stable")
        last = int(np.searchsorted(np.cumsum(probs[order]), typical_p))
        keep = set(order[: last + 1].tolist())
        probs = np.array([p if token in keep else 0.0 for token, p in enumerate(probs)])
        probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    order = order[probs[order] > 0]
    if top_k:
        order = order[:top_k]
        probs = np.where(np.isin(np.arange(len(probs)), order), probs, 0.0)
        probs /= probs.sum()
    if top_p < 1.0:
        order = order[: int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1]
    return {int(token) for token in order if probs[token] >= min_p * probs[order[0]]}


@pytest.mark.parametrize(
    "cut",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 400},
        {"top_p": 0.05},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"min_p": 0.02},
        {"typical_p": 0.4},
        {"top_k": 50, "top_p": 0.7},
        {"top_k": 400, "top_p": 0.95, "min_p": 0.001},
        {"typical_p": 0.8, "top_p": 0.6},
    ],
)
@pytest.mark.parametrize("candidates", [8, 256])
def test_the_draw_is_the_best_noisy_token_of_the_kept_set(monkeypatch, cut, candidates):
    monkeypatch.setattr(ranking, "CANDIDATES", candidates)
    rows = 12
    logits = random_logits(rows)
    places = [place(output=[3] * row, temperature=0.7, seed=row, **cut) for row in range(rows)]
    keys = NoiseKeys(list(range(rows)), [0] * rows, list(range(rows)), torch.device("cpu"))
    noisy = (logits / 0.7 + keys.of_vocabulary(VOCABULARY)).numpy()
    drawn = sample(logits.clone(), places)
    for row in range(rows):
        kept = kept_by_hand((logits[row] / 0.7).numpy(), **cut)
        assert drawn.tokens[row] == max(kept, key=lambda token: noisy[row, token])
    assert not drawn.errors


def test_the_distribution_is_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    count = 20_000
    places = [place(temperature=1.5, seed=seed) for seed in range(count)]
    tokens = sample(logits.expand(count, -1).clone(), places).tokens
    seen = np.bincount(tokens, minlength=5) / count
    expected = torch.softmax(logits[0] / 1.5, -1).numpy()
    assert np.abs(seen - expected).max() < 4 * 0.5 / np.sqrt(count)


def test_greedy_rows_and_random_rows_do_not_disturb_each_other():
    logits = random_logits(6)
    mixed = [
        place(temperature=0.0),
        place(temperature=1.0, seed=3),
        place(temperature=0.9, top_p=0.8, seed=4),
        place(temperature=0.0, logit_bias=((5, 100.0),)),
        place(temperature=1.0, min_tokens=2, stop_token_ids=(7,)),
        place(temperature=1e-9),
    ]
    together = sample(logits, mixed).tokens
    alone = [sample(logits[row : row + 1], [one]).tokens[0] for row, one in enumerate(mixed)]
    assert together == alone
    assert together[0] == int(logits[0].argmax())
    assert together[3] == 5
    assert together[5] == int(logits[5].argmax())


def test_no_draw_is_made_behind_a_draft_that_is_not_drawn():
    """A tree of two paths, of which one is what is drawn; beside a greedy row and one that stands alone."""
    logits, hot = random_logits(7), {"seed": 3, "temperature": 9.0}
    [first] = sample(logits[:1], [place(**hot)]).tokens
    [second] = sample(logits[2:3], [place(drafted=[first], **hot)]).tokens
    paths = [(), (first + 1,), (first,), (first + 1, 4), (first, second)]
    places = [place(drafted=path, **hot) for path in paths]
    alone = [sample(logits[row : row + 1], [one]).tokens[0] for row, one in enumerate(places)]
    likeliest = logits.argmax(-1).tolist()
    assert all(drawn != most for drawn, most in zip(alone, likeliest, strict=False)), (
        "a draw is another token"
    )
    tree = [one._replace(after=after) for one, after in zip(places, (0, 1, 2, 2, 2), strict=True)]
    drawn = sample(logits, [*tree, place(temperature=0.0), place(seed=9)]).tokens
    assert drawn[:5] == [alone[0], likeliest[1], alone[2], likeliest[3], alone[4]]
    assert drawn[5] == likeliest[5]
    assert drawn[6] == sample(logits[6:], [place(seed=9)]).tokens[0]


def test_penalties_by_hand():
    logits = torch.tensor([[2.0, -2.0, 1.0, 1.5, 0.0]])
    seen = place(prompt=[0], output=[1, 2, 2], drafted=[3], temperature=0.0)
    asked = place(
        prompt=[0],
        output=[1, 2, 2],
        drafted=[3],
        vocabulary=5,
        temperature=0.0,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    values = logits.clone()
    assert asked.processor is not None
    asked.processor.apply(values[0], asked.drafted)
    torch.testing.assert_close(values[0], torch.tensor([1.0, -4.75, -0.5, 0.0, 0.0]))
    assert sample(logits, [seen]).tokens == [0]


def test_bans_are_final():
    logits = random_logits(1)
    best = int(logits.argmax())
    bias = ((best, 100.0),)
    for ban in (
        {"bad_words": ((best,),)},
        {"bad_words": ((9, 8, best),), "output": [9, 8]},
        {"bad_words": ((9, 8, best),), "output": [9], "drafted": [8]},
        {"min_tokens": 4, "stop_token_ids": (best,)},
        {"allowed_token_ids": (best - 1, best - 2)},
    ):
        output, drafted = ban.pop("output", ()), ban.pop("drafted", ())
        asked = place(output=output, drafted=drafted, temperature=0.0, logit_bias=bias, **ban)
        assert sample(logits, [asked]).tokens != [best]
    begun = place(output=[9], temperature=0.0, logit_bias=bias, bad_words=((9, 8, best),))
    assert sample(logits, [begun]).tokens == [best]


def test_a_row_without_any_token_and_a_row_that_is_not_finite_fail_alone():
    logits = random_logits(3)
    logits[1, 17] = torch.nan
    places = [
        place(temperature=0.0, allowed_token_ids=(4,), bad_words=((4,),)),
        place(temperature=1.0),
        place(temperature=0.0),
    ]
    drawn = sample(logits, places)
    assert set(drawn.errors) == {0, 1}
    assert drawn.errors[0].refused
    assert "allow no token" in drawn.errors[0].cause
    assert not drawn.errors[1].refused
    assert "not finite" in drawn.errors[1].cause
    assert drawn.tokens[2] == int(logits[2].argmax())


def test_logprobs_are_the_models_own():
    logits = random_logits(2)
    expected = torch.log_softmax(logits, -1)
    first, second = logprobs_of(logits, [int(logits[0].argmax()), 3], 4)
    assert isinstance(first, TokenLogprobs)
    assert first.rank == 1
    assert first.top[0][0] == first.token
    assert second.logprob == pytest.approx(float(expected[1, 3]), abs=1e-5)
    assert second.rank == int((expected[1] > expected[1, 3]).sum()) + 1
    assert [token for token, _ in second.top] == expected[1].topk(4).indices.tolist()


def test_counts_grow_with_the_sequence():
    """What a processor keeps between steps is what a new one would count."""
    kept = place(output=[1], temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5)
    logits = random_logits(1)
    for token in (4, 4, 9):
        assert kept.processor is not None
        kept.processor.apply(logits[0].clone(), (7, 7))
        kept.sequence.tokens.append(token)
    fresh = place(output=[1, 4, 4, 9], temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5)
    one, other = logits[0].clone(), logits[0].clone()
    assert fresh.processor is not None
    kept.processor.apply(one, (4,))
    fresh.processor.apply(other, (4,))
    assert torch.equal(one, other)


class Raising:
    def __init__(self, failure: Exception) -> None:
        self.failure = failure

    def allowed(self, drafted):
        raise self.failure


def masked(failure: Exception) -> Place:
    made = place(temperature=0.0)
    return made._replace(
        processor=LogitsProcessor(made.sequence, VOCABULARY, torch.device("cpu"), Raising(failure))
    )


def test_a_mask_that_raises_fails_in_its_row():
    logits = random_logits(2)
    drawn = sample(logits, [masked(ValueError("no such rule")), place(temperature=0.0)])
    assert list(drawn.errors) == [0]
    assert "no such rule" in drawn.errors[0].cause
    assert drawn.tokens[1] == int(logits[1].argmax())


@pytest.mark.parametrize("failure", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_lack_of_memory_is_not_the_fault_of_the_request_whose_mask_met_it(failure):
    with pytest.raises(type(failure)):
        sample(random_logits(1), [masked(failure)])


@pytest.mark.parametrize("together", [1, 2, 3, 5, 8, 100])
def test_rows_are_drawn_in_pieces_as_they_are_drawn_at_once(monkeypatch, together):
    """Sequences of one to five rows, among them drafts whose rows wait for each other."""
    logits = random_logits(40)
    places: list[Place] = []
    for number in range(16):
        asked = {"temperature": 0.8 * (number % 3), "top_p": 0.8 if number % 2 else 1.0, "seed": number}
        root = place(output=[3] * number, **asked, frequency_penalty=0.3 * (number % 4))
        places.append(root)
        for depth in range(min(number % 5, 39 - len(places))):
            path = (*places[-1].drafted, int(logits[len(places) - 1].argmax()))
            places.append(root._replace(drafted=path, after=1 if depth else 0))
    places = places[: len(logits)]
    places[7] = masked(ValueError("broken"))
    logits = logits[: len(places)]
    logits[9] = torch.nan
    expected = sample(logits, places)
    sizes = []
    each = sampler._sample
    monkeypatch.setattr(sampler, "PIECE_BYTES", together * 4 * VOCABULARY)
    monkeypatch.setattr(
        sampler, "_sample", lambda some, places: sizes.append(len(places)) or each(some, places)
    )
    assert sample(logits, places) == expected
    assert sum(sizes) == len(places)
    assert max(sizes) <= max(5, together)
    assert together >= len(places) or len(sizes) > 1


def test_a_bias_of_many_entries_is_written_at_once(monkeypatch):
    """Each entry by itself is a launch on a GPU, and every step waits for a thousand of them."""
    writes = 0
    write = torch.Tensor.__setitem__

    def counting(*arguments):
        nonlocal writes
        writes += 1
        return write(*arguments)

    biases = tuple((token, (token % 13) / 7 - 1.0) for token in range(0, VOCABULARY, 2))
    asked = {
        "logit_bias": ((4, 50.0), *biases),
        "allowed_token_ids": tuple(range(900)),
        "bad_words": tuple((token,) for token in range(100, 400)),
        "stop_token_ids": tuple(range(400, 600)),
        "min_tokens": 300,
        "repetition_penalty": 1.1,
    }
    expected = random_logits(1)[0]
    monkeypatch.setattr(torch.Tensor, "__setitem__", counting)
    processor = place(prompt=range(500), output=range(200), **asked).processor
    assert processor is not None
    processor.catch_up()
    logits = expected.clone()
    processor.apply(logits, (5, 6, 7))
    assert writes <= 8
    monkeypatch.undo()
    seen = torch.zeros(VOCABULARY, dtype=torch.bool)
    seen[:500] = True
    penalised = torch.where(expected > 0, expected / 1.1, expected * 1.1)
    expected = torch.where(seen, penalised, expected)
    for token, bias in asked["logit_bias"]:
        if (token, bias) != (4, 50.0):  # the last of equal ones counts
            expected[token] += torch.tensor(bias)
    expected[[*range(100, 600), *range(900, VOCABULARY)]] = -torch.inf
    assert torch.equal(logits, expected)
