from __future__ import annotations

from functools import partial

import msgspec
import pytest

from engine.drafting.speculation import MAX_TREE
from engine.messages import SequenceOutput, StepOutput
from scheduler.plan import LevelStats, SchedulerStats, Tier, TierStats
from scheduler.refusal import RefusalReason
from scheduler.types import FinishReason, Request, SamplingParams
from server.metrics import Metrics
from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import Running, running

LABEL = '{engine="0",model_name="org/fake"}'


def test_count_identities() -> None:
    """vLLM's own: N requests, one after another, of P prompt and T output tokens."""
    requests, prompt, output = 5, 7, 9
    with running() as server:
        for _ in range(requests):
            server.complete(prompt="p" * prompt, max_tokens=output)
        metrics = server.metrics()
        assert server.num_ended("length") == requests
    expected = {
        "time_to_first_token_seconds_count": requests,
        "inter_token_latency_seconds_count": requests * (output - 1),
        "e2e_request_latency_seconds_count": requests,
        "request_queue_time_seconds_count": requests,
        "request_inference_time_seconds_count": requests,
        "request_prefill_time_seconds_count": requests,
        "request_decode_time_seconds_count": requests,
        "request_time_per_output_token_seconds_count": requests,
        "iteration_tokens_total_sum": requests * (prompt + output),
        "iteration_tokens_total_count": requests * output,
        "prompt_tokens_total": requests * prompt,
        "generation_tokens_total": requests * output,
        "request_prompt_tokens_sum": requests * prompt,
        "request_generation_tokens_sum": requests * output,
        "request_max_num_generation_tokens_count": requests,
        "request_max_num_generation_tokens_sum": requests * output,
        "request_params_n_sum": requests,
        "request_params_max_tokens_sum": requests * output,
    }
    assert {name: metrics[f"vllm:{name}{LABEL}"] for name in expected} == expected
    assert metrics[f"vllm:num_requests_running{LABEL}"] == 0
    assert metrics['octavo:pages{model_name="org/fake",state="free",tier="device"}'] == 100
    info = (
        'vllm:cache_config_info{block_size="16",dtype="float32",engine="0",model_name="org/fake",'
        'num_cpu_blocks="0",num_gpu_blocks="100"}'
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
    before = server.num_ended("stop")
    server.complete(stop="c", n=2)
    assert server.num_ended("stop") == before + 2


def test_a_stop_string_in_the_last_words_counts_as_stop() -> None:
    with running(FakeEngine(tokens_per_step=100)) as server:
        assert server.complete(stop="c", max_tokens=5)["choices"][0]["finish_reason"] == "stop"
        assert server.num_ended("stop") == 1


def test_a_fresh_server_shows_every_series_of_vllm_at_zero() -> None:
    """A rate over a counter that appears with its first event misses that event."""
    with running() as server:
        fresh = server.metrics()
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert fresh[f"vllm:spec_decode_{name}_total{LABEL}"] == 0
    for place in range(MAX_TREE):
        labels = f'engine="0",model_name="org/fake",position="{place}"'
        assert fresh[f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels}}}"] == 0
    for name in ("draft", "accepted"):
        labels = 'drafter="prompt_lookup",model_name="org/fake"'
        assert fresh[f"octavo:spec_decode_{name}_tokens_total{{{labels}}}"] == 0
    for name in ("request_time_per_output_token_seconds", "request_max_num_generation_tokens"):
        assert fresh[f"vllm:{name}_count{LABEL}"] == 0
    for reason in FinishReason:
        labels = f'engine="0",finished_reason="{reason}",model_name="org/fake"'
        assert fresh[f"vllm:request_success_total{{{labels}}}"] == 0
    for reason in ("queue_full", "draining", "tenant_limit", "rate_limit_exceeded"):
        assert fresh[f'octavo:refused_total{{model_name="org/fake",reason="{reason}"}}'] == 0
    of_vllm = [name for name in fresh if name.startswith("vllm:")]
    assert all('engine="0"' in name and 'model_name="org/fake"' in name for name in of_vllm)


def test_times_per_token_and_longest_outputs_are_observed_per_sequence_and_per_request() -> None:
    clock = [0.0]
    metrics = Metrics("m", lambda: clock[0])
    request = Request(request_id="r", prompt_ids=(1,), sampling=SamplingParams(max_tokens=9), num_choices=2)
    metrics.begin(request)
    for now, first, second in ((1.0, (5,), (6,)), (1.2, (5, 5), ()), (1.8, (5,), ())):
        clock[0] = now
        outputs = (SequenceOutput("r", 0, first), SequenceOutput("r", 1, second))
        outputs = tuple(msgspec.structs.replace(piece, first_scheduled_s=0.5) for piece in outputs)
        metrics.on_step(StepOutput(outputs, SchedulerStats()))
    for index in (0, 1):
        metrics.finish("r", index, "length")
    value = partial(metrics.registry.get_sample_value, labels={"model_name": "m", "engine": "0"})
    assert value("vllm:request_time_per_output_token_seconds_sum") == pytest.approx(0.8 / 3)
    assert value("vllm:request_time_per_output_token_seconds_count") == 2
    assert value("vllm:request_max_num_generation_tokens_count") == 0
    metrics.end("r")
    assert value("vllm:request_max_num_generation_tokens_count") == 1
    assert value("vllm:request_max_num_generation_tokens_sum") == 4


def test_every_step_that_computed_counts() -> None:
    metrics = Metrics("m")
    for num_prompt_tokens, tokens in ((512, ()), (100, (5,)), (0, (6, 7)), (0, ())):
        output = SequenceOutput("unknown", 0, tokens)
        metrics.on_step(StepOutput((output,), SchedulerStats(), num_prompt_tokens))
    value = partial(metrics.registry.get_sample_value, labels={"model_name": "m", "engine": "0"})
    assert value("vllm:iteration_tokens_total_count") == 3
    assert value("vllm:iteration_tokens_total_sum") == 512 + 101 + 2


def test_a_lost_engine_holds_nothing() -> None:
    with running() as server:
        busy = SchedulerStats(
            num_running=3,
            num_waiting=2,
            num_pages=100,
            num_pages_held=9,
            levels=(LevelStats(0, num_running=1), LevelStats(1, num_waiting=2, num_running=2)),
        )
        server.call(lambda: server.service._on_step(StepOutput((), busy, step_time_ratio=2.0)))
        levels = 'octavo:level_sequences{level="1",model_name="org/fake",state="waiting"}'
        assert server.metrics()[levels] == 2
        server.engine.ready = None
        gauges = server.metrics()
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert gauges[f"vllm:{name}{LABEL}"] == 0
        assert gauges[levels] == gauges['octavo:step_time_ratio{model_name="org/fake"}'] == 0
        assert gauges['octavo:pages{model_name="org/fake",state="held",tier="device"}'] == 0


def test_counters_survive_an_engine_that_begins_again_at_zero() -> None:
    with running() as server:
        first = server.engine.ready
        assert first is not None
        engines = [first, msgspec.structs.replace(first, dtype="bfloat16"), None]
        preempted = 'octavo:level_preempted_total{level="2",model_name="org/fake"}'
        seen = []
        for engine, count in ((0, 3), (0, 5), (1, 1), (1, 4), (2, 0)):
            server.engine.ready = engines[engine]
            stats = SchedulerStats(
                num_preempted_for_pages=count, levels=(LevelStats(2, num_preempted=count),)
            )
            if engines[engine] is not None:
                server.call(partial(server.service._on_step, StepOutput((), stats)))
            metrics = server.metrics()
            seen.append((metrics[f"vllm:num_preemptions_total{LABEL}"], metrics[preempted]))
        assert seen == [(3, 3), (5, 5), (6, 6), (9, 9), (9, 9)]


def test_the_schedulers_stats_are_shown_under_their_names() -> None:
    stats = SchedulerStats(
        num_parked=1,
        num_pages=100,
        num_pages_held=20,
        num_pages_cached=30,
        num_preempted_for_places=2,
        num_preempted_for_pages=3,
        num_resumed_kept=4,
        num_resumed_fetched=5,
        num_resumed_recomputed=6,
        recomputed_tokens=7,
        num_pages_up=8,
        num_overdue=9,
        longest_pause_s=1.5,
        backlog_s=2.5,
        head_start_gamma=0.5,
        levels=(LevelStats(3, 1, 2, 3, 4, 5, 6, 7, 8.5),),
        tiers=(TierStats(Tier.HOST, 50, 10, 4, 12), TierStats(Tier.DISK, 9, 8, 2, 13)),
    )
    metrics = Metrics("m")
    metrics.on_step(StepOutput((), stats, step_time_ratio=1.25))
    value = metrics.registry.get_sample_value
    expected = {
        ("parked_sequences", ()): 1,
        ("preemptions_total", (("reason", "places"),)): 2,
        ("preemptions_total", (("reason", "pages"),)): 3,
        ("resumed_total", (("kind", "kept"),)): 4,
        ("resumed_total", (("kind", "fetched"),)): 5,
        ("resumed_total", (("kind", "recomputed"),)): 6,
        ("recomputed_tokens_total", ()): 7,
        ("overdue_total", ()): 9,
        ("longest_pause_seconds", ()): 1.5,
        ("backlog_seconds", ()): 2.5,
        ("head_start_gamma", ()): 0.5,
        ("level_sequences", (("level", "3"), ("state", "waiting"))): 1,
        ("level_sequences", (("level", "3"), ("state", "running"))): 2,
        ("level_entered_total", (("level", "3"),)): 3,
        ("level_demoted_total", (("level", "3"),)): 4,
        ("level_promoted_total", (("level", "3"),)): 5,
        ("level_preempted_total", (("level", "3"),)): 6,
        ("level_seated_total", (("level", "3"),)): 7,
        ("level_waited_seconds_total", (("level", "3"),)): 8.5,
        ("pages", (("tier", "device"), ("state", "held"))): 20,
        ("pages", (("tier", "device"), ("state", "cached"))): 30,
        ("pages", (("tier", "device"), ("state", "free"))): 50,
        ("pages", (("tier", "host"), ("state", "used"))): 10,
        ("pages", (("tier", "host"), ("state", "busy"))): 4,
        ("pages", (("tier", "host"), ("state", "free"))): 36,
        ("pages", (("tier", "disk"), ("state", "free"))): 0,
        ("pages_copied_total", (("to", "device"),)): 8,
        ("pages_copied_total", (("to", "host"),)): 12,
        ("pages_copied_total", (("to", "disk"),)): 13,
        ("step_time_ratio", ()): 1.25,
    }
    shown = {
        (name, labels): value(f"octavo:{name}", {"model_name": "m", **dict(labels)})
        for name, labels in expected
    }
    assert shown == expected
    assert value("vllm:num_preemptions_total", {"model_name": "m", "engine": "0"}) == 5


def test_failed_copies_count_by_where_they_went_for_as_long_as_the_server_runs() -> None:
    with running() as server:
        ready = server.engine.ready
        assert ready is not None

        def failed() -> dict[str, float]:
            prefix = 'octavo:page_copies_failed_total{model_name="org/fake",to="'
            shown = server.metrics().items()
            return {name[len(prefix) : -2]: value for name, value in shown if name.startswith(prefix)}

        assert failed() == {}, "there are no tiers"
        server.engine.ready = msgspec.structs.replace(ready, host_pages=5)
        server.call(server.service.note_ready)
        assert failed() == {"device": 0, "host": 0}
        server.engine.ready = msgspec.structs.replace(ready, host_pages=5, disk_pages=5)
        for copies in ((Tier.HOST, Tier.DEVICE, Tier.HOST), (), (Tier.DISK,)):
            step = StepOutput((), SchedulerStats(), failed_copies=copies)
            server.call(partial(server.service._on_step, step))
        server.engine.ready = None
        assert failed() == {"device": 1, "host": 2, "disk": 1}


def test_a_refused_request_is_counted_once_and_observed_nowhere() -> None:
    engine = FakeEngine(error="1024 requests wait", refusal=RefusalReason.QUEUE_FULL)
    with running(engine) as server:
        for _ in range(3):
            assert server.post("/v1/completions", {"prompt": ["x", "y"], "n": 2}).status_code == 429
        metrics = server.metrics()
        assert metrics['octavo:refused_total{model_name="org/fake",reason="queue_full"}'] == 3
        assert metrics[f"vllm:e2e_request_latency_seconds_count{LABEL}"] == 0
        ended = [metrics[name] for name in metrics if name.startswith("vllm:request_success_total")]
        assert ended
        assert not any(ended)
        assert not server.service.metrics._live
        engine.error = None
        server.complete(max_tokens=2)
        assert server.metrics()[f"vllm:e2e_request_latency_seconds_count{LABEL}"] == 1


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
    series()  # itself counted, after its answer
    before = series()
    for number in range(30):
        probe(f"tag{number}")
    assert series() == before
