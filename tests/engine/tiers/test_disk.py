"""The file of KV pages: survives restarts, belongs to one process and one model, and is never believed."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engine.tiers import DiskFile, DiskUnavailable, open_disk_file
from tests.engine.tiers.small import key_of

PAGE_BYTES = 1000
NUM_PAGES = 6


def opened(path: Path, identity: bytes = b"model", num_pages: int = NUM_PAGES) -> DiskFile:
    return DiskFile(path, identity, PAGE_BYTES, num_pages)


def payload(number: int) -> memoryview:
    return memoryview(random.Random(number).randbytes(PAGE_BYTES))


def read(file: DiskFile, page: int, key: bytes) -> bytes | None:
    into = bytearray(PAGE_BYTES)
    return bytes(into) if file.read(page, key, memoryview(into)) else None


def written(path: Path, count: int = 3) -> None:
    """A file of `count` pages, left by an earlier process."""
    file = opened(path)
    for page in range(count):
        file.write(page, key_of(page), payload(page))
    file.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "kv.cache"


def test_pages_survive_a_restart(path):
    written(path)
    file = opened(path)
    assert file.index() == {key_of(page): page for page in range(3)}
    assert all(read(file, page, key_of(page)) == bytes(payload(page)) for page in range(3))


def test_a_new_file_is_empty_private_and_bounded(path):
    file = opened(path)
    assert file.index() == {}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    size = path.stat().st_size
    for page in range(NUM_PAGES):
        file.write(page, key_of(page), payload(page))
    assert path.stat().st_size == size
    assert read(file, NUM_PAGES - 1, key_of(NUM_PAGES - 1)) == bytes(payload(NUM_PAGES - 1))


def test_a_file_that_others_may_read_is_made_private(path):
    written(path)
    path.chmod(0o644)
    opened(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_page_is_read_only_under_its_key(path):
    file = opened(path)
    file.write(2, key_of(1), payload(1))
    assert read(file, 2, key_of(2)) is None
    assert read(file, 3, key_of(1)) is None
    file.write(2, key_of(2), payload(2))
    assert read(file, 2, key_of(1)) is None
    assert read(file, 2, key_of(2)) == bytes(payload(2))
    assert file.index() == {key_of(2): 2}


def test_an_erased_page_is_gone(path):
    written(path)
    file = opened(path)
    file.erase(1)
    assert read(file, 1, key_of(1)) is None
    assert set(file.index()) == {key_of(0), key_of(2)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"identity": b"another model"}, "another model, dtype or shape"),
        ({"num_pages": 7}, "another number of pages"),
    ],
)
def test_another_identity_or_layout_starts_empty(path, caplog, change, reason):
    written(path)
    file = opened(path, **change)
    assert file.index() == {}
    assert reason in caplog.text
    assert all(read(file, page, key_of(page)) is None for page in range(3))


def test_a_damaged_header_starts_empty(path, caplog):
    written(path)
    raw = bytearray(path.read_bytes())
    raw[20] ^= 1
    path.write_bytes(raw)
    file = opened(path)
    assert file.index() == {}
    assert "its header is damaged" in caplog.text
    file.write(0, key_of(0), payload(0))
    file.close()
    assert opened(path).index() == {key_of(0): 0}


def test_a_file_whose_making_was_cut_off_starts_empty(path):
    path.parent.mkdir()
    path.write_bytes(bytes(5000))
    assert opened(path).index() == {}


def test_a_file_of_something_else_is_left_alone(path):
    path.parent.mkdir()
    path.write_text("dear diary")
    with pytest.raises(DiskUnavailable, match="not a file of KV pages"):
        opened(path)
    assert path.read_text() == "dear diary"


@pytest.mark.parametrize("seed", range(60))
def test_any_damage_is_a_miss_and_never_wrong_data(path, seed):
    """Flipped bits, holes, foreign blocks, a cut: each page is what was written, or missing."""
    chance = random.Random(seed)
    written(path, NUM_PAGES)
    raw = bytearray(path.read_bytes())
    begin = 4096  # a damaged header has its own test
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(begin, len(raw))
        length = min(chance.choice([1, 64, 512]), len(raw) - place)
        match chance.randrange(4):
            case 0:
                raw[place] ^= 1 << chance.randrange(8)
            case 1:
                raw[place : place + length] = bytes(length)
            case 2:
                other = chance.randrange(begin, len(raw) - length)
                raw[place : place + length] = raw[other : other + length]
            case 3:
                del raw[place:]
                break
    path.write_bytes(raw)
    file = opened(path)
    index = file.index()
    for number in range(NUM_PAGES):
        for page in {number, index.get(key_of(number), number)}:
            assert read(file, page, key_of(number)) in (None, bytes(payload(number)))


@pytest.mark.parametrize("cut", range(3))
def test_a_write_that_is_cut_off_leaves_a_miss(path, monkeypatch, cut):
    """The process dies in the k-th write: half of the page, all of it without its entry, half an entry."""
    written(path)
    file = opened(path)
    pwrite, calls = os.pwrite, 0

    def dying(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if cut == 0 or (cut == 2 and calls == 2):
            pwrite(descriptor, data[: len(data) // 2], offset)
            raise OSError(5, "died")
        if cut == 1 and calls == 2:
            raise OSError(5, "died")
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr("engine.tiers.disk.os.pwrite", dying)
        with pytest.raises(OSError, match="died"):
            file.write(1, key_of(9), payload(9))
    file.close()
    file = opened(path)
    assert read(file, 1, key_of(9)) is None
    assert read(file, 1, key_of(1)) is None
    assert read(file, 0, key_of(0)) == bytes(payload(0))


def test_short_writes_and_reads_are_completed(path, monkeypatch):
    file = opened(path)
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(
        "engine.tiers.disk.os.pwrite", lambda fd, data, offset: pwrite(fd, data[:300], offset)
    )
    monkeypatch.setattr(
        "engine.tiers.disk.os.preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:300]], offset)
    )
    file.write(1, key_of(1), payload(1))
    assert read(file, 1, key_of(1)) == bytes(payload(1))


def test_an_error_of_the_disk_while_reading_is_a_miss(path, monkeypatch):
    written(path)
    file = opened(path)

    def failing(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("engine.tiers.disk.os.preadv", failing)
    assert read(file, 0, key_of(0)) is None


def test_a_thousand_damaged_pages_are_one_line_in_the_log(path, caplog):
    file = opened(path)
    file.write(0, key_of(0), payload(0))
    for _ in range(1000):
        assert read(file, 0, key_of(1)) is None
        assert read(file, 0, key_of(0)) is not None
    assert caplog.text.count("is damaged") == 1


def test_a_second_process_goes_on_without_the_file(path, caplog):
    written(path)
    first = opened(path)
    second = (
        "import sys; from pathlib import Path; from engine.tiers.disk import open_disk_file; "
        "import logging; logging.basicConfig(); "
        f"sys.exit(open_disk_file(Path(sys.argv[1]), b'model', {PAGE_BYTES}, {NUM_PAGES}) is not None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", second, str(path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "in use by another process" in done.stderr
    assert read(first, 0, key_of(0)) == bytes(payload(0))
    first.close()
    assert opened(path).index()


def test_no_process_that_we_start_inherits_the_lock(path):
    file = opened(path)
    assert not os.get_inheritable(file._fd)


def test_what_cannot_be_a_file_is_a_reason_not_a_crash(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "below", Path("/dev/null")):
        assert open_disk_file(path, b"model", PAGE_BYTES, NUM_PAGES) is None
    assert caplog.text.count("no KV pages on disk") == 3
