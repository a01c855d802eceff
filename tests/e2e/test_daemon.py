"""The life of the real daemon: start, crash, drain, disconnect, flood."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from tests.bench.kills import kill_again_and_again
from tests.e2e.daemon import PROMPT, Daemon, alive, stream_text, wait_until


def test_the_log_tells_where_the_start_went(live_server):
    line = live_server.find_line(r" ready ").string
    for phase in ("import_torch", "locate_checkpoint", "load_weights", "build_model", "lay_out_pages"):
        assert f"{phase}=" in line


def test_equal_prompts_of_a_list_differ_and_with_a_seed_each_is_what_it_is_alone(live_server):
    def texts(prompts: list[str], **body) -> list[str]:
        fields = {"max_tokens": 12, "temperature": 1.0, "ignore_eos": True, **body}
        return [choice["text"] for choice in live_server.complete(prompt=prompts, **fields)["choices"]]

    assert len(set(texts([PROMPT] * 6))) > 1
    prompts = [PROMPT, "Once upon a time", PROMPT]
    alone = [texts([prompt], seed=11, n=2) for prompt in prompts]
    assert texts(prompts, seed=11, n=2) == [text for pair in alone for text in pair]
    assert alone[0][0] != alone[0][1]


def test_a_special_token_written_as_a_stop_string_ends_the_default_models_text(live_server):
    body = {"prompt": PROMPT, "max_tokens": 8, "logit_bias": {"2": 100}, "ignore_eos": True}
    for logprobs in (None, 1):
        choice = live_server.complete(**body, stop="<|im_end|>", logprobs=logprobs)["choices"][0]
        assert (choice["text"], choice["stop_reason"]) == ("", "<|im_end|>")
    kept = live_server.complete(**body, stop="<|im_end|>", include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == "<|im_end|>"


def test_a_special_token_written_as_a_bad_word_is_not_said(live_server):
    body = {"prompt": PROMPT, "max_tokens": 4, "logit_bias": {"2": 100}, "ignore_eos": True}
    shown = {**body, "skip_special_tokens": False}
    assert live_server.complete(**shown)["choices"][0]["text"] == "<|im_end|>" * 4
    said = live_server.complete(**shown, bad_words=["<|im_end|>"])["choices"][0]["text"]
    assert said
    assert "<|im_end|>" not in said


def test_a_stream_survives_kill_9_of_the_engine_with_the_same_text():
    sampling = {"max_tokens": 60, "temperature": 1.0, "seed": 77, "ignore_eos": True}
    with Daemon() as daemon:
        undisturbed, _ = stream_text(daemon, **sampling)
        first = daemon.engine_pid()

        def kill(count: int) -> None:
            if count == 15:
                os.kill(first, signal.SIGKILL)

        with ThreadPoolExecutor(2) as pool:
            other = pool.submit(
                daemon.complete, prompt=PROMPT, n=2, logprobs=1, max_tokens=40, seed=5, ignore_eos=True
            )
            text, chunks = stream_text(daemon, kill, **sampling)
            choices = other.result()["choices"]
        assert text == undisturbed
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [40, 40]
        again = daemon.complete(prompt=PROMPT, n=2, logprobs=1, max_tokens=40, seed=5, ignore_eos=True)[
            "choices"
        ]
        assert [choice["text"] for choice in choices] == [choice["text"] for choice in again]
        assert daemon.engine_pid() != first
        assert daemon.metrics()["octavo:engine_restarts_total"] == 1


def test_sigterm_lets_running_streams_end_refuses_new_work_and_exits_0():
    with Daemon() as daemon:
        engine = daemon.engine_pid()
        refused: list[httpx.Response] = []

        def term(count: int) -> None:
            if count == 5:
                daemon.terminate()
                daemon.find_line("draining")
                refused.append(daemon.post("/v1/completions", prompt="x"))
                refused.append(httpx.get(f"{daemon.url}/health"))

        _, chunks = stream_text(daemon, term, max_tokens=60, ignore_eos=True)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert [response.status_code for response in refused] == [503, 503]
        assert "retry-after" in refused[0].headers
        assert daemon.wait() == 0
        assert not alive(engine)


def test_drain_timeout_ends_the_rest_with_an_error():
    with Daemon("--drain-timeout-s", "0.5") as daemon:
        lines: list[str] = []
        body = {"prompt": PROMPT, "stream": True, "max_tokens": 2000, "ignore_eos": True}
        with daemon.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 10:
                    daemon.terminate()
        assert any('"error"' in line for line in lines[-6:])
        assert daemon.wait() == 0


def test_the_engine_ends_when_the_server_is_killed():
    with Daemon() as daemon:
        pids = [daemon.engine_pid(), daemon.zygote_pid()]
        daemon.kill()
        wait_until(lambda: not any(map(alive, pids)), 5)


def test_stopped_processes_end_with_the_server():
    """Neither hears that its socket closes."""
    with Daemon() as daemon:
        pids = [daemon.engine_pid(), daemon.zygote_pid()]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        daemon.kill()
        wait_until(lambda: not any(map(alive, pids)), 5)


@pytest.mark.parametrize("zygote_too", [False, True])
def test_streams_of_an_engine_that_is_killed_again_and_again_are_the_undisturbed_ones(zygote_too):
    # Some tokens come between two kills, however slow it is; in float32 texts are equal on every CPU.
    flags = ("--max-num-batched-tokens", "64", "--dtype", "float32")
    with Daemon(*flags) as daemon:
        done = kill_again_and_again(daemon, 3, 2.0, 30.0, 30, zygote_too=zygote_too, max_kills=4)
        assert done.texts == done.undisturbed
        assert done.num_kills >= 2
        deaths = [line for line in daemon.lines if "engine died" in line]
        assert len(deaths) == done.num_kills
        assert all("cause=outside suspects=0" in line for line in deaths)
        assert 1 <= done.num_restarts <= done.num_kills  # some may not have got ready before the next kill


def test_an_engine_shares_what_its_zygote_loaded(live_server):
    """Weights are there once, and the fork took no thread along."""
    engine, zygote = live_server.engine_pid(), live_server.zygote_pid()
    shared = {
        int(line.split()[1])
        for line in Path(f"/proc/{engine}/smaps_rollup").read_text().splitlines()
        if line.startswith("Shared_Dirty")
    }
    assert max(shared) * 1024 > 200e6  # the default model takes 270 MB
    # numpy's library of linear algebra has threads, which it ends before a fork.
    assert len(list(Path(f"/proc/{zygote}/task").iterdir())) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_vanished_client_frees_its_pages_within_a_second(live_server, stream):
    body = {"prompt": PROMPT, "stream": stream, "max_tokens": 4000, "ignore_eos": True, "n": 3}
    client = httpx.Client(base_url=live_server.url, timeout=httpx.Timeout(60, read=1.0))
    if stream:
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            for _ in range(5):
                next(lines)
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body)
    client.close()
    wait_until(lambda: live_server.metrics()["vllm:kv_cache_usage_perc"] == 0, 1.0)
    assert live_server.metrics()["vllm:num_requests_running"] == 0


def test_the_count_identities_hold(live_server):
    before = live_server.metrics()
    requests, tokens = 5, 7
    asked = {"prompt": [5, 6, 7, 8, 9], "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    for _ in range(requests):
        live_server.complete(**asked)
    after = live_server.metrics()

    def grown(name: str) -> float:
        return after[f"vllm:{name}"] - before.get(f"vllm:{name}", 0.0)

    assert grown("time_to_first_token_seconds_count") == requests
    assert grown("inter_token_latency_seconds_count") == requests * (tokens - 1)
    assert grown("e2e_request_latency_seconds_count") == requests
    assert grown("iteration_tokens_total_sum") == requests * (5 + tokens)
    assert grown("iteration_tokens_total_count") == requests * tokens
    assert grown("prompt_tokens_total") == requests * 5
    assert grown("generation_tokens_total") == requests * tokens
    assert grown("request_success_total") == requests


def test_a_flood_is_answered_429_and_what_was_accepted_is_served():
    with Daemon("--max-queued-requests", "8", "--max-num-seqs", "4") as daemon:
        body = {"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True}
        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(lambda _: daemon.post("/v1/completions", **body), range(40)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
            else:
                assert answer.json()["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (("--max-model-len", "100000"), "8192"),
        (("--num-pages", "1000000000"), "lower num_pages"),
        (("--num-pages", "20", "--max-model-len", "1000"), "num_pages = 20 holds 320 tokens"),
        pytest.param(
            ("--device", "cuda"),
            "CUDA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(flags, cause):
    daemon = Daemon(*flags)
    assert daemon.wait() == 1
    assert any(cause in line and "dead" in line for line in daemon.lines), daemon.lines
    assert not any("Traceback" in line for line in daemon.lines)


def test_short_answers_while_a_long_prompt_is_read():
    """A long prompt is computed in chunks beside the others: nobody waits for its end."""
    with Daemon("--max-num-batched-tokens", "256") as daemon:

        def read_long() -> None:
            with contextlib.suppress(httpx.HTTPError):  # it is not waited for
                daemon.complete(prompt=[9] * 6000, max_tokens=1)

        long = threading.Thread(target=read_long, daemon=True)
        long.start()
        wait_until(lambda: daemon.metrics()["vllm:num_requests_running"] == 1, 30)
        begun = time.monotonic()
        daemon.complete(prompt=PROMPT, max_tokens=4)
        assert long.is_alive(), f"the long prompt ended first, after {time.monotonic() - begun:.1f} s"


def test_the_context_is_what_the_pages_hold():
    with Daemon("--num-pages", "6") as daemon:
        answer = daemon.post("/v1/chat/completions", messages=[{"role": "user", "content": "Count to 1000."}])
        assert answer.status_code == 200
        assert answer.json()["usage"]["total_tokens"] <= 96
