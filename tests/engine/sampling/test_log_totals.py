"""Sums over a vocabulary: right, and of the same bits in every company."""

from __future__ import annotations

import pytest
import torch

from engine.sampling.log_totals import log_totals


@pytest.fixture(autouse=True)
def two_threads():
    """One thread shares nothing out."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_row_has_the_same_bits_alone_and_among_others():
    rows = torch.randn(24, 49152, generator=torch.Generator().manual_seed(1)) * 3
    alone = torch.cat([log_totals(row[None]) for row in rows])
    for count in range(1, 25):
        assert torch.equal(log_totals(rows[:count]), alone[:count])


def test_it_is_the_sum():
    rows = torch.randn(3, 1000, generator=torch.Generator().manual_seed(2)) * 5
    rows[1, 10:] = float("-inf")
    assert torch.allclose(log_totals(rows), rows.double().logsumexp(-1).float(), atol=1e-5)
