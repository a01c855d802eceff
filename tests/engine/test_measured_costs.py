"""Costs are measured once per model and machine, kept, and never trusted when damaged."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import engine.measured_costs
from engine.calibration import Calibration
from engine.measured_costs import measured_costs
from scheduler.config import SchedulerConfig
from scheduler.costs import CostModel
from scheduler.machine import MachineError

MACHINE = Path(__file__).parents[2] / "configs" / "machines" / "h100-8b.toml"


class Machine:
    """Counts measurements; each finds other costs."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.count = 0
        self.steady = True
        self.identity = b"model"
        self.storage = SimpleNamespace(keys=[torch.zeros(1)])

    def calibrate(self, *_: object) -> Calibration:
        self.count += 1
        return Calibration(CostModel(step_s=float(self.count)), 9, 0.1, 0.1, self.steady)

    def costs(self, setting: str = "") -> CostModel:
        parts = cast("Any", (self.identity, None, self.storage, None))
        return measured_costs(setting, *parts, SchedulerConfig(), self.folder)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "octavo" / "costs"


@pytest.fixture
def machine(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(cache.parent)
    monkeypatch.setattr(engine.measured_costs, "calibrate", made.calibrate)
    return made


def test_the_second_start_measures_nothing(machine: Machine, cache: Path) -> None:
    first = machine.costs()
    assert machine.costs() == first
    assert machine.count == 1
    assert [path.suffix for path in cache.iterdir()] == [".json"], "no half-written file is left"


def test_measuring_anew_replaces_what_was_kept(machine: Machine) -> None:
    machine.costs()
    assert machine.costs("measure").step_s == 2.0
    assert machine.costs().step_s == 2.0


def test_a_machine_file_replaces_the_measurement(machine: Machine, cache: Path) -> None:
    assert machine.costs(str(MACHINE)).step_s == 0.006
    assert (machine.count, cache.exists()) == (0, False)
    with pytest.raises(MachineError, match=r"cannot read nowhere.toml"):
        machine.costs("nowhere.toml")


def test_unsteady_measurements_are_not_kept(machine: Machine, cache: Path) -> None:
    machine.steady = False
    assert machine.costs() != machine.costs()
    assert not cache.exists()


def test_without_a_state_folder_nothing_is_kept(machine: Machine, cache: Path) -> None:
    machine.folder = None
    assert (machine.costs().step_s, machine.costs().step_s) == (1.0, 2.0)
    assert not cache.exists()


GOOD = asdict(CostModel())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\udcff",
        "[]",
        "[" * 100_000,
        json.dumps({"step_s": 1.0}),
        json.dumps(GOOD | {"more": 1.0}),
        json.dumps(GOOD | {"step_s": -1.0}),
        json.dumps(GOOD | {"step_s": float("nan")}),
        json.dumps(GOOD | {"step_s": "1"}),
    ],
    ids=["empty", "cut", "no text", "no object", "deep", "few", "more", "negative", "nan", "a string"],
)
def test_a_damaged_file_is_measured_again(machine: Machine, cache: Path, text: str) -> None:
    machine.costs()
    (file,) = cache.iterdir()
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert machine.costs().step_s == 2.0
    assert machine.costs().step_s == 2.0, "and mended"


def test_a_cache_that_cannot_be_written_costs_only_the_measurement(machine: Machine, cache: Path) -> None:
    cache.parent.parent.write_text("a file where the folder would be")
    assert machine.costs().step_s == 1.0
    assert machine.costs().step_s == 2.0


def test_another_model_or_number_of_threads_is_another_measurement(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.costs()
    machine.identity = b"another"
    machine.costs()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    machine.costs()
    assert machine.count == 3
