"""Fairness between tenants: virtual counters, weights, lifting, bounds on memory."""

from __future__ import annotations

import pytest

from scheduler import tenants as tenants_module
from scheduler.costs import CostModel
from scheduler.tenants import LazyMinimum, Tenants, parse_weights
from tests.scheduler.driver import Driver, request

COSTS = CostModel(step_s=0.01, slice_s=0.0, token_s=0.001, pair_s=0.0)


def test_the_least_value_is_found_though_values_have_grown() -> None:
    values: dict[int, float | None] = {1: 1.0, 2: 2.0, 3: 3.0}
    least = LazyMinimum()
    for number, value in values.items():
        least.push(number, value or 0.0)
    values[1] = 5.0
    assert least.first(values.get) == 2
    values[2] = None  # takes part no more
    assert least.first(values.get) == 3
    values[3] = None
    values[1] = None
    assert least.first(values.get) is None
    assert not least._heap
    assert not least._present


def test_service_weighs_less_for_a_heavy_tenant() -> None:
    tenants = Tenants({"heavy": 4.0})
    for name in ("heavy", "light"):
        tenants.enter(name)
    for name in ("heavy", "light"):
        tenants.charge(name, 8.0)
    assert (tenants.active["heavy"].served_s, tenants.active["light"].served_s) == (2.0, 8.0)


def test_who_comes_back_is_lifted_to_the_least_served_that_stayed() -> None:
    tenants = Tenants({})
    for name in ("idle", "a", "b"):
        tenants.enter(name)
    tenants.leave("idle")
    tenants.charge("a", 7.0)
    tenants.charge("b", 9.0)
    assert tenants.enter("idle").served_s == 7.0
    assert tenants.enter("new").served_s == 7.0


def test_who_had_more_than_those_that_stayed_keeps_it() -> None:
    tenants = Tenants({})
    tenants.enter("idle")
    tenants.enter("a")
    tenants.charge("idle", 50.0)
    tenants.leave("idle")
    tenants.charge("a", 7.0)
    assert tenants.enter("idle").served_s == 50.0


def test_with_nobody_there_one_is_lifted_to_who_went_last() -> None:
    """Else who comes at a quiet moment would go first until it had had as much as the others ever had."""
    tenants = Tenants({})
    tenants.enter("a")
    tenants.charge("a", 9.0)
    tenants.leave("a")
    assert tenants.enter("b").served_s == 9.0
    assert tenants.enter("a").served_s == 9.0


def test_idle_tenants_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants_module, "MAX_IDLE_TENANTS", 3)
    tenants = Tenants({})
    for number in range(100):
        tenants.enter(str(number))
        tenants.leave(str(number))
    assert list(tenants._idle) == ["97", "98", "99"]
    assert not tenants.active
    assert not tenants._by_number


@pytest.mark.parametrize("entry", ["a", "a=", "=2", "a=0", "a=-1", "a=nan", "a=inf", "a=x"])
def test_a_wrong_weight_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="tenant_weights") as refused:
        parse_weights([entry])
    assert repr(entry) in str(refused.value)


def test_names_may_hold_the_sign() -> None:
    assert parse_weights(["a=b=2", "c=0.5"]) == {"a=b": 2.0, "c": 0.5}


def _served(driver: Driver, steps: int) -> dict[str, float]:
    for _ in range(steps):
        driver.step()
    return {tenant.name: tenant.served_s for tenant in driver.scheduler._tenants.active.values()}


def _backlogged(weights: tuple[str, ...] = (), **config: object) -> Driver:
    """Two tenants with work without end, one with many more requests, which came first."""
    driver = Driver(costs=COSTS, num_pages=64, max_num_seqs=2, tenant_weights=weights, **config)
    driver.add(*[request(f"g{k}", 8, max_tokens=8, tenant="greedy") for k in range(60)])
    driver.add(*[request(f"m{k}", 8, max_tokens=8, tenant="modest") for k in range(30)])
    return driver


def test_two_backlogged_tenants_are_served_alike() -> None:
    """VTC: the gap between two that always have work stays within what a batch may add at once."""
    driver = _backlogged()
    one_request_s = COSTS.prefill(0, 8, 512, 2) + 8 * COSTS.decode(16, 2)
    for _ in range(12):
        served = _served(driver, 10)
        assert abs(served["greedy"] - served["modest"]) <= 2 * one_request_s + 1e-9
    assert min(served.values()) > 4 * one_request_s


def test_weights_share_service_in_proportion() -> None:
    driver = _backlogged(weights=("modest=3",))
    served = _served(driver, 100)
    own = {"greedy": served["greedy"], "modest": served["modest"] * 3}
    assert 2.3 <= own["modest"] / own["greedy"] <= 3.7
