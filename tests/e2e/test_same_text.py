"""Same seed, same text, on the real model in float32; and its greedy text is the reference's."""

from __future__ import annotations

import pytest
import torch
import transformers

from engine.building import build_engine
from engine.checkpoint import locate
from engine.config import EngineConfig
from engine.core import EngineCore
from scheduler.config import SchedulerConfig
from server.tokenizer import Tokenizer
from tests.engine.test_building import COSTS
from tests.engine.tiny import request, run

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "Water boils at 100 degrees",
    "1 2 3 4 5 6 7 8",
    "The three laws of motion are",
    "Dear Sir or Madam,",
    "import numpy as np\n\n",
    "Photosynthesis is the process by which",
    "In 1969, astronauts",
    "A haiku about autumn:\n",
    "SELECT name FROM users WHERE",
    "To make bread you need",
    "Der schnelle braune Fuchs",
    "La Révolution française",
    "Question: What is 7 times 8?\nAnswer:",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "🙂 emoji and ünïcödé",
    "<html><body>",
    "My favourite book is",
]
NUM_TOKENS = 20
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 2024, "max_tokens": 24}


def engine(**settings: object) -> EngineCore:
    scheduling = SchedulerConfig(**{"num_pages": 600, "policy": "fcfs", **settings})  # type: ignore[arg-type]
    return build_engine(EngineConfig(device="cpu", dtype="float32", costs=COSTS, scheduler=scheduling)).core


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_checkpoint(locate(""))


@pytest.fixture(scope="module")
def ids(tokenizer) -> list[list[int]]:
    return [tokenizer.encode(prompt, special=False) for prompt in PROMPTS]


def test_greedy_text_is_the_one_of_transformers_at_equal_weights(smollm2_folder, ids):
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    asked = [
        request(f"p{number}", prompt, temperature=0.0, max_tokens=NUM_TOKENS)
        for number, prompt in enumerate(ids)
    ]
    heard = run(engine(), *asked, checked=False)
    for number, prompt in enumerate(ids):
        tokens = heard[f"p{number}", 0].tokens
        assert len(tokens) == NUM_TOKENS
        # Its choice behind each token of ours: if each is our next one, its own text is ours.
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert tokens == logits.argmax(-1).tolist(), PROMPTS[number]


@pytest.fixture(scope="module")
def alone(ids) -> list[int]:
    return run(engine(), request("r", ids[16], **SAMPLED), checked=False)["r", 0].tokens


def others(ids, count, longer=0):
    return [
        request(f"o{number}", ids[number], temperature=0.9, seed=number, max_tokens=4 + number + longer)
        for number in range(count)
    ]


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 7}, {"max_num_batched_tokens": 48}, {"num_pages": 16}],
    ids=["whole", "chunks of 7", "chunks of 48", "preempted"],
)
def test_text_does_not_depend_on_company_chunks_or_preemption(settings, ids, alone):
    core = engine(**{"max_num_seqs": 16, **settings})
    # Nobody is admitted without a page to grow into: to be preempted one must grow by more than that.
    crowd = others(ids, 9, longer=40 if "num_pages" in settings else 0)
    asked = [*crowd, request("r", ids[16], **SAMPLED), request("twin", ids[16], **SAMPLED)]
    heard = run(core, *asked, checked=False)
    assert heard["r", 0].tokens == alone
    assert heard["twin", 0].tokens == alone
    if "num_pages" in settings:
        assert core.scheduler.stats().num_preemptions > 0


def test_text_does_not_depend_on_drafts(ids, alone):
    core = engine(max_num_seqs=16)
    for name in ("r", "again"):  # the second time from what was said the first time, above all
        asked = [request(name, ids[16], method="speculative", **SAMPLED), *others(ids, 5)]
        steps = core.scheduler._num_steps
        heard = run(core, *asked, checked=False)
        assert heard[name, 0].tokens == alone
    assert core.scheduler._num_steps - steps < len(alone), "no draft was ever accepted"


def test_text_does_not_depend_on_the_prefix_cache(ids, alone):
    core = engine()
    for _ in range(2):
        heard = run(core, request("r", ids[16], **SAMPLED), checked=False)["r", 0]
        assert heard.tokens == alone
    assert heard.num_cached > 0


def test_text_does_not_depend_on_where_another_engine_stopped(ids, alone):
    again = request("r", ids[16], delivered=(tuple(alone[:9]),), **SAMPLED)
    heard = run(engine(), *others(ids, 3), again, checked=False)["r", 0]
    assert heard.tokens == alone[9:]
