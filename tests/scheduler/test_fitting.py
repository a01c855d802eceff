"""Constants are recovered from timed steps: exact, noisy, disturbed, and too few of them."""

from __future__ import annotations

import random
from dataclasses import astuple, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.costs import CostModel
from scheduler.fitting import FITTED, Sample, fit, relative_error

CPU = CostModel(step_s=0.03, slice_s=0.002, token_s=0.0012, context_s=2e-5, pair_s=6e-7)
GPU = CostModel(step_s=0.006, slice_s=5e-6, token_s=25e-6, context_s=4e-8, pair_s=1e-9)
STEPS = (
    ((0, 1),),
    ((128, 1),) * 8,
    ((128, 1),) * 64,
    ((0, 128),),
    ((0, 512),),
    ((1024, 1),),
    ((4096, 1),),
    ((1024, 1),) * 32,
    ((1024, 128),),
    ((0, 448), *((300, 1),) * 32),
)


def timed(costs: CostModel, noise: float = 0.0, seed: int = 0, repeats: int = 1) -> list[Sample]:
    rng = random.Random(seed)
    steps = STEPS * repeats
    return [Sample(step, costs.step(step) * (1.0 + noise * rng.uniform(-1.0, 1.0))) for step in steps]


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("prior", [CPU, GPU, CostModel()], ids=["cpu", "gpu", "default"])
def test_exact_times_give_the_constants(machine: CostModel, prior: CostModel) -> None:
    found = fit(timed(machine), prior)
    for step in STEPS:
        assert found.step(step) == pytest.approx(machine.step(step), rel=0.02)
    # slice_s of the GPU is a thousandth of a step and hardly shows in any.
    for name in FITTED if machine is CPU else ("step_s", "token_s", "context_s"):
        assert getattr(found, name) == pytest.approx(getattr(machine, name), rel=0.1), name


@pytest.mark.parametrize("seed", range(10))
def test_noisy_times_give_nearly_the_constants(seed: int) -> None:
    found = fit(timed(CPU, noise=0.05, seed=seed, repeats=4), CostModel())
    assert found.step_s == pytest.approx(CPU.step_s, rel=0.15)
    assert found.token_s == pytest.approx(CPU.token_s, rel=0.15)
    assert found.context_s == pytest.approx(CPU.context_s, rel=0.15)
    assert relative_error(timed(CPU), found) < 0.03


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("factor", [3.0, 30.0])
def test_a_few_disturbed_steps_hardly_count(seed: int, factor: float) -> None:
    samples = timed(CPU, noise=0.02, seed=seed, repeats=3)
    for index in random.Random(seed).sample(range(len(samples)), 3):
        samples[index] = replace(samples[index], seconds=factor * samples[index].seconds)
    found = fit(samples, CostModel())
    for step in STEPS:
        assert found.step(step) == pytest.approx(CPU.step(step), rel=0.1)


def test_a_small_step_matters_as_much_as_a_large_one() -> None:
    """In absolute seconds the misfit of 512 tokens, which no such model explains, would drown the rest."""
    samples = [*timed(CPU), Sample(((0, 2048),), 3 * CPU.step(((0, 2048),)))]
    found = fit(samples, CPU)
    assert found.step([(0, 1)]) == pytest.approx(CPU.step([(0, 1)]), rel=0.02)


def test_what_the_samples_leave_open_comes_from_the_prior_at_their_speed() -> None:
    """All samples alike: only the sum of the constants shows, and the prior's shape shares it out."""
    samples = [Sample(((128, 1),), CPU.step([(128, 1)]) / 10)] * 3
    found = fit(samples, CPU)
    for name in FITTED:
        assert getattr(found, name) == pytest.approx(getattr(CPU, name) / 10, rel=0.01), name


def test_no_samples_are_the_prior_and_copies_stay_its() -> None:
    prior = replace(GPU, host_page_s=0.125, disk_page_s=0.25)
    assert fit([], prior) is prior
    found = fit(timed(CPU), prior)
    assert (found.host_page_s, found.disk_page_s) == (0.125, 0.25)


@pytest.mark.parametrize(
    "sample",
    [Sample((), 1.0), Sample(((0, 0),), 1.0), Sample(((0, 1),), 0.0), Sample(((0, 1),), float("nan"))],
    ids=["no slice", "empty slice", "no time", "nan"],
)
def test_what_is_no_timed_step_is_refused(sample: Sample) -> None:
    with pytest.raises(ValueError, match="not the time of a step"):
        fit([*timed(CPU), sample], CPU)


slices = st.lists(st.tuples(st.integers(0, 8192), st.integers(1, 512)), min_size=1, max_size=8).map(tuple)
samples = st.lists(st.builds(Sample, slices, st.floats(1e-5, 1e3)), max_size=8)


@given(samples, st.sampled_from([CPU, GPU, CostModel(step_s=0, slice_s=0, token_s=0, pair_s=0)]))
def test_nothing_is_ever_negative(times: list[Sample], prior: CostModel) -> None:
    assert all(0.0 <= value < float("inf") for value in astuple(fit(times, prior)))
