"""The order of service, tiers and deadlines of the real daemon with the default model."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.daemon import Daemon, stream_text, wait_until

LONG_PROMPT = [(7 * n * n + 3 * n) % 40_000 + 100 for n in range(400)]
SHORT = {"prompt": "One, two,", "max_tokens": 4, "ignore_eos": True}
KEY = "an-admin-key-of-some-length"


def wait_for_first_tokens(daemon: Daemon, count: float) -> None:
    wait_until(lambda: daemon.metrics().get("vllm:generation_tokens_total", 0.0) >= count, 30)


@pytest.mark.parametrize(("policy", "short_is_first"), [("mlfq", True), ("fcfs", False)])
def test_a_short_request_does_not_wait_for_long_ones_that_came_first(policy, short_is_first):
    """One place, two long requests that want it, and a short one that comes last."""
    ended: list[str] = []

    def complete(daemon: Daemon, name: str, body: dict[str, Any]) -> None:
        daemon.complete(**body)
        ended.append(name)

    with Daemon("--policy", policy, "--max-num-seqs", "1") as daemon, ThreadPoolExecutor(3) as pool:
        asked: list[Future[None]] = []
        for name in ("long", "later"):
            body = {"prompt": [*LONG_PROMPT, len(ended)], "max_tokens": 40, "ignore_eos": True}
            asked.append(pool.submit(complete, daemon, name, body))
            wait_until(lambda: sum(queue(daemon)) >= len(asked), 30)
        wait_for_first_tokens(daemon, 3)
        asked.append(pool.submit(complete, daemon, "short", SHORT))
        for one in asked:
            one.result(60)
        assert (ended[0] == "short") is short_is_first, ended
        metrics = daemon.metrics()
        assert (metrics.get("octavo:preemptions_total", 0.0) > 0) is short_is_first
        assert metrics["octavo:level_entered_total"] == 3
        assert metrics["octavo:level_seated_total"] >= 3


def queue(daemon: Daemon) -> tuple[float, float]:
    metrics = daemon.metrics()
    return metrics.get("vllm:num_requests_running", 0.0), metrics.get("vllm:num_requests_waiting", 0.0)


def test_streams_survive_the_engine_while_their_pages_come_and_go():
    """Too few pages, too many admitted, host pages below: killed while sequences are put aside."""
    few = ("--num-pages", "24", "--host-pages", "100", "--growth-share", "0", "--max-num-seqs", "8")
    sampling = {"max_tokens": 40, "temperature": 1.0, "ignore_eos": True}

    def ask(daemon: Daemon, number: int, on_chunk=lambda count: None) -> str:
        prompt = LONG_PROMPT[number : number + 100]
        text, chunks = stream_text(daemon, on_chunk, prompt=prompt, seed=number, **sampling)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        return text

    with Daemon(*few) as daemon, ThreadPoolExecutor(4) as pool:
        undisturbed = ask(daemon, 0)
        streams = [pool.submit(ask, daemon, number) for number in range(4)]
        wait_until(lambda: daemon.metrics().get("vllm:num_preemptions_total", 0.0) > 0, 30)
        os.kill(daemon.engine_pid(), signal.SIGKILL)
        texts = [stream.result(60) for stream in streams]
        assert texts[0] == undisturbed
        assert daemon.metrics()["octavo:engine_restarts_total"] == 1
        again = [pool.submit(ask, daemon, number) for number in range(4)]
        assert [stream.result(60) for stream in again] == texts
        assert daemon.metrics()["octavo:pages_copied_total"] > 0


@pytest.fixture(scope="module")
def one_place():
    with Daemon("--max-num-seqs", "1", "--admin-key", KEY) as daemon:
        yield daemon


def test_a_deadline_that_cannot_be_met_is_refused_at_once_with_the_numbers(one_place):
    begun = time.monotonic()
    answer = one_place.post("/v1/completions", prompt=LONG_PROMPT * 8, max_tokens=1000, timeout_s=0.2)
    assert time.monotonic() - begun < 0.2 + 1.0
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert error["code"] == "deadline_unmeetable"
    assert "its deadline is in 0." in error["message"]


def test_a_deadline_in_the_middle_keeps_the_tokens_so_far(one_place):
    answer = one_place.complete(prompt="Once", max_tokens=4000, ignore_eos=True, timeout_s=8.0)
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["finish_cause"]) == ("length", "deadline")
    assert 0 < answer["usage"]["completion_tokens"] < 4000
    assert answer["choices"][0]["text"]


def test_the_schedulers_state_is_shown_to_the_admin(one_place):
    with ThreadPoolExecutor(2) as pool, one_place.client() as client:
        body = {"prompt": "Once", "max_tokens": 50, "ignore_eos": True, "user": "me"}
        running = [pool.submit(one_place.complete, **body) for _ in range(2)]
        wait_until(lambda: queue(one_place) == (1.0, 1.0), 10)
        assert client.get("/debug/scheduler").status_code == 401
        answer = client.get("/debug/scheduler", headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200, answer.text
        state = answer.json()
        assert state["policy"] == "mlfq"
        assert sorted(one["state"] for one in state["sequences"]) == ["running", "waiting"]
        assert state["stats"]["num_running"] == 1
        assert state["stats"]["num_pages_held"] >= 1
        assert [one["num_live"] for one in state["tenants"]] == [2]
        for one in running:
            one.result(30)


def test_pages_on_disk_outlive_the_daemon(tmp_path: Path):
    flags = ("--num-pages", "30", "--host-pages", "60", "--disk-pages", "400")
    flags = (*flags, "--max-model-len", "480", "--disk-cache-path", str(tmp_path / "kv"))
    asked = {"prompt": LONG_PROMPT, "max_tokens": 8, "seed": 3, "ignore_eos": True}
    others = [{"prompt": LONG_PROMPT[::-1][n:], "max_tokens": 1} for n in (0, 50)]

    def serve() -> tuple[str, int]:
        with Daemon(*flags) as daemon:
            answer = daemon.complete(**asked)
            for other in others:  # they need the pages: what was there goes down
                daemon.complete(**other)
            daemon.terminate()
            assert daemon.wait() == 0
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    first, cached = serve()
    assert cached == 0
    second, cached = serve()
    assert cached > 0
    assert second == first
