"""Same seed, same text: alone, in a crowd, in any chunks, from the cache, after preemption, after a crash."""

from __future__ import annotations

import pytest

from engine.decoding import METHODS
from tests.engine.tiny import Heard, request, run, tiny_core
from tests.engine.windows import LineGuesser

PROMPT = [(7 * n * n + 3 * n) % 300 for n in range(150)]
SAMPLING = {"temperature": 1.0, "seed": 2**63 + 12345, "max_tokens": 40, "top_p": 0.98, "logprobs": 1}


@pytest.fixture(scope="module")
def alone() -> Heard:
    return run(tiny_core(), request("r", PROMPT, **SAMPLING))["r", 0]


def same(one: Heard, alone: Heard) -> None:
    assert one.tokens == alone.tokens
    assert one.logprobs == alone.logprobs, "not the same bits"


def crowd(count: int):
    return [
        request(f"c{n}", PROMPT[n : 4 * n + 9], temperature=0.8, seed=n, max_tokens=5 + 3 * n)
        for n in range(count)
    ]


@pytest.mark.parametrize("others", [1, 5, 15])
def test_in_a_crowd(alone, others):
    heard = run(tiny_core(), *crowd(others), request("r", PROMPT, **SAMPLING))
    same(heard["r", 0], alone)


@pytest.mark.parametrize("chunk", [1, 3, 16, 33, 400])
def test_in_chunks(alone, chunk):
    heard = run(tiny_core(max_num_batched_tokens=chunk), *crowd(3), request("r", PROMPT, **SAMPLING))
    same(heard["r", 0], alone)


@pytest.mark.parametrize("known", [16, 100, 150])
def test_from_the_prefix_cache(alone, known):
    core = tiny_core()
    run(core, request("before", PROMPT[:known], temperature=0.0, max_tokens=4))
    heard = run(core, request("r", PROMPT, **SAMPLING))["r", 0]
    assert heard.num_cached == min(known // 16 * 16, 144)
    same(heard, alone)


def test_repeated_whole_from_the_cache(alone):
    core = tiny_core()
    for _ in range(3):
        same(run(core, request("r", PROMPT, **SAMPLING))["r", 0], alone)


@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
def test_after_preemptions(alone, policy):
    core = tiny_core(num_pages=14, policy=policy)
    asked = [request(f"r{n}", PROMPT, **SAMPLING) for n in range(3)] + crowd(6)
    heard = run(core, *asked)
    assert core.scheduler.stats().num_preemptions > 0
    for n in range(3):
        same(heard[f"r{n}", 0], alone)


def test_with_windows_and_preemptions(alone, monkeypatch):
    monkeypatch.setitem(METHODS, "guess", lambda: LineGuesser(alone.tokens, seed=3))
    core = tiny_core(num_pages=14)
    asked = [request(f"r{n}", PROMPT, method="guess", **SAMPLING) for n in range(3)]
    heard = run(core, *asked, *crowd(4))
    assert core.scheduler.stats().num_preemptions > 0
    for n in range(3):
        same(heard[f"r{n}", 0], alone)


@pytest.mark.parametrize("delivered", [0, 1, 17, 39])
def test_continued_on_another_engine(alone, delivered):
    again = request("r", PROMPT, delivered=(tuple(alone.tokens[:delivered]),), **SAMPLING)
    heard = run(tiny_core(), *crowd(4), again)["r", 0]
    assert heard.tokens == alone.tokens[delivered:]
    assert heard.logprobs == alone.logprobs[delivered:]
    assert heard.finish == alone.finish
