"""Calibration times real steps, stays in its budget and leaves nothing behind."""

from __future__ import annotations

import time
from dataclasses import astuple, replace
from typing import TYPE_CHECKING

import pytest
import torch

import engine.calibration
from cuda_kernels.ops import pick
from engine.batch import BatchBuilder
from engine.calibration import PRIOR, Calibration, calibrate, probe_steps
from engine.kv_storage import KVStorage
from engine.models.transformer import Transformer
from scheduler.fitting import FITTED
from tests.engine.tiny import CPU, TINY, random_weights

if TYPE_CHECKING:
    from cuda_kernels.ops import Operations
    from scheduler.costs import CostModel

MAX_SEQS, MAX_TOKENS = 16, 64


class Parts:
    """An engine's parts around the tiny model, without a scheduler."""

    def __init__(self, num_pages: int = 32) -> None:
        ops: Operations = pick(CPU)
        self.model = Transformer(TINY, random_weights(TINY), ops)
        self.storage = KVStorage(TINY, num_pages, 16, torch.float32, CPU)
        self.batches = BatchBuilder(TINY, ops, 16, min(TINY.max_positions, num_pages * 16), MAX_SEQS, CPU)

    @property
    def is_empty(self) -> bool:
        cells = (*self.storage.keys, *self.storage.values)
        return not self.batches.num_tables and not any(bool(cell.any()) for cell in cells)


@pytest.mark.parametrize("num_pages", [2, 32])
def test_steps_are_timed_and_nothing_is_left_behind(num_pages: int) -> None:
    parts = Parts(num_pages)
    found = calibrate(parts.model, parts.storage, parts.batches, MAX_SEQS, MAX_TOKENS, budget_s=5.0)
    assert found.num_steps == len(probe_steps(MAX_SEQS, MAX_TOKENS, parts.batches.max_slots))
    assert found.costs.step([(0, 1)]) > 0
    assert min(astuple(found.costs)) >= 0
    assert parts.is_empty


def test_a_slow_model_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts()
    forward = parts.model.forward
    calls = []

    def slow(*arguments: object) -> torch.Tensor:
        calls.append(1)
        time.sleep(0.05)
        return forward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(parts.model, "forward", slow)
    found = calibrate(parts.model, parts.storage, parts.batches, MAX_SEQS, MAX_TOKENS, budget_s=0.01)
    assert len(calls) == found.num_steps == 1
    assert not found.steady, "one step tells too little to be kept"
    assert found.costs.step([(0, 1)]) >= 0.05
    speeds = [new / old for new, old in zip(astuple(found.costs)[:5], astuple(PRIOR)[:5], strict=True)]
    assert max(speeds) == pytest.approx(min(speeds)), "too few to tell the constants apart"


def test_a_step_that_fails_leaves_an_estimate_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts()
    forward = parts.model.forward

    def scarce(rows: object, storage: KVStorage) -> torch.Tensor:
        logits = forward(rows, storage)  # type: ignore[arg-type]
        if rows.num_rows > 8:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("no memory")
        return logits

    monkeypatch.setattr(parts.model, "forward", scarce)
    found = calibrate(parts.model, parts.storage, parts.batches, MAX_SEQS, MAX_TOKENS, budget_s=5.0)
    assert not found.steady
    assert found.num_steps == 1, "it stops at the first failure"
    assert found.costs.step([(0, 1)]) > 0
    assert parts.is_empty


def told(count: int, truth: CostModel, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    """What `count` kinds of steps tell, each of which takes exactly as long as `truth` says."""
    parts = Parts()
    few = probe_steps(MAX_SEQS, MAX_TOKENS, TINY.max_positions)[:count]
    monkeypatch.setattr(engine.calibration, "probe_steps", lambda *limits: few)
    monkeypatch.setattr(engine.calibration.StepStopwatch, "time", lambda self, slices: truth.step(slices))
    found = calibrate(parts.model, parts.storage, parts.batches, MAX_SEQS, MAX_TOKENS, budget_s=60.0)
    assert found.num_steps == count
    return found


@pytest.mark.parametrize(("count", "is_fitted"), [(3, False), (7, False), (8, True)])
def test_a_fit_wants_some_kinds_of_steps_more_than_it_has_constants(
    count: int, is_fitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer scale the prior: five constants pass through any five times, noise and all."""
    found = told(count, replace(PRIOR, step_s=0.08, token_s=0.0001), monkeypatch)
    is_scaled = found.costs.step_s / found.costs.token_s == pytest.approx(PRIOR.step_s / PRIOR.token_s)
    assert is_scaled is not is_fitted


@pytest.mark.parametrize(("count", "steady"), [(3, False), (4, True)])
def test_how_fast_a_machine_of_the_usual_shape_is_four_kinds_tell(
    count: int, steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = replace(PRIOR, **{name: 2 * getattr(PRIOR, name) for name in FITTED})
    found = told(count, half, monkeypatch)
    assert found.steady is steady
    assert found.costs.step_s == pytest.approx(half.step_s)


def test_a_model_without_finite_numbers_leaves_none_behind() -> None:
    parts = Parts()
    parts.model.final_norm.fill_(float("nan"))
    parts.model.layers[0].attention_norm.fill_(float("nan"))
    calibrate(parts.model, parts.storage, parts.batches, MAX_SEQS, MAX_TOKENS, budget_s=1.0)
    assert parts.is_empty


@pytest.mark.parametrize("limits", [(1, 1, 16), (64, 512, 8192), (256, 16, 64), (3, 7, 1)])
def test_probes_stay_within_the_limits(limits: tuple[int, int, int]) -> None:
    max_seqs, max_tokens, max_len = limits
    probes = probe_steps(*limits)
    assert probes
    assert len(set(probes)) == len(probes)
    for slices in probes:
        assert len(slices) <= max_seqs
        assert sum(count for _, count in slices) <= max_tokens
        assert all(start >= 0 < count and start + count <= max_len for start, count in slices)
