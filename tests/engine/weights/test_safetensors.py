"""Headers of safetensors files: what is sound is read, what is broken is named in one line."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.weights.errors import CheckpointError
from engine.weights.folder_source import folder_source
from engine.weights.safetensors import INDEX, StoredTensor, read_folder, read_integers, read_safetensors
from tests.engine.weights.stored import read_one

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.randn(5).bfloat16(),
    "c": torch.randn(3, 1, 2).half(),
    "d": torch.tensor(2.5, dtype=torch.float64),
    "e": torch.empty(0, 4),
}


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    assert set(read_safetensors(tmp_path / "model.safetensors")) == set(TENSORS)
    source = folder_source(tmp_path)
    for name, tensor in TENSORS.items():
        assert torch.equal(read_one(source, name, torch.float32), tensor.float()), name


def test_a_file_larger_than_all_memory_is_read(tmp_path: Path) -> None:
    """Experts of a large model that go to a GPU one by one; here a hole in the file."""
    huge = 2**42
    header = {"a": entry("F32", [2], 0, 8), "b": entry("U8", [huge], 8, 8 + huge)}
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(raw(header, struct.pack("<2f", 1.5, -2)))
        file.truncate(file.tell() + huge)
    (tmp_path / "config.json").write_text("{}")
    assert read_one(folder_source(tmp_path), "a", torch.float32).tolist() == [1.5, -2]


def test_files_that_fail_or_shrink_after_their_header_was_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "n": torch.tensor([3, 4])}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = folder_source(tmp_path)
    source.recipe("a")
    numbers = read_folder(tmp_path)["n"]
    assert read_integers(numbers) == (3, 4)
    os.truncate(tmp_path / "model.safetensors", numbers.offset)
    with pytest.raises(CheckpointError, match="'n' is cut off"):
        read_integers(numbers)
    os.truncate(tmp_path / "model.safetensors", 8)
    with pytest.raises(CheckpointError, match=r"'a' ends at byte .* the file has 8 bytes now"), source:
        pass
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        read_integers(numbers)
    with pytest.raises(CheckpointError, match="No such file"), source:
        pass


def test_data_at_odd_offsets(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}
    (tmp_path / "model.safetensors").write_bytes(raw(header, b"x" + struct.pack("<2f", 1.5, -2)))
    (tmp_path / "config.json").write_text("{}")
    assert read_one(folder_source(tmp_path), "b", torch.float32).tolist() == [1.5, -2]


def refusal(folder: Path, content: bytes | None = None) -> str:
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated"),
        (b"\x80\x04\x95pickle-or-what", "truncated, or no safetensors"),
        (struct.pack("<Q", 2**63) + b"{}", "truncated, or no safetensors"),
        (raw(b"[" * 100_000), "not JSON"),
        (raw(b"{\xff}"), "not JSON"),
        (raw([]), "not a JSON object"),
        (raw({"a": 1}), "'a' is described by '1'"),
        (raw({"a": {}}), "unknown type 'None'"),
        (raw({"a": entry("F128", [1], 0, 16)}, bytes(16)), "unknown type 'F128'"),
        (raw({"a": entry("F32", [-1], 0, 4)}, bytes(4)), "the shape [-1]"),
        (raw({"a": entry("F32", [True], 0, 4)}, bytes(4)), "the shape [True]"),
        (raw({"a": entry("F32", [1.0], 0, 4)}, bytes(4)), "the shape [1.0]"),
        (raw({"a": entry("F32", [1] * 9, 0, 4)}, bytes(4)), "the shape"),
        (raw({"a": entry("F32", [2**62, 2**62], 0, 4)}, bytes(4)), "which is not F32"),
        (raw({"a": entry("F32", [2], 0, 4)}, bytes(4)), "has 4 bytes, which is not F32 [2]"),
        (raw({"a": entry("F32", [1], 4, 0)}, bytes(4)), "lies at 4..0"),
        (raw({"a": entry("F32", [1], 0, 4)}, bytes(3)), "lies at 0..4 of 3 bytes (truncated?)"),
        (raw({"a": {**entry("F32", [1], 0, 4), "data_offsets": [0]}}, bytes(4)), "the offsets [0]"),
        (raw({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, bytes(4)), "begins at byte"),
        (raw({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)), "begins at byte"),
        (raw({"a": entry("F32", [1], 4, 8)}, bytes(8)), "begins at byte"),
        (raw({"a": entry("F32", [1], 0, 4)}, bytes(8)), "the tensors end at byte"),
        (raw({"a\n": entry("F32", [1], 0, 4)}, bytes(4)), "has the name"),
        (raw({"a": {"dtype": "F32", "shape": "1\n\x1b[2J"}}), r"the shape 1\n\x1b[2J"),
        (raw({"a" * 2000: entry("F32", [1], 0, 4)}, bytes(4)), "has the name"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refusal(tmp_path, content)


def test_indices(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "two.safetensors")

    def index(weight_map: Any) -> None:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    index({"a": "one.safetensors", "b": "two.safetensors"})
    assert {name: stored.file.name for name, stored in read_folder(tmp_path).items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }
    index({"a": "one.safetensors", "b": "one.safetensors"})
    assert "'b' is missing" in refusal(tmp_path)
    save_file({"a": torch.ones(2), "unlisted": torch.ones(2)}, tmp_path / "one.safetensors")
    index({"a": "one.safetensors", "b": "two.safetensors"})
    assert read_folder(tmp_path).keys() == {"a", "b", "unlisted"}
    for file in (
        "../one.safetensors",
        "/etc/one.safetensors",
        "x\\one.safetensors",
        ".hidden.safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "one.bin",
        7,
        None,
    ):
        index({"a": file})
        assert "weight_map places 'a'" in refusal(tmp_path)
    index({"a\n": "one.safetensors"})
    assert "weight_map places 'a\\n'" in refusal(tmp_path)
    index({"a": "gone.safetensors"})
    assert "gone.safetensors: No such file" in refusal(tmp_path)
    index([])
    assert "lacks the object weight_map" in refusal(tmp_path)


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "neither model.safetensors nor" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pytorch_model.bin is pickled, which could run code" in refusal(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "gptq_model-4bit.safetensors")
    assert set(read_folder(tmp_path)) == {"a"}
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    assert "2 safetensors files (gptq_model-4bit.safetensors, other.safetensors)" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "pipe.safetensors"}}))
    assert "not a regular file" in refusal(tmp_path)


def check_read_or_refused(path: Path) -> None:
    try:
        found: dict[str, StoredTensor] | str = read_safetensors(path)
    except CheckpointError as error:
        found = str(error)
    if isinstance(found, str):
        assert "\n" not in found
        return
    for tensor in found.values():
        assert 0 <= tensor.offset <= tensor.offset + tensor.num_bytes <= path.stat().st_size


SMALL = raw({"a": entry("F32", [2, 2], 0, 16), "b": entry("BF16", [3], 16, 22)}, bytes(22))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(SMALL) - 1), change=st.binary(min_size=1, max_size=12))
def test_a_changed_header_is_read_or_refused(tmp_path: Path, at: int, change: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SMALL[:at] + change + SMALL[at + len(change) :])
    check_read_or_refused(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for length in range(len(SMALL)):
        refusal(tmp_path, SMALL[:length])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=JSON | st.sampled_from(["F32", "I8"]),
    shape=JSON | st.lists(st.integers(0, 4), max_size=3),
    offsets=JSON | st.lists(st.integers(0, 16), min_size=2, max_size=2),
)
def test_any_json_is_read_or_refused(tmp_path: Path, dtype: Any, shape: Any, offsets: Any) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, bytes(16)))
    check_read_or_refused(path)
