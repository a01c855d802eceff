"""Targets are made of pieces: in the right rows, types and order, each stored byte read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.weights.errors import CheckpointError
from engine.weights.filling import Filling
from engine.weights.folder_source import folder_source
from engine.weights.layout import Piece, Target
from engine.weights.mapped import MappedFiles
from engine.weights.safetensors import StoredTensor
from engine.weights.source import WeightSource
from tests.engine.weights.stored import write

CPU = torch.device("cpu")
TENSORS = {
    "q": torch.randn(4, 8),
    "k": torch.randn(2, 8),
    "bias": torch.randn(6).bfloat16(),
    "gates": torch.randn(3, 2, 8).half(),
    "ups": torch.randn(3, 2, 8),
    "gate_bias": torch.randn(3, 2),
    "up_bias": torch.randn(3, 2),
    "norm": torch.randn(8, dtype=torch.float64),
}


def whole(name: str, **place: Any) -> Piece:
    return Piece(name, tuple(TENSORS[name].shape), **place)


def backwards(values: torch.Tensor) -> torch.Tensor:
    return values.flip(0)


TARGETS = [
    Target("qk", (6, 8), (whole("q", arrange=backwards), whole("k", row=4))),
    Target("bias", (6,), (whole("bias"),)),
    Target("experts", (3, 4, 8), (whole("gates", stacked=True), whole("ups", row=2, stacked=True))),
    Target("experts.bias", (3, 4), (whole("gate_bias", stacked=True), whole("up_bias", row=2, stacked=True))),
    Target("norm", (8,), (whole("norm"),), exact=True),
]


@pytest.fixture
def source(tmp_path: Path) -> WeightSource:
    found = folder_source(write(tmp_path, TENSORS))
    for name in TENSORS:
        found.recipe(name)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_piece_has_its_place(source: WeightSource, dtype: torch.dtype) -> None:
    weights = Filling(source, dtype, CPU).run(TARGETS)
    expected = {
        "qk": torch.cat((TENSORS["q"].flip(0), TENSORS["k"])),
        "bias": TENSORS["bias"],
        "experts": torch.cat((TENSORS["gates"].float(), TENSORS["ups"]), dim=1),
        "experts.bias": torch.cat((TENSORS["gate_bias"], TENSORS["up_bias"]), dim=1),
    }
    assert list(weights) == [target.name for target in TARGETS]
    assert torch.equal(weights.pop("norm"), TENSORS["norm"].float())
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name].to(dtype)), name


def test_every_stored_tensor_is_looked_at_once_and_given_back(
    source: WeightSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {}
    for name in ("view", "drop"):
        monkeypatch.setattr(MappedFiles, name, noted(getattr(MappedFiles, name), seen.setdefault(name, [])))
    Filling(source, torch.float32, CPU).run(TARGETS)
    assert sorted(seen["view"]) == sorted(seen["drop"]) == sorted(TENSORS)


def noted(real: Any, calls: list[str]) -> Any:
    def call(files: MappedFiles, part: StoredTensor) -> Any:
        calls.append(part.name)
        return real(files, part)

    return call


def test_threads_are_as_many_as_their_pieces_leave_room_for(source: WeightSource) -> None:
    """Without that, sixteen threads with all experts of a layer each would take many times the model."""
    before = torch.get_num_threads()
    torch.set_num_threads(16)
    try:
        filling = Filling(source, torch.bfloat16, CPU)
        large = [Target("e", (3, 2, 8), (whole("gates", stacked=True),))]
        kept = 3 * 2 * 8 * 2
        assert filling.kept_bytes(large) == kept
        assert filling.peak_bytes(large) == kept + 2 * kept  # one thread: as read, and arranged
        straight = [Target("k", (2, 8), (whole("k"),))]
        assert filling.peak_bytes(straight) == 2 * 8 * 2
        gpu = Filling(source, torch.bfloat16, torch.device("cuda"))  # where stored bytes are copied to
        assert gpu.peak_bytes(straight) == 2 * 8 * 2 + 2 * 8 * 4
    finally:
        torch.set_num_threads(before)


def test_a_failure_ends_the_load_and_restores_the_threads(source: WeightSource) -> None:
    def fail(values: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    before = torch.get_num_threads()
    with pytest.raises(MemoryError):
        Filling(source, torch.float32, CPU).run([Target("q", (4, 8), (whole("q", arrange=fail),))])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("change", [Path.touch, Path.unlink])
def test_files_that_change_while_they_are_loaded_are_refused(
    source: WeightSource, tmp_path: Path, change: Any
) -> None:
    """Their pages in a cache on the disk would be named after what lies there now."""

    def meanwhile(values: torch.Tensor) -> torch.Tensor:
        change(tmp_path / "model.safetensors")
        return values

    with pytest.raises(CheckpointError, match="was changed or removed while it was loaded"):
        Filling(source, torch.float32, CPU).run([Target("q", (4, 8), (whole("q", arrange=meanwhile),))])
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()
