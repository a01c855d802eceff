"""The cost model against sums written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.costs import CostModel

COSTS = CostModel(step_s=0.5, slice_s=0.25, token_s=0.125, context_s=2.0**-6, pair_s=2.0**-10)


def test_a_slice_loads_what_it_sees_once_and_every_token_looks_at_all_before_it() -> None:
    pairs = 101 + 102 + 103
    assert COSTS.slice(100, 3) == 0.25 + 3 * 0.125 + 103 / 64 + pairs / 1024
    assert COSTS.slice(100, 0) == 0.0, "a sequence that computes nothing costs nothing"


def test_a_step_is_its_own_cost_and_its_slices() -> None:
    assert COSTS.step([]) == 0.5
    assert COSTS.step([(0, 4), (9, 1)]) == 0.5 + COSTS.slice(0, 4) + COSTS.slice(9, 1)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 64), st.integers(1, 64))
def test_a_prefill_costs_its_slices_and_its_shares_of_steps(
    start: int, num_tokens: int, chunk: int, places: int
) -> None:
    expected, done = 0.0, 0
    while done < num_tokens:
        size = min(chunk, num_tokens - done)
        expected += COSTS.slice(start + done, size) + COSTS.step_s / places
        done += size
    assert COSTS.prefill(start, num_tokens, chunk, places) == pytest.approx(expected)


@given(st.integers(0, 5000), st.integers(1, 64))
def test_a_decoded_token_costs_a_slice_of_one(context: int, places: int) -> None:
    assert COSTS.decode(context, places) == pytest.approx(COSTS.slice(context, 1) + 0.5 / places)
