from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from engine.messages import SequenceOutput, StepOutput
from scheduler.plan import SchedulerStats
from server.metrics import Metrics
from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import Running, running

LABEL = '{model_name="org/fake"}'


def test_count_identities() -> None:
    """vLLM's own: N requests, one after another, of P prompt and T output tokens."""
    requests, prompt, output = 5, 7, 9
    with running() as server:
        for _ in range(requests):
            server.complete(prompt="p" * prompt, max_tokens=output)
        metrics = server.metrics()
    expected = {
        "time_to_first_token_seconds_count": requests,
        "inter_token_latency_seconds_count": requests * (output - 1),
        "e2e_request_latency_seconds_count": requests,
        "request_queue_time_seconds_count": requests,
        "request_inference_time_seconds_count": requests,
        "request_prefill_time_seconds_count": requests,
        "request_decode_time_seconds_count": requests,
        "iteration_tokens_total_sum": requests * (prompt + output),
        "iteration_tokens_total_count": requests * output,
        "prompt_tokens_total": requests * prompt,
        "generation_tokens_total": requests * output,
        "request_prompt_tokens_sum": requests * prompt,
        "request_generation_tokens_sum": requests * output,
        "request_params_n_sum": requests,
        "request_params_max_tokens_sum": requests * output,
    }
    assert {name: metrics[f"vllm:{name}{LABEL}"] for name in expected} == expected
    assert metrics['vllm:request_success_total{finished_reason="length",model_name="org/fake"}'] == requests
    assert metrics[f"vllm:num_requests_running{LABEL}"] == 0
    assert metrics['octavo:kv_pages{model_name="org/fake",state="free"}'] == 100
    info = (
        'vllm:cache_config_info{block_size="16",dtype="float32",model_name="org/fake",num_gpu_blocks="100"}'
    )
    assert metrics[info] == 1
    handled = 'http_requests_total{handler="/v1/completions",method="POST",status="200"}'
    assert metrics[handled] == requests


@pytest.mark.parametrize("tokens_per_step", [4, 100])
def test_identities_hold_for_many_tokens_a_step(tokens_per_step: int) -> None:
    with running(FakeEngine(tokens_per_step=tokens_per_step)) as server:
        server.complete(max_tokens=10, n=3)
        metrics = server.metrics()
    assert metrics[f"vllm:time_to_first_token_seconds_count{LABEL}"] == 3
    assert metrics[f"vllm:inter_token_latency_seconds_count{LABEL}"] == 27
    assert metrics[f"vllm:prompt_tokens_total{LABEL}"] == 2


def test_a_stop_string_counts_as_stop(server: Running) -> None:
    name = 'vllm:request_success_total{finished_reason="stop",model_name="org/fake"}'
    before = server.metrics().get(name, 0)
    server.complete(stop="c", n=2)
    assert server.metrics()[name] == before + 2


def test_a_stop_string_in_the_last_words_counts_as_stop() -> None:
    with running(FakeEngine(tokens_per_step=100)) as server:
        assert server.complete(stop="c", max_tokens=5)["choices"][0]["finish_reason"] == "stop"
        assert (
            server.metrics()['vllm:request_success_total{finished_reason="stop",model_name="org/fake"}'] == 1
        )


def test_every_step_that_computed_counts() -> None:
    metrics = Metrics("m")
    for num_prompt_tokens, tokens in ((512, ()), (100, (5,)), (0, (6, 7)), (0, ())):
        output = SequenceOutput("unknown", 0, tokens)
        metrics.on_step(StepOutput((output,), SchedulerStats(), num_prompt_tokens))
    value = partial(metrics.registry.get_sample_value, labels={"model_name": "m"})
    assert value("vllm:iteration_tokens_total_count") == 3
    assert value("vllm:iteration_tokens_total_sum") == 512 + 101 + 2


def test_a_lost_engine_holds_nothing() -> None:
    with running() as server:
        busy = SchedulerStats(
            num_running=3,
            num_waiting=2,
            num_pages=100,
            num_pages_held=9,
            running_by_level=(1, 2),
            waiting_by_level=(0, 2),
        )
        server.call(lambda: server.service._on_step(StepOutput((), busy)))
        levels = 'octavo:queue_sequences{level="1",model_name="org/fake",state="waiting"}'
        assert server.metrics()[levels] == 2
        server.engine.ready = None
        gauges = server.metrics()
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert gauges[f"vllm:{name}{LABEL}"] == 0
        assert gauges[levels] == 0
        assert gauges['octavo:kv_pages{model_name="org/fake",state="held"}'] == 0


def test_counters_survive_an_engine_that_begins_again_at_zero() -> None:
    metrics = Metrics("m")
    for preemptions in (3, 5, 1, 4):
        metrics.on_step(StepOutput((), replace(SchedulerStats(), num_preemptions=preemptions)))
    assert metrics.registry.get_sample_value("vllm:num_preemptions_total", {"model_name": "m"}) == 8


def test_label_cardinality_is_bounded(server: Running) -> None:
    def series() -> set[str]:
        return set(server.metrics())

    def probe(tag: str) -> None:
        with server.client() as client:
            client.request("PROPFIND", "/live")
            client.get(f"/nowhere/{tag}")
            client.get(f"/v1/models/{tag}")
            client.post("/v1/completions", json={"prompt": "x", "model": tag})
            client.post(f"/v1/completions/{tag}", json={"user": tag})

    probe("first")
    before = series()
    for number in range(30):
        probe(f"tag{number}")
    assert series() == before
