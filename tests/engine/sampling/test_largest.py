"""The largest of a row and their places are torch's, whatever the rows hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.largest import BLOCK, largest, largest_places

INF, NAN = float("inf"), float("nan")


def rows(width: int, seed: int) -> torch.Tensor:
    """Random, equal almost everywhere, and with what is not finite."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, width, generator=generator)
    values[1] = values[1].round()
    values[2] = -INF
    values[3, torch.randint(width, (2,), generator=generator)] = INF
    values[4, torch.randint(width, (2,), generator=generator)] = NAN
    values[5, :-1] = -INF
    return values


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([1, BLOCK, 2 * BLOCK, 2 * BLOCK + 1, 30 * BLOCK, 2000]), st.integers(0, 10**6))
def test_the_largest_is_that_of_max_and_the_first_of_equals(width, seed):
    values = rows(width, seed)
    peaks, places = largest(values)
    expected = values.max(-1)
    assert torch.equal(peaks.nan_to_num(nan=7e30), expected.values.nan_to_num(nan=7e30))
    assert torch.equal(places, expected.indices)


@pytest.mark.parametrize("count", [1, 2, 7])
@settings(max_examples=40, deadline=None)
@given(st.sampled_from([3, 300, 14 * BLOCK, 14 * BLOCK + 1, 80 * BLOCK]), st.integers(0, 10**6))
def test_the_largest_few_are_those_of_topk(count, width, seed):
    values = rows(width, seed)
    places = largest_places(values, count)
    found, expected = values.gather(-1, places), values.topk(min(count, width), -1).values
    assert torch.equal(found.nan_to_num(nan=7e30), expected.nan_to_num(nan=7e30))
    assert all(len(set(row)) == len(row) for row in places.tolist())
