from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from scheduler.gittins import GittinsIndex
from scheduler.length_histogram import EDGES, HALF_LIFE, PRIOR, PRIOR_WEIGHT, Histogram
from scheduler.lengths import MAX_INDICES, MAX_TENANTS, MIN_SEEN, Lengths, request_class

NO_CAP = 10**9


def mean(lengths: Lengths, tenant: str = "", prompt: int = 100) -> float:
    return lengths.index(tenant, prompt).mean_left(0, NO_CAP)


def seen(lengths: Lengths, *, length: int, count: int, tenant: str = "", prompt: int = 100) -> Lengths:
    for _ in range(count):
        lengths.observe(tenant, prompt, length, natural=True)
    return lengths


def test_bins_are_exact_when_small_and_grow_evenly() -> None:
    assert EDGES[:16] == tuple(range(1, 17))
    assert all(1.0 < high / low < 1.15 for low, high in pairwise(EDGES[15:-1]))
    assert EDGES[-2] == 131072
    assert len(EDGES) < 110


def test_the_prior_is_a_distribution_without_holes() -> None:
    assert sum(PRIOR) == pytest.approx(1.0, abs=1e-4)
    assert min(PRIOR) > 0.0
    assert mean(Lengths()) == pytest.approx(308, rel=0.05)


def test_data_outweigh_the_prior() -> None:
    assert mean(seen(Lengths(), length=10, count=2000)) == pytest.approx(10, rel=0.6)
    masses = seen(Lengths(), length=10, count=2000).index("", 100)._masses
    assert masses[9] > 0.97
    assert min(masses) > 0.0


def test_the_prior_is_worth_its_weight() -> None:
    histogram = Histogram()
    for _ in range(round(PRIOR_WEIGHT)):
        histogram.add(1, natural=True)
    assert histogram.masses(PRIOR)[0] == pytest.approx(0.5, rel=0.01)


def test_old_observations_fade() -> None:
    histogram = Histogram()
    for length in (5, 9):
        for _ in range(round(HALF_LIFE)):
            histogram.add(length, natural=True)
    masses = histogram.masses(PRIOR)
    assert masses[4] / masses[8] == pytest.approx(0.5, rel=0.02)


def test_counts_stay_finite_for_ever() -> None:
    histogram = Histogram()
    for _ in range(200_000):  # the weight of one grows by 2 ** 50
        histogram.add(7, natural=True)
    assert histogram.weight == pytest.approx(HALF_LIFE / 0.693, rel=0.01)


def test_cut_sequences_count_as_longer() -> None:
    """Lengths with a mean of 300 of which a limit of 128 hides most: what is below is learned, and the rest
    is not taken for ends at 128."""
    draw = random.Random(1)
    lengths = Lengths()
    for _ in range(5000):
        length = 1 + int(draw.expovariate(1 / 300))
        lengths.observe("", 100, min(length, 128), natural=length <= 128)
    masses = lengths.index("", 100)._masses
    below = sum(mass for mass, edge in zip(masses, EDGES, strict=True) if edge <= 62)
    assert below == pytest.approx(1 - 2.718 ** (-62 / 300), rel=0.1)
    assert sum(mass for mass, edge in zip(masses, EDGES, strict=True) if edge > 140) > 0.55


def test_cuts_anywhere_do_not_bend_the_estimate() -> None:
    draw = random.Random(2)
    whole, partly = Lengths(), Lengths()
    for _ in range(8000):
        length, cut = 1 + int(draw.expovariate(1 / 200)), 1 + int(draw.expovariate(1 / 300))
        whole.observe("", 100, length, natural=True)
        partly.observe("", 100, min(length, cut), natural=length <= cut)
    assert mean(partly) == pytest.approx(mean(whole), rel=0.1)


def test_only_cut_sequences_leave_the_prior_beyond() -> None:
    lengths = Lengths()
    for _ in range(1000):
        lengths.observe("", 100, 500, natural=False)
    assert mean(lengths) > 500


def test_what_was_cut_before_its_first_token_says_nothing() -> None:
    lengths = Lengths()
    lengths.observe("a", 100, 0, natural=False)
    assert list(lengths.to_json()) == list(Lengths().to_json())


def test_classes_are_powers_of_four() -> None:
    assert [request_class(n) for n in (0, 1, 3, 4, 15, 16, 63, 64, 10**9)] == [0, 0, 0, 1, 1, 2, 2, 3, 11]


def test_the_finest_histogram_with_enough_data_answers() -> None:
    lengths = seen(Lengths(), length=1000, count=3000, prompt=100)
    assert mean(lengths, prompt=9) == pytest.approx(1000, rel=0.1)  # from all
    seen(lengths, length=100, count=3000, prompt=9)
    assert mean(lengths, prompt=9) == pytest.approx(100, rel=0.2)  # from its class
    assert mean(lengths, prompt=100) == pytest.approx(1000, rel=0.1)
    seen(lengths, length=10, count=MIN_SEEN - 1, prompt=9, tenant="a")
    assert mean(lengths, "a", 9) == pytest.approx(100, rel=0.25)
    seen(lengths, length=10, count=1000, prompt=9, tenant="a")
    assert mean(lengths, "a", 9) < 20  # the tenant's own
    assert mean(lengths, "b", 9) > 20


def test_an_index_is_made_again_when_much_is_new() -> None:
    lengths = seen(Lengths(), length=50, count=1000)
    first = lengths.index("", 100)
    assert lengths.index("", 100) is first
    seen(lengths, length=500, count=40)
    assert lengths.index("", 100) is first
    seen(lengths, length=500, count=20)
    assert lengths.index("", 100) is not first


def test_memory_is_bounded() -> None:
    lengths = Lengths()
    for k in range(3 * MAX_TENANTS):
        seen(lengths, length=5, count=MIN_SEEN, tenant=f"tenant {k}")
        assert isinstance(lengths.index(f"tenant {k}", 100), GittinsIndex)
    assert len(lengths._tenants) == MAX_TENANTS
    assert len(lengths._built) <= MAX_INDICES


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    lengths = seen(seen(Lengths(), length=1000, count=500), length=7, count=500, tenant="ann@example.org")
    lengths.observe("ann@example.org", 100, 64, natural=False)
    lengths.save(path)
    loaded, reason = Lengths.load(path)
    assert reason is None
    assert list(loaded.to_json()) == list(lengths.to_json())
    assert mean(loaded, "ann@example.org") == pytest.approx(mean(lengths, "ann@example.org"), rel=0.01)
    assert mean(loaded, "ann@example.org") < mean(loaded) / 5
    assert "ann" not in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_a_silent_start(tmp_path: Path) -> None:
    loaded, reason = Lengths.load(tmp_path / "none.json")
    assert reason is None
    assert mean(loaded) == mean(Lengths())


def test_a_copy_is_what_was_known_then(tmp_path: Path) -> None:
    """Another thread saves it while the engine learns on."""
    lengths = seen(Lengths(), length=9, count=200, tenant="ann")
    copied, known = lengths.copy(), list(lengths.to_json())
    seen(lengths, length=900, count=30_000, tenant="ann")  # the unit of counts begins anew
    seen(lengths, length=900, count=5, tenant="bob", prompt=9000)
    assert list(copied.to_json()) == known
    assert list(lengths.to_json()) != known
    pauses = 0

    def pause() -> None:
        nonlocal pauses
        pauses += 1

    copied.save(tmp_path / "lengths.json", pause)
    assert list(Lengths.load(tmp_path / "lengths.json")[0].to_json()) == known
    assert pauses >= len(known)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lengths.json"
    seen(Lengths(), length=9, count=5).save(path)
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        seen(Lengths(), length=900, count=5).save(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def entry(**changes: object) -> str:
    one = {"tenant": "", "class": 3, "ended": [1.0] * len(EDGES), "cut": [0.0] * len(EDGES), **changes}
    return json.dumps({"version": 1, "edges": list(EDGES), "histograms": [one]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\x00\xff",
        "[" * 100_000,
        '{"version": 2}',
        '{"version": 1, "edges": [1, 2]}',
        entry(ended=[1.0]),
        entry(cut=[-1.0] * len(EDGES)),
        entry(cut=[float("nan")] * len(EDGES)),
        entry(cut=[float("inf")] * len(EDGES)),
        entry(cut=["1"] * len(EDGES)),
        entry(ended=[9e8, *[0.0] * (len(EDGES) - 1)]),
        entry(ended=[300.0] * len(EDGES)),
        entry(tenant=None),
        entry(**{"class": 99}),
        entry(**{"class": "3"}),
        entry(tenant="a", **{"class": -1}),
        entry()[:-40],
    ],
)
def test_a_damaged_file_is_a_start_from_the_prior_with_a_reason(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lengths.json"
    path.write_text(text)
    loaded, reason = Lengths.load(path)
    assert reason is not None
    assert str(path) in reason
    assert list(loaded.to_json()) == list(Lengths().to_json())


def test_what_weighs_most_can_be_saved_and_its_tail_stays_possible(tmp_path: Path) -> None:
    """Everything alike for longer than the half-life: the prior is as small as it can be."""
    seen(Lengths(), length=5, count=60_000, tenant="t").save(tmp_path / "lengths.json")
    loaded, reason = Lengths.load(tmp_path / "lengths.json")
    assert reason is None
    index = loaded.index("t", 100)
    assert index.w(0.0, 200_000, 262_144) > 0.0
    assert index.mean_left(200_000, 262_144) > 0.0


def test_a_folder_in_the_place_of_the_file_is_a_reason(tmp_path: Path) -> None:
    assert Lengths.load(tmp_path)[1] is not None


def test_an_untouched_entry_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    path.write_text(entry())
    assert Lengths.load(path)[1] is None
