from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.gittins import MAX_ROWS, GittinsIndex
from scheduler.length_histogram import EDGES

NO_CAP = 10**9


def brute_force(masses: dict[int, float], c: float, a: int, cap: int) -> float:
    """The definition, over every stopping point; of each token before it, it asks how many are alive."""
    alive = sum(mass for length, mass in masses.items() if length > a)
    total, ended, spent, best = alive, 0.0, 0.0, math.inf
    for length in range(a + 1, min(cap, max(masses)) + 1):
        spent += alive
        ending = alive if length == cap else masses.get(length, 0.0)
        ended += ending
        alive -= ending
        if ended > 0.0:
            best = min(best, (c * total + spent) / ended)
    return best


def binned(masses: dict[int, float]) -> GittinsIndex:
    """Of explicit lengths, over the bins that are learned with."""
    reached = dict(
        zip(EDGES, (sum(m for n, m in masses.items() if n <= edge) for edge in EDGES), strict=True)
    )
    below = [0.0, *reached.values()]
    bins = [high - low for low, high in zip(below, reached.values(), strict=False)]
    return GittinsIndex(EDGES, [*bins[:-1], bins[-1] + 1e-12])


def geometric(mean: float) -> dict[int, float]:
    return {n: (1 - 1 / mean) ** (n - 1) / mean for n in range(1, int(30 * mean))}


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(lambda weights: weights[-1] > 0),
    st.floats(0.0, 500.0),
    st.data(),
)
def test_it_is_what_brute_force_finds(weights: list[int], c: float, data: st.DataObject) -> None:
    a = data.draw(st.integers(0, len(weights) - 1))
    cap = data.draw(st.integers(a + 1, len(weights) + 5))
    index = GittinsIndex(range(1, len(weights) + 1), weights)
    expected = brute_force({k + 1: float(w) for k, w in enumerate(weights)}, c, a, cap)
    assert index.w(c, a, cap) == pytest.approx(expected)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_bins_are_fine_enough(sigma: float) -> None:
    masses = {n: math.exp(-0.5 * ((math.log(n) - 5) / sigma) ** 2) / n for n in range(1, 6000)}
    index = binned(masses)
    for a in (0, 10, *(edge for edge in EDGES if 60 < edge < 600)):
        for c in (0.0, 30.0, 1000.0):
            for cap in (a + 1, a + 100, 2000, NO_CAP):
                expected = brute_force(masses, c, a, cap)
                assert index.w(c, a, cap) == pytest.approx(expected, rel=0.08), (c, a, cap)


def test_without_memory_it_is_constant() -> None:
    index = binned(geometric(200.0))
    assert [index.w(0.0, a, NO_CAP) for a in (0, 10, 100, 300, 600)] == pytest.approx([200.0] * 5, rel=0.05)


def test_known_lengths_make_it_the_remaining_work() -> None:
    index = binned({1000: 1.0})
    answers = [index.w(50.0, a, NO_CAP) for a in EDGES if a < 900]
    assert answers == sorted(answers, reverse=True)
    assert answers[0] == pytest.approx(1049, rel=0.06)
    assert answers[-1] < 250


def test_a_heavy_tail_makes_it_grow_with_the_output() -> None:
    pareto = {n: n**-1.2 - (n + 1) ** -1.2 for n in range(1, 50000)}
    answers = [binned(pareto).w(0.0, a, NO_CAP) for a in (0, 10, 100, 1000)]
    assert answers == sorted(answers)
    assert answers[-1] > 50 * answers[0]


def test_prefill_costs_at_least_itself() -> None:
    index = binned(geometric(100.0))
    answers = [index.w(c, 0, NO_CAP) for c in (0.0, 1.0, 10.0, 100.0, 1000.0)]
    assert answers == sorted(answers)
    assert all(answer > c for answer, c in zip(answers, (0.0, 1.0, 10.0, 100.0, 1000.0), strict=True))


def test_a_cap_is_a_certain_end() -> None:
    index = binned(geometric(10000.0))
    assert index.w(0.0, 0, 50) == pytest.approx(50, rel=0.01)
    assert index.w(7.0, 0, 1) == pytest.approx(8.0)
    assert index.mean_left(0, 50) == pytest.approx(50, rel=0.01)
    reached = index.w(3.0, 50, 50)  # nothing is left; still a cost
    assert 3.0 < reached < 10.0


def test_the_mean_that_is_left() -> None:
    index = GittinsIndex(range(1, 101), [1.0] * 100)
    assert index.mean_left(0, NO_CAP) == pytest.approx(50.5)
    assert index.mean_left(60, NO_CAP) == pytest.approx(20.5)
    assert index.mean_left(60, 70) == pytest.approx(sum(min(n, 10) for n in range(1, 41)) / 40)


def test_beyond_the_last_bin_there_is_an_answer() -> None:
    index = binned(geometric(100.0))
    assert 0.0 < index.w(1.0, 10 * EDGES[-1], 20 * EDGES[-1]) < math.inf
    assert index.next_edge(EDGES[-1]) is None


def test_answers_change_at_edges_only() -> None:
    index = binned(geometric(100.0))
    a = 0
    while (edge := index.next_edge(a)) is not None and edge < 5000:
        assert edge > a
        assert index.w(5.0, edge - 1, NO_CAP) == index.w(5.0, a, NO_CAP)
        a = edge


def test_rows_are_bounded() -> None:
    index = GittinsIndex(range(1, 101), [1.0] * 100)
    for a in range(99):
        for cap in range(a + 1, 101):
            index.w(1.0, a, cap)
    assert len(index._rows) <= MAX_ROWS


def test_a_bin_of_next_to_nothing_changes_nothing() -> None:
    masses = [0.5, 1e-30, 0.0, 0.5]
    assert GittinsIndex(range(1, 5), masses).w(2.0, 0, NO_CAP) == pytest.approx(
        brute_force({1: 0.5, 4: 0.5}, 2.0, 0, NO_CAP)
    )
