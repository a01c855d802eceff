"""Windows that are trees: text, log-probabilities and KV are those of plain decoding, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from cuda_kernels.ops import pick
from engine.decoding import METHODS
from engine.models.config import Layer, Rope
from engine.models.kv_groups import kv_spans
from tests.engine.tiny import CPU, SETTINGS, TINY, Heard, core_around, random_weights, request, run
from tests.engine.trees import TreeGuesser

if TYPE_CHECKING:
    from engine.core import EngineCore
    from scheduler.types import Request

PAGE_SIZE = 4
STEM = [(7 * n * n + 3 * n) % 300 for n in range(240)]
WHOLE = Layer(rope=Rope(theta=10000.0, num_rotated=16))
LOCAL = replace(WHOLE, window=21)
NARROW = replace(WHOLE, window=3)
CHUNKED = replace(WHOLE, chunk=8)
MODELS = {
    "whole": replace(TINY, layers=(WHOLE, WHOLE)),
    "caps_and_sinks": replace(TINY, layers=(WHOLE, LOCAL, WHOLE), attention_soft_cap=8.0, sinks=True),
    "all_slide": replace(TINY, layers=(NARROW, LOCAL)),
    "few_whole": replace(TINY, layers=(LOCAL, LOCAL, WHOLE, LOCAL, LOCAL, LOCAL)),
    "chunks": replace(TINY, layers=(CHUNKED, CHUNKED, CHUNKED, Layer())),
}
LENGTHS = [(9, 40), (60, 40), (110, 45), (61, 45)]  # prompts and outputs; one passes a block of keys


def core_for(name: str, times: float = 8, **settings: object) -> EngineCore:
    """`times`: pages for so many sequences of 160 tokens."""
    config = MODELS[name]
    weights = random_weights(config)
    if config.sinks:
        for index in range(config.num_layers):
            weights[f"layers.{index}.sinks"] = torch.linspace(-2.0, 2.0, config.num_heads)
    scheduling = replace(SETTINGS, page_size=PAGE_SIZE, max_num_batched_tokens=24, max_num_seqs=6)
    num_pages = int(kv_spans(config, PAGE_SIZE).most_pages(160, 24) * times)
    scheduling = replace(scheduling, **{"num_pages": num_pages, **settings})  # type: ignore[arg-type]
    return core_around(config, weights, scheduling)


def requests(method: str = "autoregressive") -> list[Request]:
    """Greedy ones and hot ones, under penalties, with prompts that begin alike."""
    return [
        request(
            f"r{number}",
            STEM[:prompt_len],
            method=f"{method}{number}" if method == "tree" else method,
            max_tokens=output_len,
            seed=number,
            logprobs=2,
            temperature=(0.0, 1.2)[number % 2],
            frequency_penalty=(0.0, 0.0, 0.6, 0.6)[number],
        )
        for number, (prompt_len, output_len) in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def texts() -> dict[str, list[Heard]]:
    return {name: listen(core_for(name), requests()) for name in MODELS}


def teach(monkeypatch: pytest.MonkeyPatch, expected: list[Heard]) -> list[TreeGuesser]:
    """A method for each request, as it has to know its text; -> those that are made of them."""
    made: list[TreeGuesser] = []
    block = pick(CPU).tree_block

    def make(oracle: list[int]) -> TreeGuesser:
        made.append(TreeGuesser(oracle, len(made), block))
        return made[-1]

    for number, one in enumerate(expected):
        monkeypatch.setitem(METHODS, f"tree{number}", partial(make, one.tokens))
    return made


def listen(core: EngineCore, asked: list[Request]) -> list[Heard]:
    heard = run(core, *asked)
    return [heard[one.request_id, 0] for one in asked]


def same(heard: list[Heard], expected: list[Heard]) -> None:
    for one, plain in zip(heard, expected, strict=True):
        assert one.error is None
        assert one.tokens == plain.tokens, "another text"
        assert one.logprobs == plain.logprobs, "not the same bits"


@pytest.mark.parametrize("name", MODELS)
def test_paths_that_stand_are_kept(name, texts, monkeypatch):
    made = teach(monkeypatch, texts[name])
    core = core_for(name)
    same(listen(core, requests("tree")), texts[name])
    paths = [path for one in made for path in one.paths]
    assert sum(path != tuple(range(len(path))) for path in paths) > 20, "hardly any path had to be moved"
    assert max(map(len, paths)) > 3
    assert core.scheduler.stats().num_preemptions == 0


@pytest.mark.parametrize("name", MODELS)
def test_also_after_preemptions(name, texts, monkeypatch):
    teach(monkeypatch, texts[name])
    core = core_for(name, times=1.05)
    twice = requests("tree") + [replace(one, request_id=f"{one.request_id}b") for one in requests("tree")]
    same(listen(core, twice), texts[name] * 2)
    assert core.scheduler.stats().num_preemptions > 0


@pytest.mark.parametrize("name", MODELS)
def test_pages_that_trees_filled_serve_others(name, texts, monkeypatch):
    """The text goes on from the cache, alone and under another seed, as if it had been computed."""
    teach(monkeypatch, texts[name])
    core = core_for(name)
    run(core, *requests("tree"))
    longer = [
        request(f"on{number}", [*STEM[:prompt_len], *one.tokens], max_tokens=12, seed=9, logprobs=2)
        for number, ((prompt_len, _), one) in enumerate(zip(LENGTHS, texts[name], strict=True))
    ]
    found = listen(core, longer)
    same(found, listen(core_for(name, prefix_cache=False), longer))
    if name == "whole":  # where windows slide, little of an output is kept
        for (prompt_len, output_len), one in zip(LENGTHS, found, strict=True):
            assert one.num_cached >= prompt_len + output_len - 2 * PAGE_SIZE, "pages were not found"


def test_beside_plain_requests(texts, monkeypatch):
    teach(monkeypatch, texts["whole"])
    asked = [(requests("tree") if number % 2 else requests())[number] for number in range(len(LENGTHS))]
    same(listen(core_for("whole"), asked), texts["whole"])
