"""GGUF headers: what the reference reads we read, and no broken or hostile file does any harm."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.weights.errors import CheckpointError
from engine.weights.gguf import read_gguf
from tests.engine.weights import gguf_bytes as make

SMALL = make.gguf(make.TINY_METADATA, {"a": ((2, 32), 3, bytes(40)), "b": ((4,), 0, bytes(16))})


def test_reads_what_the_reference_reads(smollm2_gguf: Path) -> None:
    file = read_gguf(smollm2_gguf)
    reference = gguf.GGUFReader(smollm2_gguf)
    assert len(reference.tensors) == len(file.tensors)
    for tensor in reference.tensors:
        info = file.tensors[tensor.name]
        assert info.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (info.type.name, info.offset, info.num_bytes) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
    fields = {key: field for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert set(fields) == set(file.metadata)
    for key, field in fields.items():
        contents = field.contents()
        assert file.metadata[key] == (tuple(contents) if isinstance(contents, list) else contents)


def test_the_default_header_is_read_fast(smollm2_gguf: Path) -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        read_gguf(smollm2_gguf)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3  # 0.035 s on an idle machine; the reference takes 2 s


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions(tmp_path: Path, version: int) -> None:
    file = read_gguf(write(tmp_path, make.gguf(make.TINY_METADATA, {}, version)))
    assert file.metadata["tokenizer.ggml.tokens"] == ("a", "b", "ab", "<end>")
    assert file.metadata["tokenizer.ggml.token_type"] == (1, 1, 1, 3)


def write(folder: Path, raw: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(raw)
    return path


def refusal(folder: Path, raw: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_gguf(write(folder, raw))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for length in range(len(SMALL) - 16):  # the last tensor has 16 bytes of padding behind it
        refusal(tmp_path, SMALL[:length])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, len(SMALL) - 1),
    raw=st.one_of(
        st.binary(min_size=1, max_size=12),
        st.sampled_from([struct.pack("<Q", n) for n in (2**64 - 1, 2**63, 2**40, 2**32, len(SMALL))]),
    ),
)
def test_a_changed_header_is_read_or_refused_in_one_line(tmp_path: Path, at: int, raw: bytes) -> None:
    path = write(tmp_path, SMALL[:at] + raw + SMALL[at + len(raw) :])
    try:
        file = read_gguf(path)
    except CheckpointError:
        refusal(tmp_path, path.read_bytes())
        return
    for info in file.tensors.values():
        assert 0 <= info.offset <= info.offset + info.num_bytes <= file.size_bytes


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "version"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "bytes"),
        (make.gguf({"x": [1, 2]}, {}).replace(struct.pack("<IQ", 4, 2), struct.pack("<IQ", 4, 2**62)), "'x'"),
        (make.gguf({"x": [1, 2]}, {}).replace(struct.pack("<II", 9, 4), struct.pack("<II", 9, 9)), "arrays"),
        (make.gguf({"general.alignment": 33}, {}), "general.alignment"),
        (make.gguf({}, {"w": ((3, 31), 3, bytes(60))}), "'w'"),
        (make.gguf({}, {"w": ((4,), 99, bytes(16))}), "unknown type 99"),
        (make.gguf({}, {"w": ((2**40, 32), 3, bytes(20))}), "truncated"),
        (make.gguf({}, {"w\n": ((4,), 0, bytes(16))}), "unprintable"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, raw: bytes, said: str) -> None:
    assert said in refusal(tmp_path, raw)


def test_a_key_or_tensor_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    raw = make.gguf({"aa": 1, "ab": 2}, {}).replace(make.text("ab"), make.text("aa"))
    assert "'aa' occurs twice" in refusal(tmp_path, raw)
    raw = make.gguf({}, {"aa": ((4,), 0, bytes(16)), "ab": ((4,), 0, bytes(16))})
    assert "'aa' occurs twice" in refusal(tmp_path, raw.replace(make.text("ab"), make.text("aa")))


def test_tensors_within_each_other_are_refused(tmp_path: Path) -> None:
    raw = make.gguf({}, {"aa": ((16,), 0, bytes(64)), "ab": ((4,), 0, bytes(16))})
    second = struct.pack("<IQIQ", 1, 4, 0, 64)
    assert second in raw
    said = refusal(tmp_path, raw.replace(second, struct.pack("<IQIQ", 1, 4, 0, 32)))
    assert "'ab' begins at byte" in said
    assert "within 'aa'" in said


def test_a_header_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Each byte of an array becomes an object: an array of gigabytes would take the machine's memory."""
    count = 2**27
    for kind, length in ((0, count), (8, count // 8)):
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + make.text("x") + struct.pack("<IIQ", 9, kind, length)
        path = write(tmp_path, head)
        os.truncate(path, 2 * count)
        with pytest.raises(CheckpointError, match="'x' goes beyond byte 134217728, before which"):
            read_gguf(path)


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    assert "one of 3 parts of a model" in refusal(tmp_path, make.gguf({"split.count": 3}, {}))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_gguf(tmp_path / "none.gguf")
