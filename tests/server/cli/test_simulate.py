"""`octavo simulate` as a user meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from server import cli
from server.bench.plots import PlotError, median_by_size, require_matplotlib

MACHINE = """
name = "toy"
[costs]
step_s = 0.01
slice_s = 0.001
token_s = 0.0001
pair_s = 0.0
host_page_s = 0.001
disk_page_s = 0.01
[scheduler]
max_num_seqs = 4
max_num_batched_tokens = 64
page_size = 4
num_pages = 200
host_pages = 100
disk_pages = 0
max_model_len = 512
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    machine, trace = tmp_path / "toy.toml", tmp_path / "trace.csv"
    machine.write_text(MACHINE)
    lines = [f"{k / 10},{1 + 37 * k % 90},{1 + 11 * k % 40},{'ab'[k % 2]}" for k in range(400)]
    trace.write_text("arrival,input,output,tenant\n" + "\n".join(lines) + "\n")
    return str(trace), str(machine)


def test_it_compares_policies(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, machine = files
    out = tmp_path / "out.json"
    arguments = ["--machine", machine, "--policy", "fcfs,srpt,mlfq", "--load", "1.5", "--json", str(out)]
    assert cli.main(["simulate", trace, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "for a load of 1.5" in printed
    assert "…" not in printed  # no figure is cut
    figures = json.loads(out.read_text())
    assert [one["policy"] for one in figures["policies"]] == ["fcfs", "srpt", "mlfq"]
    assert figures["compared_with_fcfs"][0]["mean_completion"] == 1.0
    assert figures["compared_with_fcfs"][1]["towards_srpt"] == 1.0
    tenants = figures["policies"][0]["by_tenant"]
    assert {one["tenant"] for one in tenants} == {"a", "b"}
    assert sum(one["share"] for one in tenants) == pytest.approx(1.0)
    assert sum(one["num_requests"] for one in figures["policies"][0]["by_output"]) == 400


def test_more_machines_and_fewer_places(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    trace, machine = files
    arguments = [
        "--machine",
        machine,
        "--machines",
        "3",
        "--batch",
        "2",
        "--limit",
        "90",
        "--clip-output",
        "5",
    ]
    assert cli.main(["simulate", trace, *arguments, "--routing", "round-robin", "--divide-lengths", "2"]) == 0
    printed = capsys.readouterr().out
    assert "90 requests; lengths divided by 2; outputs clipped to 5 tokens" in printed
    assert "3 x toy, at most 2 sequences a step" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, "/absent.csv"), "cannot read /absent.csv"),
        ((2, "/absent.toml"), "cannot read /absent.toml"),
        ((4, "sjf"), "'sjf' is no policy"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    files: tuple[str, str], change: tuple[int, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [files[0], "--machine", files[1], "--policy", "fcfs"]
    arguments[change[0]] = change[1]
    try:
        status = cli.main(["simulate", *arguments])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    error = capsys.readouterr().err
    assert status in (1, 2)
    assert message in error
    assert error.count("\n") == 1


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotError, match=r"octavo\[bench\]"):
        require_matplotlib()


def test_a_plot_is_written(files: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    arguments = ["--machine", files[1], "--policy", "mlfq,fcfs", "--plot", str(picture)]
    assert cli.main(["simulate", files[0], *arguments]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_medians_are_those_of_each_class_of_size() -> None:
    sizes, medians = median_by_size([1, 1, 1, 64, 64], [1.0, 2.0, 9.0, 5.0, 7.0])
    assert medians == [2.0, 6.0]
    assert sizes[0] < 2 < 64 < sizes[1] < 128
