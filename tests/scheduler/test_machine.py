"""Machine files: the shipped ones load, and a wrong one is refused in one line that names the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.costs import CostModel
from scheduler.machine import Machine, MachineError, load_machine

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "machines").glob("*.toml"))
GOOD = """
name = "a machine"

[costs]
step_s = 0.5
slice_s = 0.25
token_s = 1
pair_s = 0
host_page_s = 0.001
disk_page_s = 0.01

[scheduler]
max_num_seqs = 4
max_num_batched_tokens = 64
page_size = 16
num_pages = 100
host_pages = 10
max_model_len = 1600
"""


def load(folder: Path, text: str) -> Machine:
    path = folder / "machine.toml"
    path.write_text(text, encoding="utf-8")
    return load_machine(path)


def test_a_machine_file_is_read(tmp_path: Path) -> None:
    costs = CostModel(step_s=0.5, slice_s=0.25, token_s=1.0, pair_s=0.0, host_page_s=0.001, disk_page_s=0.01)
    assert load(tmp_path, GOOD) == Machine(
        name="a machine",
        costs=costs,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        page_size=16,
        num_pages=100,
        host_pages=10,
        disk_pages=0,
        max_model_len=1600,
    )


def test_a_machine_without_a_name_has_its_file_s(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD.replace('name = "a machine"', "")).name == "machine"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_machines_load(path: Path) -> None:
    machine = load_machine(path)
    assert machine.costs.step([(0, 1)]) < machine.costs.step([(0, 512)])


def test_machines_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} >= {"cpu-2-cores-smollm2-135m", "h100-8b"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("step_s = 0.5", "", "[costs] lacks step_s"),
        ("step_s = 0.5", "step_s = 0", "step_s must be above 0"),
        ("slice_s = 0.25", "slice_s = -1.0", "slice_s must be seconds, at least 0, not -1.0"),
        ("slice_s = 0.25", "slice_s = nan", "slice_s must be seconds"),
        ("slice_s = 0.25", 'slice_s = "1"', "slice_s must be seconds, at least 0, not '1'"),
        ("slice_s = 0.25", "slice_s = true", "slice_s must be seconds"),
        ("pair_s = 0", "pair_s = 0\npears_s = 0", "[costs] has no field pears_s"),
        ("num_pages = 100", "", "[scheduler] lacks num_pages"),
        ("page_size = 16", "page_size = 0", "page_size must be a whole number, at least 1, not 0"),
        ("page_size = 16", "page_size = 16.0", "page_size must be a whole number"),
        ("host_pages = 10", "host_pages = -1", "host_pages must be a whole number, at least 0"),
        ("max_num_seqs = 4", "max_num_seqs = true", "max_num_seqs must be a whole number"),
        ("max_model_len = 1600", "max_model_len = 1601", "num_pages hold 1600 tokens"),
        ("[scheduler]", "[schedule]", "unknown field schedule"),
        ('"a machine"', "7", "name must be a string, not 7"),
        ("[costs]", "[costs", "is not TOML"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(MachineError) as refused:
        load(tmp_path, GOOD.replace(old, new, 1))
    message = str(refused.value)
    assert said in message
    assert "machine.toml" in message
    assert "\n" not in message


def test_a_missing_table_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"no table \[scheduler\]"):
        load(tmp_path, GOOD[: GOOD.index("[scheduler]")])
    with pytest.raises(MachineError, match=r"cannot read .*nowhere\.toml: No such file"):
        load_machine(tmp_path / "nowhere.toml")
