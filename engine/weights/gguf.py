"""The header of a GGUF file (versions 2 and 3): metadata, and where each tensor lies. No torch.

The file is not trusted. Every count and length is checked against the bytes that are left in the file and in
the largest header allowed, before anything is allocated: a hostile one costs a small multiple of that.
Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

Scalar = int | float | bool | str
Value = Scalar | tuple[int, ...] | tuple[float, ...] | tuple[bool, ...] | tuple[str, ...]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 1024
_MAX_HEADER_BYTES = 2**27  # the largest vocabularies take a tenth
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class BlockType:
    """How weights are stored: `block_size` of them in `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


BLOCK_TYPES = {
    code: BlockType(name, block_size, block_bytes)
    for code, name, block_size, block_bytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 40),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
    )
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]  # torch order: rows first
    type: BlockType
    offset: int  # bytes from the start of the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    size_bytes: int


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of `path`. Raises CheckpointError for anything that is not sound GGUF."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                raise CheckpointError(f"{path}: the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).read()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


class _Reader:
    """A cursor over the header. `where` names what is being read, for the error."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path = path
        self.data = data
        self.size = size
        self.pos = 0
        self.where = "header"

    def read(self) -> GGUFFile:
        num_tensors, num_values = self._preamble()
        metadata: dict[str, Value] = {}
        for _ in range(num_values):
            self.where = f"metadata entry {len(metadata)}"
            key = self._name()
            self.where = f"metadata '{key}'"
            if key in metadata:
                self._fail("occurs twice")
            metadata[key] = self._value(self._scalar("I"))
        if metadata.get("split.count", 1) not in (0, 1):
            raise CheckpointError(
                f"{self.path}: one of {str(metadata['split.count'])[:20]} parts of a model, which is not "
                f"supported: merge them with llama-gguf-split --merge"
            )
        alignment = self._alignment(metadata)
        infos = [self._tensor(index) for index in range(num_tensors)]
        start = -(-self.pos // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise CheckpointError(f"{self.path}: tensor '{name}' occurs twice")
            tensors[name] = self._placed(name, shape, kind, start, offset, alignment)
        self._check_apart(tensors)
        return GGUFFile(self.path, metadata, tensors, self.size)

    def _preamble(self) -> tuple[int, int]:
        if self._take(4) != _MAGIC:
            self._fail("does not begin with GGUF; this is not a GGUF file")
        version = int(self._scalar("I"))
        if version not in _VERSIONS:
            self._fail(f"has GGUF version {version}; supported are 2 and 3, little-endian")
        num_tensors = self._count(24)  # a tensor: name length, dimensions, one size, type, offset
        num_values = self._count(13)  # a value: key length, type, one byte
        return num_tensors, num_values

    def _alignment(self, metadata: dict[str, Value]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        self.where = "metadata 'general.alignment'"
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            self._fail(f"is {str(alignment)[:40]}; a power of two is needed")
        return alignment

    def _tensor(self, index: int) -> tuple[str, tuple[int, ...], BlockType, int]:
        self.where = f"tensor {index}"
        name = self._name()
        self.where = f"tensor '{name}'"
        num_dimensions = int(self._scalar("I"))
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            self._fail(f"has {num_dimensions} dimensions; supported are 1 to {_MAX_DIMENSIONS}")
        sizes = struct.unpack(f"<{num_dimensions}Q", self._take(8 * num_dimensions))
        code, offset = int(self._scalar("I")), int(self._scalar("Q"))
        if code not in BLOCK_TYPES:
            self._fail(f"has the unknown type {code}")
        return name, tuple(reversed(sizes)), BLOCK_TYPES[code], offset

    def _placed(
        self, name: str, shape: tuple[int, ...], kind: BlockType, start: int, offset: int, alignment: int
    ) -> TensorInfo:
        self.where = f"tensor '{name}'"
        if 0 in shape or shape[-1] % kind.block_size:
            self._fail(f"has shape {list(shape)}, which {kind.name} cannot store")
        num_blocks = shape[-1] // kind.block_size
        for rows in shape[:-1]:
            num_blocks *= rows
        num_bytes = num_blocks * kind.block_bytes
        if offset % alignment:
            self._fail(f"lies at offset {offset}, not a multiple of {alignment}")
        if start + offset + num_bytes > self.size:
            self._fail(
                f"ends at byte {start + offset + num_bytes}, but the file has {self.size} bytes (truncated?)"
            )
        return TensorInfo(name, shape, kind, start + offset, num_bytes)

    def _check_apart(self, tensors: dict[str, TensorInfo]) -> None:
        end, last = 0, ""
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                raise CheckpointError(
                    f"{self.path}: tensor '{info.name}' begins at byte {info.offset}, within '{last}', which "
                    f"ends at {end}"
                )
            end, last = info.offset + info.num_bytes, info.name

    def _value(self, kind: Scalar) -> Value:
        if kind == _STRING:
            return self._text(self._take(self._count(1)))
        if kind == _ARRAY:
            return self._array(int(self._scalar("I")))
        return self._scalar(self._format(int(kind)))

    def _array(self, kind: int) -> Value:
        if kind == _STRING:
            return self._strings(self._count(8))
        if kind == _ARRAY:
            self._fail("is an array of arrays, which is not supported")
        code = self._format(kind)
        width = struct.calcsize("<" + code)
        count = self._count(width)
        return struct.unpack(f"<{count}{code}", self._take(count * width))

    def _strings(self, count: int) -> tuple[str, ...]:
        """The hot loop: a vocabulary and its merges are 100,000 of these."""
        data, pos = self.data, self.pos
        limit = min(self.size, _MAX_HEADER_BYTES)
        read_length = partial(_U64.unpack_from, data)
        strings: list[str] = []
        append = strings.append
        try:
            for _ in range(count):
                (length,) = read_length(pos)
                pos += 8
                end = pos + length
                if end > limit:
                    self.pos = pos
                    self._require(length)
                append(data[pos:end].decode())
                pos = end
        except struct.error:
            self._fail("is cut off by the end of the file")
        except UnicodeDecodeError:
            self._fail("is not UTF-8")
        self.pos = pos
        return tuple(strings)

    def _name(self) -> str:
        length = self._count(1)
        if length > _MAX_NAME_BYTES:
            self._fail(f"has a name of {length} bytes; the limit is {_MAX_NAME_BYTES}")
        name = self._text(self._take(length))
        return name if name.isprintable() else self._fail("has an unprintable name")

    def _format(self, kind: int) -> str:
        return _SCALAR_FORMATS.get(kind) or self._fail(f"has the unknown value type {kind}")

    def _scalar(self, code: str) -> int | float | bool:
        (value,) = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))
        return value  # type: ignore[no-any-return]

    def _count(self, item_bytes: int) -> int:
        """A count of items that take at least `item_bytes` each, which must be there."""
        count = int(self._scalar("Q"))
        self._require(count * item_bytes)
        return count

    def _take(self, length: int) -> bytes:
        self._require(length)
        self.pos += length
        return self.data[self.pos - length : self.pos]

    def _text(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._fail("is not UTF-8")

    def _require(self, length: int) -> None:
        if length > self.size - self.pos:
            self._fail(f"needs {length} bytes, but {self.size - self.pos} are left in the file")
        if self.pos + length > _MAX_HEADER_BYTES:
            self._fail(f"goes beyond byte {_MAX_HEADER_BYTES}, before which the header must end")

    def _fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {self.where} {problem}")
