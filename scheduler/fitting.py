"""From timed steps to a cost model.

Least squares in relative error (a step of one token matters as much as one of 512) under "no constant is
negative", reweighted so that a few disturbed samples do not count (Huber 1964). Disturbed steps are slow
ones: a time far too short, which no clock shows, would count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import TYPE_CHECKING

from scheduler.costs import CostModel, num_pairs

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

FITTED = ("step_s", "slice_s", "token_s", "context_s", "pair_s")  # what timed steps tell
RIDGE = 3e-3  # pull of the prior: (usual error of a sample / that of the prior)^2, 0.03 and 0.5
MAX_ROUNDS = 30  # of reweighting; it stands still earlier
STILL = 1e-6  # change between rounds, in units of order 1
ORDINARY_ERROR = 0.01  # relative; no sample counts less for an error below it


@dataclass(frozen=True, slots=True)
class Sample:
    """A step that was timed: its slices, each (start, number of tokens), and how long it took."""

    slices: tuple[tuple[int, int], ...]
    seconds: float


def fit(samples: SequenceOf[Sample], prior: CostModel) -> CostModel:
    """The cost model that explains the samples best.

    What they leave open (too few of them, or all alike) is taken from the prior, scaled to the speed that
    they show; copies are not in them and stay the prior's. Without samples it is the prior. Raises
    ValueError for a sample with no slice, an empty slice, or a duration that is not positive and finite.
    """
    for sample in samples:
        if not _is_a_step(sample):
            raise ValueError(f"not the time of a step: {sample}")
    if not samples:
        return prior
    shares = [[count / sample.seconds for count in _counts(sample)] for sample in samples]
    # Each constant in units of the most that it can be, were there no other: all are of order 1 or less.
    units = [1.0 / max(share[k] for share in shares) for k in range(len(FITTED))]
    rows = [[unit * part for unit, part in zip(units, share, strict=True)] for share in shares]
    found = _robust(rows, _expected(samples, prior, units))
    return replace(prior, **{name: unit * x for name, unit, x in zip(FITTED, units, found, strict=True)})


def scaled(samples: SequenceOf[Sample], prior: CostModel) -> CostModel:
    """The prior at the speed of the samples, for too few of them to tell its constants apart; copies stay the
    prior's. Without samples it is the prior."""
    if not samples:
        return prior
    speed = median(sample.seconds / prior.step(sample.slices) for sample in samples)
    return replace(prior, **{name: speed * getattr(prior, name) for name in FITTED})


def relative_error(samples: SequenceOf[Sample], costs: CostModel) -> float:
    """The median of |predicted - measured| / measured."""
    return median(abs(costs.step(sample.slices) / sample.seconds - 1.0) for sample in samples)


def _is_a_step(sample: Sample) -> bool:
    counted = all(start >= 0 and num_tokens > 0 for start, num_tokens in sample.slices)
    return bool(sample.slices) and counted and math.isfinite(sample.seconds) and sample.seconds > 0


def _counts(sample: Sample) -> tuple[int, ...]:
    """What the step has of everything that `FITTED` prices."""
    slices = sample.slices
    return (
        1,
        len(slices),
        sum(num_tokens for _, num_tokens in slices),
        sum(start + num_tokens for start, num_tokens in slices),
        sum(num_pairs(start, num_tokens) for start, num_tokens in slices),
    )


def _expected(samples: SequenceOf[Sample], prior: CostModel, units: list[float]) -> list[float]:
    """The prior in these units, at the speed of the samples."""
    predicted = [prior.step(sample.slices) for sample in samples]
    if not min(predicted) > 0:
        return [0.0] * len(units)
    speed = median(sample.seconds / one for sample, one in zip(samples, predicted, strict=True))
    return [speed * float(getattr(prior, name)) / unit for name, unit in zip(FITTED, units, strict=True)]


def _robust(rows: list[list[float]], expected: list[float]) -> list[float]:
    """x >= 0 with rows x = 1 as nearly as can be. A sample that is off by more than is usual among them
    pulls no harder the further it is off."""
    weights = [1.0] * len(rows)
    found = expected
    for _ in range(MAX_ROUNDS):
        before, found = found, _non_negative(rows, weights, expected)
        errors = [abs(sum(map(float.__mul__, row, found)) - 1.0) for row in rows]
        ordinary = max(ORDINARY_ERROR, 1.5 * median(errors))
        weights = [min(1.0, ordinary / max(error, ordinary)) for error in errors]
        if max(abs(new - old) for new, old in zip(found, before, strict=True)) < STILL:
            break
    return found


def _non_negative(rows: list[list[float]], weights: list[float], expected: list[float]) -> list[float]:
    """x >= 0 with the least sum of weights * (rows x - 1)^2 + ridge * (x - expected)^2.

    The ridge makes that strictly convex, so the answer is the best non-negative one among the solutions
    with every choice of constants held at zero; there are few constants, hence few choices.
    """
    size = range(len(expected))
    weighted = list(zip(weights, rows, strict=True))
    matrix = [[sum(weight * row[i] * row[j] for weight, row in weighted) for j in size] for i in size]
    target = [sum(weight * row[i] for weight, row in weighted) + RIDGE * expected[i] for i in size]
    for i in size:
        matrix[i][i] += RIDGE
    best, least = [0.0 for _ in size], 0.0
    for kept in product((True, False), repeat=len(expected)):
        free = [i for i in size if kept[i]]
        values = _solve([[matrix[i][j] for j in free] for i in free], [target[i] for i in free])
        # At a solution the objective is a constant less target . x.
        objective = -sum(target[i] * value for i, value in zip(free, values, strict=True))
        if objective < least and min(values) >= 0:
            least, solution = objective, dict(zip(free, values, strict=True))
            best = [solution.get(i, 0.0) for i in size]
    return best


def _solve(matrix: list[list[float]], target: list[float]) -> list[float]:
    """Solve a positive definite system by elimination; uses up its arguments."""
    size = len(target)
    for i in range(size):
        for k in range(i + 1, size):
            factor = matrix[k][i] / matrix[i][i]
            target[k] -= factor * target[i]
            for j in range(i, size):
                matrix[k][j] -= factor * matrix[i][j]
    solved = [0.0] * size
    for i in reversed(range(size)):
        known = sum(matrix[i][j] * solved[j] for j in range(i + 1, size))
        solved[i] = (target[i] - known) / matrix[i][i]
    return solved
