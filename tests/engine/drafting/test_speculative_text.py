"""Speculation gives the very text, and the very log-probabilities, of plain decoding: a matrix."""

from __future__ import annotations

import pytest

from engine.drafting import LIGHT
from scheduler.types import FinishReason
from tests.engine.drafting.eager import eager
from tests.engine.tiny import abort, request, run, tiny_core

PROMPTS = [
    [11, 12, 13, 14, 15, 16, 17, 18] * 5,
    [21, 22, 23, 21, 22, 23, 21, 22],
    list(range(30, 90)),
]
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 0.7, "top_p": 0.9},
    "hot": {"temperature": 1.5, "top_p": 0.95, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "penalised": {"temperature": 0.3, "repetition_penalty": 1.2, "min_p": 0.02, "logit_bias": ((17, 4.0),)},
    "banned": {"temperature": 0.5, "bad_words": ((12, 13), (40,)), "min_tokens": 20},
}


def asked(method: str, sampling: dict[str, object], **fields: object):
    return [
        request(
            f"r{number}", prompt, method=method, max_tokens=40, logprobs=2, seed=number, **sampling, **fields
        )
        for number, prompt in enumerate(PROMPTS * 2)
    ]


def told(core, requests):
    heard = run(core, *requests)
    return {key: (one.tokens, one.logprobs, one.finish) for key, one in heard.items()}


@pytest.fixture(scope="module")
def plain():
    core = tiny_core()
    return {name: told(core, asked("autoregressive", sampling)) for name, sampling in SAMPLINGS.items()}


@pytest.mark.parametrize("drafter", ["auto", *LIGHT])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_every_drafter_gives_the_text_of_plain_decoding(name, drafter, plain):
    core = eager(tiny_core())
    for _ in range(2):  # the second time with prefix hits, and with the first answers known
        assert told(core, asked("speculative", SAMPLINGS[name], drafter=drafter)) == plain[name]


@pytest.mark.parametrize("settings", [{"num_pages": 12}, {"max_num_seqs": 2}, {"max_num_batched_tokens": 16}])
def test_also_where_pages_places_or_tokens_are_few(settings, plain):
    core = eager(tiny_core(**settings))
    for name in ("greedy", "hot"):
        assert told(core, asked("speculative", SAMPLINGS[name])) == plain[name]


def test_methods_mix_in_one_batch(plain):
    core = eager(tiny_core())
    both = asked("autoregressive", SAMPLINGS["warm"])[::2] + asked("speculative", SAMPLINGS["warm"])[1::2]
    assert told(core, both) == plain["warm"]


def test_choices_share_a_prompt_and_differ():
    core = eager(tiny_core())
    fields = {"num_choices": 3, "temperature": 0.9, "max_tokens": 30, "seed": 5}
    expected = run(core, request("a", PROMPTS[0], **fields))
    found = run(core, request("b", PROMPTS[0], method="speculative", **fields))
    texts = [found["b", index].tokens for index in range(3)]
    assert texts == [expected["a", index].tokens for index in range(3)]
    assert len(set(map(tuple, texts))) == 3


def test_a_stop_in_the_middle_of_an_accepted_run_ends_there():
    core = eager(tiny_core())
    [(_, whole)] = run(core, request("a", PROMPTS[0], temperature=0.0, max_tokens=40)).items()
    stop = whole.tokens[25]
    at = whole.tokens.index(stop)
    for round_number in range(2):  # the second time the whole answer is drafted
        fields = {"temperature": 0.0, "max_tokens": 40, "method": "speculative"}
        run(core, request(f"warm{round_number}", PROMPTS[0], **fields))
        [(_, cut)] = run(core, request("b", PROMPTS[0], stop_token_ids=(stop,), **fields)).items()
        assert cut.tokens == whole.tokens[: at + 1]
        assert cut.finish is FinishReason.STOP


def test_drafts_are_accepted_and_save_steps():
    core = eager(tiny_core())
    fields = {"temperature": 0.0, "max_tokens": 40, "method": "speculative"}
    run(core, request("a", PROMPTS[0], **fields))
    before = core.scheduler._num_steps
    run(core, request("b", PROMPTS[0], **fields))
    assert core.scheduler._num_steps - before < 12, "an answer given before takes few steps"


def test_an_aborted_request_leaves_nothing_behind():
    core = eager(tiny_core())
    from engine.messages import Submit

    core.handle(Submit(request("a", PROMPTS[0], temperature=0.0, max_tokens=200, method="speculative")))
    for _ in range(12):
        core.step()
    abort(core, "a")
    core.step()
    assert not core.speculation._met
    assert not core.speculation._asked
    assert not core.speculation.acceptance._own
    assert all(not getattr(drafter, "_indices", {}) for drafter in core.speculation.drafters.values())
