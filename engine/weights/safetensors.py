"""The headers of a folder's *.safetensors files: which tensors there are, and where each lies. No torch.

The files are not trusted: every number is checked against the file's size before anything is read for it.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import logging
import stat
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

from engine.weights.errors import CheckpointError
from engine.weights.json_files import MAX_JSON_BYTES, read_json_object

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger("octavo.engine")

Shape = tuple[int, ...]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
_BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32}
_BITS |= {"F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}
_MAX_DIMENSIONS = 8
_MAX_NAME_CHARS = 1024
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, and as what."""

    file: Path
    name: str
    dtype: str  # as safetensors calls it: BF16, I32, F8_E4M3, ...
    shape: Shape
    offset: int  # bytes from the start of the file
    num_bytes: int


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Name -> tensor, of one file or of all that the index names, listed there or not. Raises
    CheckpointError."""
    file_of, note = _placed(folder)
    if note:
        logger.warning("%s; %s is read as it is", note, SINGLE)
    if file_of is None:
        return read_safetensors(_single(folder))
    files = {file: read_safetensors(folder / file) for file in sorted(set(file_of.values()))}
    for name, file in file_of.items():
        if name not in files[file]:
            raise CheckpointError(f"{folder / file}: tensor '{name}' is missing, which {INDEX} places there")
    every = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    return every | {name: files[file][name] for name, file in file_of.items()}


def weight_files(folder: Path) -> list[Path]:
    """The files that `read_folder` would read; beside them a folder may hold the weights in other forms.
    Raises CheckpointError for an index that is none."""
    file_of, _ = _placed(folder)
    if file_of is not None:
        return [folder / file for file in sorted(set(file_of.values()))]
    return [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor. Raises CheckpointError for anything that is not a sound safetensors file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start, header = _header(path, file.read(8), size)
            text = file.read(header)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    return _tensors(path, _parsed(path, text), start, size)


def read_integers(stored: StoredTensor) -> tuple[int, ...]:
    """The numbers of a small tensor of I32 or I64. Raises CheckpointError when the file has changed."""
    try:
        with stored.file.open("rb") as file:
            file.seek(stored.offset)
            raw = file.read(stored.num_bytes)
    except OSError as error:
        raise CheckpointError(f"{stored.file}: {error.strerror or error}") from error
    if len(raw) != stored.num_bytes:
        raise CheckpointError(f"{stored.file}: tensor '{stored.name}' is cut off")
    return struct.unpack(f"<{prod(stored.shape)}{'i' if stored.dtype == 'I32' else 'q'}", raw)


def _header(path: Path, raw: bytes, size: int) -> tuple[int, int]:
    """-> where the tensors begin, and how many bytes of JSON lie before that."""
    if len(raw) < 8:
        raise CheckpointError(f"{path}: {size} bytes are no safetensors file (truncated?)")
    (length,) = struct.unpack("<Q", raw)
    if length > size - 8:
        raise CheckpointError(
            f"{path}: a header of {length} bytes in a file of {size} (truncated, or no safetensors)"
        )
    if length > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: a header of {length} bytes, more than the {MAX_JSON_BYTES} allowed")
    return 8 + length, length


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _tensors(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, StoredTensor]:
    tensors = {name: _tensor(path, name, entry, start, size) for name, entry in header.items()}
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: tensor '{tensor.name}' begins at byte {tensor.offset}, the one before ends at {end}"
            )
        end += tensor.num_bytes
    if end != size:
        raise CheckpointError(f"{path}: the tensors end at byte {end}, but the file has {size} bytes")
    return tensors


def _tensor(path: Path, name: str, entry: object, start: int, size: int) -> StoredTensor:
    if len(name) > _MAX_NAME_CHARS or not name.isprintable():
        raise CheckpointError(f"{path}: a tensor has the name {name[:80]!r}")
    where = f"{path}: tensor '{name}'"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is described by {str(entry)[:80]!r}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where} has the unknown type {str(dtype)[:80]!r}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{where} has the shape {str(shape)[:80]}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has the offsets {str(offsets)[:80]}")
    begin, end = offsets
    if not begin <= end <= size - start:
        raise CheckpointError(f"{where} lies at {begin}..{end} of {size - start} bytes (truncated?)")
    if (end - begin) * 8 != prod(shape) * _BITS[dtype]:
        raise CheckpointError(f"{where} has {end - begin} bytes, which is not {dtype} {shape}")
    return StoredTensor(path, name, dtype, tuple(shape), start + begin, end - begin)


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _single(folder: Path) -> Path:
    """The only file of weights, whatever it is called."""
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found[:4])
        raise CheckpointError(f"{folder}: {len(found)} safetensors files ({names}) and no {INDEX}")
    pickled = [path.name for pattern in _PICKLED for path in sorted(folder.glob(pattern))]
    if pickled:
        raise CheckpointError(
            f"{folder}: {pickled[0]} is pickled, which could run code and is never opened: convert it to "
            f"safetensors"
        )
    raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there")


def _placed(folder: Path) -> tuple[dict[str, str] | None, str]:
    """Tensor name -> file name by the index; None where one file has everything, and what to say of that.
    An index that was left beside such a file, and is none or names files that are gone, does not count."""
    if not (folder / INDEX).is_file():
        return None, ""
    whole = (folder / SINGLE).is_file()
    try:
        file_of = _from_index(folder / INDEX)
    except CheckpointError as error:
        if not whole:
            raise
        return None, str(error)
    gone = next((file for file in file_of.values() if not (folder / file).is_file()), None)
    if whole and gone is not None:
        return None, f"{folder / INDEX} names {gone}, which is not there"
    # Of this one file the index can say nothing but what is outdated.
    return None if whole and set(file_of.values()) <= {SINGLE} else file_of, ""


def _from_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, which must lie in the same folder."""
    files = read_json_object(path).get("weight_map")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: lacks the object weight_map")
    for name, file in files.items():
        plain = isinstance(file, str) and file.isprintable() and not set(file) & {"/", "\\"}
        if not plain or not name.isprintable() or not file.endswith(".safetensors") or file.startswith("."):
            raise CheckpointError(f"{path}: weight_map places {name[:80]!r} in {str(file)[:80]!r}")
    return files
