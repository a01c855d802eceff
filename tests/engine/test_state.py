"""What an engine keeps from one process to the next: where, and what becomes of it when it cannot."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import state
from engine.building import _lower_tiers
from engine.config import EngineConfig
from engine.kv_storage import KVStorage
from engine.state import LengthsFile, state_folder
from scheduler.lengths import ALL
from tests.engine.tiny import CPU, SETTINGS, TINY


@pytest.mark.parametrize(
    ("configured", "environment", "folder"),
    [
        ("-", "/somewhere", None),
        ("/mine", "/somewhere", "/mine"),
        ("~/mine", "/somewhere", "/home/me/mine"),
        ("", "/somewhere", "/somewhere/octavo"),
        ("", "relative", "/home/me/.cache/octavo"),
        ("", "", "/home/me/.cache/octavo"),
    ],
)
def test_the_folder_is_the_configured_one_or_the_users_cache(configured, environment, folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", environment)
    assert state_folder(EngineConfig(state_folder=configured)) == (Path(folder) if folder else None)


def learn(file: LengthsFile, count: int = 300) -> None:
    for _ in range(count):
        file.lengths.observe("me", 10, 40, natural=True)


def expected(file: LengthsFile) -> float:
    return file.lengths.index("me", 10).mean_left(0, 1000)


def test_what_was_learned_is_known_to_the_next_engine_of_the_same_model(tmp_path: Path):
    first = LengthsFile(tmp_path, b"model")
    unlearned = expected(first)
    learn(first)
    assert expected(first) != pytest.approx(unlearned, rel=0.1)
    first.save()
    assert expected(LengthsFile(tmp_path, b"model")) == pytest.approx(expected(first), rel=0.05)
    assert expected(LengthsFile(tmp_path, b"another")) == pytest.approx(unlearned)


def test_it_is_saved_now_and_then(tmp_path: Path, monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(state.time, "monotonic", lambda: now_s)
    file = LengthsFile(tmp_path, b"model")
    learn(file)
    now_s += state.SAVE_EVERY_S - 1
    file.save_when_due()
    assert not list(tmp_path.rglob("*.json"))
    now_s += 1
    file.save_when_due()
    assert file.wait()
    (saved,) = tmp_path.rglob("*.json")
    before = saved.stat().st_mtime_ns
    file.save_when_due()
    assert saved.stat().st_mtime_ns == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"version": 99}', b"null"])
def test_a_damaged_file_is_a_line_in_the_log_and_written_anew(content, tmp_path: Path, caplog):
    good = LengthsFile(tmp_path, b"model")
    unlearned = expected(good)
    learn(good)
    good.save()
    (saved,) = tmp_path.rglob("*.json")
    saved.write_bytes(content)
    file = LengthsFile(tmp_path, b"model")
    assert "begin anew" in caplog.text
    assert expected(file) == pytest.approx(unlearned)
    file.save()
    caplog.clear()
    LengthsFile(tmp_path, b"model")
    assert not caplog.records


def test_a_folder_that_cannot_be_written_is_a_line_in_the_log(tmp_path: Path, caplog):
    (tmp_path / "file").write_text("not a folder")
    file = LengthsFile(tmp_path / "file", b"model")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        file.save()
    assert "are not kept" in caplog.text


class SlowDisk:
    """fsync ends when it may; what it was called for is counted."""

    def __init__(self, monkeypatch) -> None:
        self.may_end, self.reached, self.num_calls = threading.Event(), threading.Event(), 0
        self.now_s = 100.0
        monkeypatch.setattr("scheduler.lengths.os.fsync", self.fsync)
        monkeypatch.setattr(state.time, "monotonic", lambda: self.now_s)

    def fsync(self, _) -> None:
        self.num_calls += 1
        self.reached.set()
        assert self.may_end.wait(30)


def test_steps_go_on_while_lengths_are_written(tmp_path: Path, monkeypatch):
    """A thousand histograms and an fsync stopped every stream for 0.6 s."""
    disk = SlowDisk(monkeypatch)
    file = LengthsFile(tmp_path, b"model")
    learn(file)
    for number in range(1, 4):
        disk.now_s = 100.0 + number * state.SAVE_EVERY_S
        file.save_when_due()  # returns although the disk does not, the first time as the second
        learn(file)
    assert disk.reached.wait(30)
    assert disk.num_calls == 1, "one at a time"
    assert not list(tmp_path.rglob("*.json")), "the file is replaced as a whole"
    disk.may_end.set()
    assert file.wait()
    (saved,) = tmp_path.rglob("*.json")
    assert LengthsFile(tmp_path, b"model").lengths._shared[ALL].num_seen <= 300, "what was known then"
    file.save()
    assert LengthsFile(tmp_path, b"model").lengths._shared[ALL].num_seen > 900
    assert list(saved.parent.iterdir()) == [saved]


def test_the_end_waits_for_what_is_being_written_and_not_for_ever(tmp_path: Path, monkeypatch, caplog):
    disk = SlowDisk(monkeypatch)
    file = LengthsFile(tmp_path, b"model")
    learn(file)
    disk.now_s += state.SAVE_EVERY_S
    file.save_when_due()
    monkeypatch.setattr(state, "SAVE_TIMEOUT_S", 0.01)
    file.save()
    assert caplog.messages == ["learned output lengths are not kept: the disk takes over 0.01 s"]
    disk.may_end.set()
    monkeypatch.setattr(state, "SAVE_TIMEOUT_S", 30.0)
    file.save()
    assert disk.num_calls == 2
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), ValueError("a bug")])
def test_a_save_that_fails_in_its_thread_is_one_line_in_the_log(failure, tmp_path: Path, monkeypatch, caplog):
    def fail(*_):
        raise failure

    file = LengthsFile(tmp_path, b"model")
    monkeypatch.setattr("scheduler.lengths.os.fsync", fail)
    monkeypatch.setattr(state, "SAVE_EVERY_S", 0.0)
    file.save_when_due()
    assert file.wait()
    assert caplog.messages == [f"learned output lengths are not kept: {failure}"]


def test_where_no_thread_can_start_steps_go_on(tmp_path: Path, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("can't start new thread")

    file = LengthsFile(tmp_path, b"model")
    monkeypatch.setattr(state, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(state.threading.Thread, "start", fail)
    file.save_when_due()
    assert caplog.messages == ["learned output lengths are not kept: can't start new thread"]
    file.save()
    assert list(tmp_path.rglob("*.json"))


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = LengthsFile(None, b"model")
    learn(file)
    file.save()
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("shared", [True, False])
def test_without_a_prefix_cache_nothing_is_found_that_another_process_left(shared, tmp_path: Path):
    """Private pages are told apart by numbers, which every process counts anew."""
    config = EngineConfig(disk_cache_path=str(tmp_path / "kv"))
    settings = replace(SETTINGS, num_pages=8, host_pages=4, disk_pages=8, prefix_cache=shared)
    storage = KVStorage(TINY, settings.num_pages, settings.page_size, torch.float32, CPU)
    _, copier, _ = _lower_tiers(config, settings, storage, b"model")
    assert copier is not None
    assert copier.disk is not None
    copier.disk.write(3, b"k" * 32, memoryview(bytes(storage.page_bytes)))
    copier.close()
    _, copier, index = _lower_tiers(config, settings, storage, b"model")
    assert copier is not None
    copier.close()
    assert index == ({b"k" * 32: 3} if shared else {})
