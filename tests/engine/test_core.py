"""The engine's step on a tiny model: batching, stops, sharing, faults, and the seam for decoding methods."""

from __future__ import annotations

import pytest
import torch

from engine.decoding import METHODS
from engine.messages import Abort, Submit
from engine.sampling import sampler
from scheduler.lengths import ALL
from scheduler.types import FinishReason
from tests.engine.tiny import Heard, abort, request, run, tiny_core
from tests.engine.windows import LineGuesser

PROMPT = [5, 17, 88, 250, 3, 9, 41] * 9  # 63 tokens: three full pages and a rest
GREEDY = {"temperature": 0.0, "max_tokens": 12}


def tokens_of(core, *requests):
    return {key: heard.tokens for key, heard in run(core, *requests).items()}


def test_requests_of_all_lengths_end_with_the_asked_number_of_tokens():
    core = tiny_core()
    asked = [request(f"r{n}", PROMPT[: n + 1], temperature=1.0, seed=n, max_tokens=n + 1) for n in range(30)]
    heard = run(core, *asked)
    for n in range(30):
        assert len(heard[f"r{n}", 0].tokens) == n + 1
        assert heard[f"r{n}", 0].finish is FinishReason.LENGTH


def test_a_stop_token_ends_the_sequence_and_is_named():
    core = tiny_core()
    free = run(core, request("free", PROMPT, **GREEDY))["free", 0].tokens
    stop = free[4]
    where = free.index(stop)
    heard = run(core, request("stopped", PROMPT, stop_token_ids=(stop,), **GREEDY))["stopped", 0]
    assert heard.tokens == free[: where + 1]
    assert heard.finish is FinishReason.STOP


def test_the_context_length_ends_a_sequence():
    heard = run(tiny_core(), request("r", [7] * 500, temperature=0.0, max_tokens=100))["r", 0]
    assert len(heard.tokens) == 12
    assert heard.finish is FinishReason.LENGTH


def test_choices_share_the_pages_of_the_prompt_and_differ_in_text():
    core = tiny_core()
    heard = run(core, request("n", PROMPT, num_choices=4, temperature=1.0, seed=1, max_tokens=8))
    assert len({tuple(heard["n", index].tokens) for index in range(4)}) == 4
    assert [heard["n", index].num_cached for index in range(4)] == [0, 48, 48, 48]


def test_a_choice_is_what_it_is_whatever_n_is():
    sampling = {"temperature": 1.0, "seed": 11, "max_tokens": 8}
    two = tokens_of(tiny_core(), request("n", PROMPT, num_choices=2, **sampling))
    five = tokens_of(tiny_core(), request("n", PROMPT, num_choices=5, **sampling))
    assert two["n", 1] == five["n", 1]


def test_log_probabilities_come_with_their_tokens():
    heard = run(tiny_core(), request("r", PROMPT, logprobs=3, **GREEDY))["r", 0]
    assert [entry.token for entry in heard.logprobs] == heard.tokens
    assert all(entry.rank == 1 and len(entry.top) == 3 for entry in heard.logprobs)


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 5}, {"num_pages": 8}])
def test_prompt_log_probabilities_come_once_each_in_order(settings):
    core = tiny_core(**settings)
    warm = request("warm", PROMPT, **GREEDY)
    asked = request("r", PROMPT, prompt_logprobs=2, **GREEDY)
    other = request("other", PROMPT[::-1], **GREEDY)
    run(core, warm)
    heard = run(core, asked, other)["r", 0]
    assert [entry.token for entry in heard.prompt_logprobs] == PROMPT[1:]
    plain = run(tiny_core(), request("r", PROMPT, prompt_logprobs=2, **GREEDY))["r", 0]
    assert heard.prompt_logprobs == plain.prompt_logprobs


@pytest.mark.parametrize("together", [1, 3, 8, 20])
def test_prompt_log_probabilities_are_scored_in_pieces_with_the_same_bits(together, monkeypatch):
    """The logits of a long prompt's rows are gigabytes, which nobody has kept free."""
    asked = [request(f"r{n}", PROMPT[n:] * 2, prompt_logprobs=n % 4, logprobs=1, **GREEDY) for n in range(9)]
    whole = run(tiny_core(max_num_batched_tokens=512), *asked)
    core = tiny_core(max_num_batched_tokens=512)
    sizes: list[int] = []
    logits = core.runner.model.logits
    core.runner.model.logits = lambda hidden, wanted: sizes.append(len(wanted)) or logits(hidden, wanted)
    monkeypatch.setattr(sampler, "PIECE_BYTES", together * 4 * core.vocab_size)
    heard = run(core, *asked)
    for key, one in heard.items():
        assert len(one.prompt_logprobs) == len(asked[int(key[0][1:])].prompt_ids) - 1
        assert one.prompt_logprobs == whole[key].prompt_logprobs
        assert (one.tokens, one.logprobs) == (whole[key].tokens, whole[key].logprobs)
    assert max(sizes) <= max(together, len(asked))


def test_prompt_tokens_are_counted_once_whatever_happens_to_them():
    core = tiny_core(max_num_batched_tokens=20, num_pages=14)
    counted = 0
    asked = [request(f"r{n}", PROMPT[n:], temperature=0.0, max_tokens=60) for n in range(6)]
    for one in asked:
        core.handle(Submit(one))
    while core.has_work:
        counted += core.step().num_prompt_tokens
    assert core.scheduler.stats().num_preemptions > 0
    assert counted == sum(len(one.prompt_ids) for one in asked)


def test_scoring_without_output():
    heard = run(tiny_core(), request("r", PROMPT, prompt_logprobs=0, max_tokens=0))["r", 0]
    assert len(heard.prompt_logprobs) == len(PROMPT) - 1
    assert heard.tokens == []
    assert heard.finish is FinishReason.LENGTH


def test_a_sequence_that_cannot_be_sampled_fails_alone():
    core = tiny_core()
    alone = tokens_of(core, request("good", PROMPT, **GREEDY))["good", 0]
    heard = run(
        core,
        request("good", PROMPT, **GREEDY),
        request("bad", PROMPT[:9], allowed_token_ids=(4,), bad_words=((4,),), **GREEDY),
    )
    assert heard["bad", 0].finish is FinishReason.ERROR
    assert "allow no token" in str(heard["bad", 0].error)
    assert heard["good", 0].tokens == alone


@pytest.mark.parametrize("bad", [[1, 299, 2], [299, *PROMPT]])
def test_numbers_that_are_not_finite_end_one_sequence_and_poison_no_page(bad):
    """Not even of a prompt whose earlier chunks were computed, and offered to others, before it showed."""
    asked = [request(f"good{n}", PROMPT[n:], **GREEDY) for n in range(12)]
    alone = tokens_of(tiny_core(), *asked)
    core = tiny_core(max_num_batched_tokens=16, num_pages=24)
    core.runner.model.embedding[299] = torch.nan
    assert run(core, request("bad", bad, **GREEDY))["bad", 0].finish is FinishReason.ERROR
    assert core.scheduler.stats().num_pages_cached == 0
    for one in asked:
        assert tokens_of(core, one)[one.request_id, 0] == alone[one.request_id, 0]


def test_a_step_that_raises_ends_its_own_sequences_and_the_next_step_works(monkeypatch):
    core = tiny_core()
    alone = tokens_of(core, request("later", PROMPT, **GREEDY))["later", 0]
    compute = core.runner.model.compute
    monkeypatch.setattr(core.runner.model, "compute", lambda *_: 1 / 0)
    core.handle(Submit(request("now", PROMPT, **GREEDY)))
    (output,) = core.step().outputs
    assert output.finish is FinishReason.ERROR
    assert output.error is not None
    assert "ZeroDivisionError" in output.error
    monkeypatch.setattr(core.runner.model, "compute", compute)
    assert tokens_of(core, request("later", PROMPT, **GREEDY))["later", 0] == alone


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_ids": (1, 300)},
        {"prompt_ids": (-1,)},
        {"logit_bias": ((300, 1.0),)},
        {"bad_words": ((1, 10**6),)},
        {"allowed_token_ids": (2**40,)},
        {"method": "guesswork"},
        {"prompt_ids": ()},
        {"bad_words": ((),)},
        {"logprobs": -1},
        {"prompt_ids": (1,) * 513},
    ],
)
def test_what_could_corrupt_a_batch_is_refused(fields):
    core = tiny_core()
    prompt = list(fields.pop("prompt_ids", PROMPT))
    heard = run(core, request("bad", prompt, **fields), request("good", PROMPT, **GREEDY))
    assert heard["bad", 0].finish is FinishReason.ERROR
    assert heard["bad", 0].error
    assert len(heard["good", 0].tokens) == 12


def test_an_abort_ends_one_choice_or_all_and_frees_the_pages():
    core = tiny_core()
    core.handle(Submit(request("r", PROMPT, num_choices=3, temperature=1.0, max_tokens=200)))
    for _ in range(6):
        core.step()
    abort(core, "r", 1)
    ended = [output for output in core.step().outputs if output.finish]
    assert [(output.index, output.finish) for output in ended] == [(1, FinishReason.ABORT)]
    abort(core, "r")
    abort(core, "nobody")
    report = core.step()
    assert {output.index for output in report.outputs if output.finish} == {0, 2}
    assert report.stats.num_pages_held == 0
    assert not core.has_work


@pytest.mark.parametrize("natural", [True, False])
def test_lengths_learn_how_an_aborted_text_ended(natural):
    core = tiny_core()
    core.handle(Submit(request("r", PROMPT, temperature=1.0, max_tokens=200)))
    for _ in range(6):
        core.step()
    core.handle(Abort("r", 0, natural=natural))
    ended, cut = core.scheduler.lengths._shared[ALL].counts()
    assert (sum(ended), sum(cut)) == (float(natural), float(not natural))


def test_a_method_that_commits_none_or_many_tokens_a_step_gives_the_same_text(monkeypatch):
    sampling = {"temperature": 1.0, "seed": 5, "max_tokens": 60, "frequency_penalty": 0.4, "logprobs": 2}
    plain = run(tiny_core(), request("r", PROMPT, **sampling))["r", 0]
    made: list[LineGuesser] = []

    def make() -> LineGuesser:
        made.append(LineGuesser(plain.tokens, seed=len(made)))
        return made[-1]

    monkeypatch.setitem(METHODS, "guess", make)
    core = tiny_core()
    guessed = [request(f"g{n}", PROMPT, method="guess", **sampling) for n in range(6)]
    heard = run(core, request("r", PROMPT, **sampling), *guessed)
    for one in heard.values():
        assert_same(one, plain)
    commits = [count for method in made for count in method.commits]
    assert 0 in commits
    assert max(commits) > 3


def assert_same(one: Heard, other: Heard) -> None:
    assert one.tokens == other.tokens
    assert one.finish == other.finish
    assert [entry.token for entry in one.logprobs] == one.tokens
    assert one.logprobs == other.logprobs
