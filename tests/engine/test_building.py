"""Memory that is promised twice would end a server later, in the middle of its work."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from safetensors.torch import save_file

import engine.sizing
from engine.building import build_engine
from engine.checkpoint import locate
from engine.config import EngineConfig
from engine.drafting import LIGHT, STORE_BYTES
from engine.models.config import Layer
from engine.sizing import EngineConfigError
from engine.step_memory import asked_bytes, counted_bytes
from engine.weights.errors import CheckpointError
from engine.weights.mapped import MappedFiles
from scheduler.config import SchedulerConfig
from tests.engine.tiny import CPU, TINY

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint

FREE = 100_000_000  # beside what is kept for a step
DEVICE_PAGES = 200  # of 368,640 bytes: beside what drafters remember, a 16th, they leave 20 MB
COSTS = str(Path(__file__).parents[2] / "configs" / "machines" / "cpu-2-cores-smollm2-135m.toml")


def step_bytes() -> int:
    shape = locate("").transformer
    return counted_bytes(shape, 2, SchedulerConfig()) + asked_bytes(shape, SchedulerConfig())


STEP_BYTES = step_bytes()


def config(**tiers: int | str) -> EngineConfig:
    return EngineConfig(
        device="cpu",
        dtype="bfloat16",
        state_folder="-",
        costs=COSTS,
        scheduler=SchedulerConfig(num_pages=DEVICE_PAGES),
        **tiers,  # type: ignore[arg-type]
    )


def free_after_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights find enough, what comes after them finds FREE bytes."""
    answers = chain([10**9], repeat(FREE + STEP_BYTES))
    monkeypatch.setattr(engine.sizing, "free_bytes", lambda device: next(answers))


def test_host_pages_fit_beside_the_pages_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    free_after_loading(monkeypatch)
    with pytest.raises(EngineConfigError, match=r"135 host pages .* 20022000 are free"):
        build_engine(config(host_cache_bytes=50_000_000, draft_store_bytes=FREE // 16))
    free_after_loading(monkeypatch)
    built = build_engine(config(host_cache_bytes=20_000_000, draft_store_bytes=FREE // 16))
    assert (built.ready.num_pages, built.ready.host_pages) == (DEVICE_PAGES, 54)
    built.core.close()


def test_the_engine_says_which_drafters_it_has_and_its_default_must_be_one() -> None:
    built = build_engine(config(drafter="skipped_layers"))
    built.core.close()
    assert set(built.ready.drafters) == {*LIGHT, "skipped_layers"}


def test_a_draft_model_goes_on_beside_the_engine_where_it_may(smollm2_gguf: Path) -> None:
    """Nobody else has a thread for it."""
    for draft_model, choice, expected in ((str(smollm2_gguf), "on", True), ("", "on", False)):
        built = build_engine(config(draft_model=draft_model, draft_overlap=choice))
        built.core.close()
        assert (built.core.speculation.overlap is not None) is expected


def test_drafters_that_cannot_be_loaded_are_refused_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(MappedFiles, "open", None)
    with pytest.raises(
        EngineConfigError, match=r"drafter medusa is not loaded: .*draft_model.*auto, prompt_lookup"
    ):
        build_engine(config(drafter="medusa"))
    with pytest.raises(CheckpointError, match=r"draft_model: '/nowhere/at/all' is no folder.*or none"):
        build_engine(config(draft_model="/nowhere/at/all"))
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 3, "hidden_size": 64}')
    save_file({"0.0.linear.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"draft_model: .* hidden_size = 64, the model has 576"):
        build_engine(config(draft_model=str(tmp_path)))


def test_weights_that_do_not_fit_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.sizing, "free_bytes", lambda device: FREE)
    monkeypatch.setattr(MappedFiles, "open", None)
    with pytest.raises(CheckpointError, match=r"takes \d+ bytes as bfloat16 on cpu, 100000000 are free"):
        build_engine(config())


def test_an_adapter_is_a_folder() -> None:
    with pytest.raises(CheckpointError, match="/nowhere: no folder of a LoRA adapter"):
        build_engine(config(lora="/nowhere"))


def test_a_disk_whose_table_cannot_be_read_counts_as_empty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pread = os.pread

    def failing(descriptor: int, length: int, offset: int) -> bytes:
        if offset:  # the header is whole
            raise OSError(5, "Input/output error")
        return pread(descriptor, length, offset)

    monkeypatch.setattr("engine.tiers.disk.os.pread", failing)
    path = str(tmp_path / "kv")
    built = build_engine(config(host_cache_bytes=10**7, disk_cache_bytes=10**7, disk_cache_path=path))
    built.core.close()
    assert built.ready.disk_pages == 27
    assert [tier.num_used for tier in built.core.scheduler.stats().tiers] == [0, 0]
    assert caplog.messages == [f"{path} counts as empty, its table cannot be read: Input/output error"]


def test_a_disk_needs_a_host_page_and_a_place() -> None:
    with pytest.raises(EngineConfigError, match="host_cache_bytes must be at least 368640"):
        build_engine(config(host_cache_bytes=368_639, disk_cache_bytes=10**7))
    with pytest.raises(EngineConfigError, match="set disk_cache_path"):
        build_engine(config(host_cache_bytes=10**7, disk_cache_bytes=10**7))


def test_what_drafters_remember_is_set_aside_before_pages_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.sizing, "free_bytes", lambda device: FREE)
    assert engine.sizing.with_draft_stores(config()).draft_store_bytes == FREE / 16
    assert engine.sizing.with_draft_stores(config(draft_store_bytes=5)).draft_store_bytes == 5
    monkeypatch.setattr(engine.sizing, "free_bytes", lambda device: 2**40)
    assert engine.sizing.with_draft_stores(config()).draft_store_bytes == STORE_BYTES
    monkeypatch.setattr(engine.sizing, "free_bytes", lambda device: FREE)
    layers, most = (Layer(),) * 2, 8 * FREE  # more than is asked for
    free = pages_for(layers, 4096, kv_cache_bytes=most, draft_store_bytes=1)
    assert free == 4 * 256
    with pytest.raises(EngineConfigError, match=r"of 0 free beside the largest step: lower max_model_len"):
        pages_for(layers, 4096, draft_store_bytes=2 * FREE)


class Shape:
    """As much of a checkpoint as its pages depend on."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        self.transformer = replace(TINY, layers=layers, max_positions=4096)


def pages_for(layers: tuple[Layer, ...], max_model_len: int, promised: int = 0, **settings: Any) -> int:
    asked = replace(config(**settings), scheduler=SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=4))
    checkpoint = cast("Checkpoint", Shape(layers))
    return engine.sizing.with_pages(asked, checkpoint, torch.float32, CPU, max_model_len, promised).num_pages


def test_a_sequence_takes_fewer_pages_where_windows_slide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.sizing, "free_bytes", lambda device: FREE)
    assert pages_for((Layer(),) * 2, 4096) == 4 * 256
    assert pages_for((Layer(window=128),) * 2, 4096) == 4 * (8 + 1 + 4)  # the window, and a slice of 64
    assert pages_for((Layer(), Layer(window=128)), 4096) == 4 * (256 + 13)
    page_bytes = 2 * 2 * 16 * 4 * 16
    few = pages_for((Layer(), Layer(window=128)), 4096, kv_cache_bytes=269 * page_bytes)
    assert few == 269
    with pytest.raises(EngineConfigError, match=f"needs {269 * page_bytes} bytes"):
        pages_for((Layer(), Layer(window=128)), 4096, kv_cache_bytes=269 * page_bytes - 1)


def test_pages_leave_room_for_the_largest_step_or_say_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.sizing, "free_bytes", lambda device: FREE)
    page_bytes, layers = 2 * 2 * 16 * 4 * 16 * 2, (Layer(),) * 2
    assert pages_for(layers, 4096, FREE // 2) == 4 * 256, "the step fits beside them"
    assert pages_for(layers, 4096, FREE - 700 * page_bytes) == 700
    with pytest.raises(EngineConfigError, match=r"lower max_model_len or max_num_batched_tokens = 64"):
        pages_for(layers, 4096, FREE - 200 * page_bytes)
    with pytest.raises(EngineConfigError, match=r"beside the largest step: lower num_pages, kv_cache_bytes"):
        pages_for(layers, 4096, FREE - 300 * page_bytes, kv_cache_bytes=301 * page_bytes)
