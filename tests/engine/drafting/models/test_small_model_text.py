"""Draft models in the whole engine: the text of plain decoding whoever drafts; steps saved by who can."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from engine.drafting.draft_kv import DraftKV
from engine.drafting.models import following
from engine.drafting.models.draft_model import DraftModel
from engine.drafting.models.following import Following
from engine.drafting.models.small_model import SmallModel
from engine.messages import Submit
from tests.engine.drafting.eager import eager
from tests.engine.drafting.models.small import beside, drafts_stood, own_model, random_models, transformer
from tests.engine.drafting.test_speculative_text import PROMPTS, SAMPLINGS, told
from tests.engine.tiny import TINY, abort, request, run, tiny_core


def asked(method, sampling, name="r", **fields):
    return [
        request(f"{name}{n}", prompt, method=method, max_tokens=24, logprobs=1, seed=n, **sampling, **fields)
        for n, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def plain():
    core = tiny_core()
    return {name: told(core, asked("autoregressive", sampling)) for name, sampling in SAMPLINGS.items()}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_models_that_know_nothing_change_nothing(name, plain):
    core = eager(tiny_core(drafters=random_models))
    expected = plain[name] | {("p" + key[1:], index): one for (key, index), one in plain[name].items()}
    for _ in range(2 if name == "hot" else 1):  # the second time with prefix hits
        together = asked("speculative", SAMPLINGS[name], drafter="model")
        together += asked("speculative", SAMPLINGS[name], "p", drafter="pard")
        assert told(core, together) == expected
    assert_empty(core)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_target_as_its_own_drafter_changes_nothing_and_is_nearly_always_right(name, plain):
    core = eager(tiny_core(drafters=own_model))
    assert told(core, asked("speculative", SAMPLINGS[name], drafter="model")) == plain[name]
    stood, seen = drafts_stood(core.speculation.drafters["model"].standing, drawn=name != "greedy")
    assert seen > 20
    assert stood >= 0.97 * seen
    assert_empty(core)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, SAMPLINGS["hot"]], ids=["greedy", "hot"])
def test_the_target_as_its_own_drafter_takes_few_steps(sampling):
    fields = {"max_tokens": 100, "method": "speculative", "drafter": "model"}
    core = eager(tiny_core(drafters=own_model))
    run(core, request("a", PROMPTS[0], **fields, **sampling))
    assert core.scheduler._num_steps < 35, "100 tokens, and a few steps until the chances are known"


@pytest.mark.parametrize(
    "settings", [{"num_pages": 12}, {"max_num_seqs": 2}, {"max_num_batched_tokens": 16}], ids=str
)
def test_also_where_pages_places_or_tokens_are_few(settings, plain):
    for drafters, name in ((own_model, "hot"), (random_models, "greedy")):
        core = eager(tiny_core(drafters=drafters, **settings))
        assert told(core, asked("speculative", SAMPLINGS[name], drafter="model")) == plain[name]
        assert_empty(core)


def few_pages(around):
    kv = DraftKV(TINY, around.ops, 10, 16, 576, around.max_num_seqs, around.dtype, around.device)
    draft = DraftModel(around.model, kv, TINY.vocab_size, around.processor_of)
    return {"model": SmallModel(draft, Following(kv, 512, TINY.vocab_size), cost=0.1)}


def test_few_draft_pages_cost_no_text(plain):
    core = eager(tiny_core(drafters=few_pages))
    assert told(core, asked("speculative", SAMPLINGS["warm"], drafter="model")) == plain["warm"]
    assert_empty(core)


def test_long_prompts_are_caught_up_with_while_others_run(monkeypatch):
    monkeypatch.setattr(following, "CATCH_UP_TOKENS", 24)
    prompts = [[number + 7 * k % 280 for k in range(30 + 60 * number)] for number in range(4)]
    ask = partial(request, max_tokens=40, temperature=0.7)
    expected = run(tiny_core(), *(ask(f"r{n}", prompt, seed=n) for n, prompt in enumerate(prompts)))
    core = eager(tiny_core(drafters=own_model))
    drafted = (
        ask(f"r{n}", prompt, seed=n, method="speculative", drafter="model")
        for n, prompt in enumerate(prompts)
    )
    heard = run(core, *drafted, steps_between=3)
    assert {key: one.tokens for key, one in heard.items()} == {
        key: one.tokens for key, one in expected.items()
    }
    assert_empty(core)


def test_an_aborted_request_leaves_nothing_behind():
    core = eager(tiny_core(drafters=own_model))
    fields = {"temperature": 0.9, "max_tokens": 200, "method": "speculative", "drafter": "model"}
    core.handle(Submit(request("a", PROMPTS[0], **fields)))
    for _ in range(9):
        core.step()
    drafter = core.speculation.drafters["model"]
    assert drafter.following._trees
    assert drafter.draft.kv.num_free_blocks < drafter.draft.kv.num_blocks
    abort(core, "a")
    core.step()
    assert_empty(core)


def assert_empty(core):
    for drafter in core.speculation.drafters.values():
        if hasattr(drafter, "draft"):
            assert drafter.draft.kv.num_free_blocks == drafter.draft.kv.num_blocks
            assert not drafter.draft.kv.batches.num_tables
            assert not drafter.following._trees


def test_models_of_other_sizes_draft_too(plain):
    def drafters(around):
        config = replace(TINY, layers=TINY.layers[:1], vocab_size=290, hidden_size=32, num_heads=2)
        return {"model": SmallModel(*beside(around, transformer(config, seed=4)), cost=0.3)}

    core = eager(tiny_core(drafters=drafters))
    assert told(core, asked("speculative", SAMPLINGS["hot"])) == plain["hot"]
