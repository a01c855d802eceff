"""The memory that is kept free for a step is what a step takes: else a prompt ends a server that ran well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import engine.step_memory
from cuda_kernels.ops import pick
from engine.calibration import StepStopwatch
from engine.messages import Submit
from engine.models.config import Experts, Layer, Rope
from engine.models.transformer import Transformer
from engine.sampling import sampler
from engine.sizing import EngineConfigError
from engine.step_memory import counted_bytes, largest_step, take_bytes
from scheduler.config import SchedulerConfig
from tests.engine.tiny import CPU, SETTINGS, TINY, core_around, random_weights, request

ROPE = Rope(theta=10000.0, num_rotated=16)
BASE = replace(TINY, hidden_size=96, intermediate_size=256, num_heads=6, num_kv_heads=3)
SHAPES = {
    "base": BASE,
    "wide": replace(BASE, intermediate_size=2048),
    "deep": replace(BASE, layers=BASE.layers * 4),
    "vocabulary": replace(BASE, vocab_size=16_000),
    "heads": replace(BASE, num_heads=24, num_kv_heads=8),
    "caps": replace(BASE, vocab_size=16_000, logit_soft_cap=30.0, attention_soft_cap=20.0),
    "experts": replace(
        BASE,
        layers=(Layer(rope=ROPE, experts=True),) * 2,
        experts=Experts(count=4, per_token=2, intermediate_size=512),
    ),
    "windows": replace(BASE, layers=(Layer(rope=ROPE, window=64), Layer(rope=ROPE))),
}


def weights_of(config):
    weights = random_weights(config)
    if config.experts is None:
        return weights
    count, wide, hidden = config.experts.count, config.experts.intermediate_size, config.hidden_size
    for index in range(config.num_layers):
        prefix = f"layers.{index}."
        del weights[prefix + "gate_up.weight"], weights[prefix + "down.weight"]
        weights[prefix + "router.weight"] = torch.ones(count, hidden)
        weights[prefix + "experts.gate_up.weight"] = torch.ones(count, 2 * wide, hidden) * 0.01
        weights[prefix + "experts.down.weight"] = torch.ones(count, hidden, wide) * 0.01
    return weights


def peak_bytes(compute) -> int:
    """Of what torch allocated while it ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        compute()
    events = [one for one in seen.profiler.kineto_results.events() if one.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """As small as the models; and no drafts, of which a small step has none."""
    monkeypatch.setattr(sampler, "PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(engine.step_memory, "MAX_GUESSED", 0)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scored", [True, False])
def test_what_is_counted_is_what_a_step_takes(name, scored):
    """One long prompt with log-probabilities; or as many short ones as there are places."""
    config = SHAPES[name]
    rows, places = 256, 1 if scored else 64
    settings = replace(SETTINGS, num_pages=512, max_num_batched_tokens=rows, max_num_seqs=places)
    core = core_around(config, weights_of(config), settings)
    asked = {"temperature": 1.0, "top_p": 0.9} if scored else {"temperature": 1.0, "presence_penalty": 0.5}
    if scored:
        asked["prompt_logprobs"] = 3
    prompt = [1 + n % 200 for n in range(rows // places)]
    for number in range(places):
        core.handle(Submit(request(str(number), prompt, max_tokens=2, logprobs=2, **asked)))
    taken = peak_bytes(core.step)
    assert core.scheduler.stats().num_running == places
    counted = counted_bytes(config, 4, settings) + engine.step_memory.asked_bytes(config, settings)
    assert taken <= counted, f"{taken} bytes were taken, {counted} kept free"
    assert counted <= 5 * taken + (1 << 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "places", "longest"), [(128, 16, 512), (64, 64, 512), (200, 3, 40)])
def test_the_largest_step_can_be_computed_in_pages_that_are_given_back(dtype, rows, places, longest):
    """On a GPU it is; here the same steps are held against what is counted."""
    settings = SchedulerConfig(max_num_batched_tokens=rows, max_num_seqs=places)
    slices = largest_step(settings, longest)
    assert len(slices) <= places
    assert all(0 < count <= longest for _, count in slices)
    assert sum(count for _, count in slices) == min(rows, places * longest)
    weights = {name: weight.to(dtype) for name, weight in random_weights(BASE).items()}
    model = Transformer(BASE, weights, pick(CPU))
    taken = peak_bytes(lambda: take_bytes(model, dtype, CPU, settings, longest))
    assert taken <= counted_bytes(BASE, dtype.itemsize, settings) + (1 << 20)


def test_a_largest_step_that_does_not_fit_names_the_settings(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StepStopwatch, "time", fail)
    model = Transformer(TINY, random_weights(TINY), pick(CPU))
    settings = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=4)
    with pytest.raises(EngineConfigError, match=r"lower max_num_batched_tokens = 64 or max_num_seqs = 4"):
        take_bytes(model, torch.float32, CPU, settings, 512)
