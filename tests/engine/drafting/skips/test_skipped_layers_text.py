"""Self-speculation in the whole engine: whatever is skipped, the text and its log-probabilities stay."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from engine.drafting.skips.layer_search import LayerSearch
from engine.drafting.skips.skipped_layers import SkippedLayers
from engine.messages import Submit
from tests.engine.drafting.eager import eager
from tests.engine.drafting.skips.test_skipped_layers import DEEP, SLIDING, Eager
from tests.engine.drafting.test_speculative_text import told
from tests.engine.tiny import SETTINGS, abort, core_around, random_weights, request, run

PROMPTS = [[11, 12, 13, 14, 15, 16, 17, 18] * 5, [21, 22, 23, 21, 22], list(range(30, 90))]
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 0.7, "top_p": 0.9},
    "hot": {"temperature": 1.5, "top_p": 0.95, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "penalised": {"temperature": 0.3, "repetition_penalty": 1.2, "logit_bias": ((17, 4.0),), "min_p": 0.02},
}


def core_of(config=DEEP, skipped=None, search=Eager, **settings):
    """`skipped` None: there is no drafter, as for the plain text."""

    def drafters(around):
        found = search(config.num_layers, skipped=skipped)
        return {} if skipped is None else {"skipped_layers": SkippedLayers(around, found)}

    scheduling = replace(SETTINGS, **settings)
    core = core_around(config, random_weights(config), scheduling, drafters=drafters)
    return eager(core)


def asked(sampling, **fields):
    return [
        request(f"r{number}", prompt, max_tokens=14, logprobs=2, seed=number, **sampling, **fields)
        for number, prompt in enumerate(PROMPTS)
    ]


SPECULATIVE = {"method": "speculative", "drafter": "skipped_layers"}


@pytest.fixture(scope="module")
def plain():
    """Under a config and a sampling."""
    cores = {"whole": core_of(DEEP), "sliding": core_of(SLIDING)}
    return {
        (config, name): told(core, asked(sampling))
        for config, core in cores.items()
        for name, sampling in SAMPLINGS.items()
    }


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("config", ["whole", "sliding"])
def test_any_skipped_layers_give_the_text_of_plain_decoding(config, name, plain):
    rng = random.Random(name)
    core = core_of(DEEP if config == "whole" else SLIDING, rng.sample(range(1, 5), rng.randrange(1, 5)))
    core.speculation.drafters["skipped_layers"]._trial_every = lambda: 10  # sets change in the middle
    for _ in range(2):  # the second time with prefix hits
        assert told(core, asked(SAMPLINGS[name], **SPECULATIVE)) == plain[config, name]


@pytest.mark.parametrize("settings", [{"num_pages": 10}, {"max_num_seqs": 2}, {"max_num_batched_tokens": 16}])
def test_also_where_pages_places_or_tokens_are_few(settings, plain):
    core = core_of(DEEP, (2, 3), **settings)
    for name in ("greedy", "hot"):
        assert told(core, asked(SAMPLINGS[name], **SPECULATIVE)) == plain["whole", name]


@pytest.mark.parametrize("name", ["greedy", "warm"])
def test_with_nothing_skipped_all_lines_stand(name, plain):
    core = core_of(DEEP, ())
    verified = []
    learn = core.speculation.learn

    def noted(plan, outcomes):
        found = learn(plan, outcomes)
        verified.extend((one.num_drafts, len(one.accepted)) for of_one in found.values() for one in of_one)
        return found

    core.speculation.learn = noted
    found = told(core, asked(SAMPLINGS[name], max_draft_tokens=1, **SPECULATIVE))
    assert found == plain["whole", name]
    assert verified
    assert set(verified) == {(1, 1)}


def test_choices_share_a_prompt_and_drafts_share_nothing(plain):
    fields = {"num_choices": 3, "temperature": 0.9, "max_tokens": 20, "seed": 5}
    expected = run(core_of(), request("a", PROMPTS[0], **fields))
    found = run(core_of(DEEP, (1, 4)), request("a", PROMPTS[0], **fields, **SPECULATIVE))
    assert [one.tokens for one in found.values()] == [one.tokens for one in expected.values()]


def test_an_aborted_request_leaves_nothing_behind():
    core = core_of(DEEP, (2,), LayerSearch)
    core.handle(Submit(request("a", PROMPTS[0], temperature=0.0, max_tokens=200, **SPECULATIVE)))
    for _ in range(8):
        core.step()
    abort(core, "a")
    core.step()
    again = told(core, asked(SAMPLINGS["greedy"], **SPECULATIVE))
    assert len(again) == len(PROMPTS)
    drafter = core.speculation.drafters["skipped_layers"]
    drafter._scratch.lend([])
    assert not drafter._scratch._builder.num_tables
    assert not drafter._scratch._unsaid
