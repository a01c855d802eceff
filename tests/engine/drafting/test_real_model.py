"""The default model with every drafter that it can have, its own twin included, against plain decoding.

Greedy, 0.7 with top-p, 1.5 with top-p and penalties in one batch of 16, its drafters mixed, and alone; from
nothing, with prefix hits and with so few pages that sequences are preempted: the same texts, and the same
bits of log-probabilities.
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
DRAFTERS = (AUTO, *LIGHT, "skipped_layers", "model", AUTO)
HALVES = (DRAFTERS[:4], DRAFTERS[4:])
TEXTS = (
    "one two three four, one two three five, one two three six and then",
    "two three four, one two three five, one two three six and then",
    "The sky is",
    "def f(x):",
)
PAGE_SIZE, NUM_PAGES = 4, 112
NEIGHBOUR_PAGES = 78  # the batch fits into the rest at first, and not by far when it has grown


@pytest.fixture(scope="module")
def core(smollm2_gguf):
    config = EngineConfig(
        model=str(smollm2_gguf),
        device="cpu",
        num_threads=1,  # tests/e2e/test_same_text.py takes every core
        state_folder="-",
        costs=COSTS,
        max_model_len=PAGE_SIZE * NUM_PAGES,
        draft_model=str(smollm2_gguf),
        draft_overlap="on",
        scheduler=SchedulerConfig(
            num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_num_seqs=17, policy="fcfs", growth_share=0.0
        ),
    )
    return eager(build_engine(config).core)


@pytest.fixture(scope="module")
def asked(smollm2_gguf):
    """Requests, of sixteen that there are: four prompts, and each sampled in four ways."""
    tokenizer = load(locate(str(smollm2_gguf))).plain
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]

    def of(numbers, **fields):
        return [
            request(
                f"r{number}",
                prompts[number % 4],
                max_draft_tokens=4,
                max_tokens=NUM_TOKENS,
                seed=number,
                logprobs=1,
                **SAMPLINGS[number // 4],
                **{name: value(number) if callable(value) else value for name, value in fields.items()},
            )
            for number in numbers
        ]

    return of


def told(core, *requests):
    return {name: (one.tokens, one.logprobs, one.finish) for (name, _), one in run(core, *requests).items()}


@pytest.fixture(scope="module")
def plain(core, asked):
    return told(core, *asked(range(16), method="autoregressive"))


def mixed(half):
    """Every sampling with each drafter of the half, each drafter with every prompt."""
    return lambda number: HALVES[half][(number + number // 4) % 4]


@pytest.mark.parametrize("half", range(2))
def test_every_drafter_gives_the_texts_of_plain_decoding(core, asked, plain, half):
    for _ in range(2):  # the second time prompts are found in the cache
        before = core.scheduler.stats().prefix_hit_tokens
        batch = asked(range(16), method="speculative", drafter=mixed(half), cache_salt=f"{half}")
        assert told(core, *batch) == plain
    assert core.scheduler.stats().prefix_hit_tokens > before


def test_also_beside_a_neighbour_that_leaves_few_pages(core, asked, plain):
    prompt = [100 + number % 1000 for number in range(NEIGHBOUR_PAGES * PAGE_SIZE)]
    for half in range(2):
        neighbour = request("neighbour", prompt, temperature=0.0, max_tokens=24)
        batch = asked(range(16), method="speculative", drafter=mixed(half), cache_salt=f"few {half}")
        found = told(core, neighbour, *batch)
        del found["neighbour"]
        assert found == plain
    assert core.scheduler.stats().num_preemptions


@pytest.mark.parametrize("number", range(7))
def test_also_alone(core, asked, plain, number):
    for one in (number, 15 - number):
        alone = asked([one], method="speculative", drafter=DRAFTERS[number], cache_salt="alone")
        assert told(core, *alone) == {f"r{one}": plain[f"r{one}"]}


def test_drafts_of_every_kind_were_accepted(core):
    """Else the matrix shows nothing."""
    acceptance = core.speculation.acceptance
    kinds = {drafter for (drafter, _), tally in acceptance._kinds.items() if tally.successes > 1}
    assert {"prompt_lookup", "past_outputs", "recycling", "model"} <= kinds
