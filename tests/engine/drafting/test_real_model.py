"""The default model with every drafter that it can have, its own twin included, against plain decoding.

Greedy, 0.7 with top-p, 1.5 with top-p and penalties in one batch of 16, and alone; from nothing, with prefix
hits and with so few pages that sequences are preempted: the same texts, and the same bits of
log-probabilities.
"""

from __future__ import annotations

import pytest

from engine.building import build_engine
from engine.checkpoint import locate
from engine.config import EngineConfig
from engine.drafting import AUTO, LIGHT
from engine.vocabulary import load
from scheduler.config import SchedulerConfig
from tests.engine.drafting.eager import eager
from tests.engine.test_building import COSTS
from tests.engine.tiny import request, run

NUM_TOKENS = 12
SAMPLINGS = (
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 0.8, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"temperature": 1.5, "top_p": 0.7, "repetition_penalty": 1.2, "min_p": 0.02},
)
TEXT = "one two three four, one two three five, one two three six and then"
FEW_PAGES = 40  # of 4 tokens: half of what the batch needs in the end


def asked(tokenizer, method, drafter, numbers):
    """Sixteen requests, of four prompts and four ways to sample."""
    texts = (TEXT, TEXT[4:], "The sky is", "def f(x):")
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [
        request(
            f"r{number}",
            prompts[number % 4],
            method=method,
            drafter=drafter,
            max_draft_tokens=6,
            max_tokens=NUM_TOKENS,
            seed=number,
            logprobs=1,
            **SAMPLINGS[number // 4],
        )
        for number in numbers
    ]


def told(core, requests):
    heard = run(core, *requests)
    return {name: (one.tokens, one.logprobs, one.finish) for (name, _), one in heard.items()}


@pytest.fixture(scope="module")
def cores(smollm2_gguf):
    """One with pages for all, one with few of them."""
    found = []
    for num_pages, page_size in ((400, 16), (FEW_PAGES, 4)):
        core = build_engine(
            EngineConfig(
                model=str(smollm2_gguf),
                device="cpu",
                state_folder="-",
                costs=COSTS,
                max_model_len=128,
                draft_model=str(smollm2_gguf),
                scheduler=SchedulerConfig(
                    num_pages=num_pages, page_size=page_size, max_num_seqs=16, growth_share=0.0
                ),
            )
        ).core
        found.append(eager(core))
    return found


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf):
    return load(locate(str(smollm2_gguf))).plain


@pytest.fixture(scope="module")
def plain(cores, tokenizer):
    return told(cores[0], asked(tokenizer, "autoregressive", AUTO, range(16)))


@pytest.mark.parametrize("drafter", [AUTO, *LIGHT, "skipped_layers", "model"])
def test_every_drafter_gives_the_texts_of_plain_decoding(cores, tokenizer, plain, drafter):
    roomy, tight = cores
    for _ in range(2):  # the second time prompts are found in the cache
        assert told(roomy, asked(tokenizer, "speculative", drafter, range(16))) == plain
    for number in (1, 6, 11):
        alone = asked(tokenizer, "speculative", drafter, [number])
        assert told(roomy, alone) == {f"r{number}": plain[f"r{number}"]}
    before = tight.scheduler.stats().num_preemptions
    assert told(tight, asked(tokenizer, "speculative", drafter, range(16))) == plain
    assert tight.scheduler.stats().num_preemptions > before


def test_drafts_of_every_kind_were_accepted(cores):
    """Else the matrix shows nothing."""
    acceptance = cores[0].speculation.acceptance
    kinds = {drafter for (drafter, _), tally in acceptance._kinds.items() if tally.successes > 1}
    assert {"prompt_lookup", "past_outputs", "recycling", "model"} <= kinds
