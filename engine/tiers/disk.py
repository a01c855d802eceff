"""KV pages in one bounded file that outlives the process: content-addressed, checksummed, never trusted.

    header   4096 bytes   magic, version, page_bytes, num_pages, identity; its own checksum
    table    num_pages entries of 64 bytes: magic, length, key, checksum of key and payload; its own CRC
    pages    num_pages times page_bytes

The entries lie together, so that a start reads them in one go; numbers are little-endian. A page is written
before its entry: a crash in between leaves an entry whose checksum does not fit, which is a miss. Nothing
is ever synced: what the system lost in a power cut does not fit its checksum either.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import stat
import struct
import zlib
from typing import TYPE_CHECKING, Final

from engine.tiers.rare_warnings import RareWarnings

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger("octavo.engine")

KEY_BYTES: Final = 32
_MAGIC: Final = b"OCTAVOKV"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIIQ32s")  # magic, version, page_bytes, num_pages, identity
_HEADER_BYTES: Final = 4096
_ENTRY_MAGIC: Final = b"PAGE"
_ENTRY: Final = struct.Struct("<4sI32s20s")  # magic, length, key, checksum
_ENTRY_BYTES: Final = 64  # an entry and its CRC-32
_TABLE_CHUNK_BYTES: Final = 1 << 20


class DiskUnavailable(Exception):
    """The file cannot be used: the reason in one line. The engine goes on without it."""


class DiskFile:
    """`num_pages` places for pages of `page_bytes`, held by this process alone until `close`.

    `identity` covers all that the bytes of a page depend on beside its key: the model, the dtype, the
    shape. A file of another identity or layout, or with a damaged header, starts empty; a file that is not
    of this kind is left alone. Raises DiskUnavailable. `read`, `write` and `erase` are for one thread.
    """

    def __init__(self, path: Path, identity: bytes, page_bytes: int, num_pages: int) -> None:
        self.path = path
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        self._pages_offset = _round_up(_HEADER_BYTES + num_pages * _ENTRY_BYTES)
        self._header = _sealed_header(identity, page_bytes, num_pages)
        self._warnings = RareWarnings()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise DiskUnavailable(f"{path}: {error.strerror}") from error
        try:
            self._prepare()
        except OSError as error:
            self.close()
            raise DiskUnavailable(f"{path}: {error.strerror}") from error
        except DiskUnavailable:
            self.close()
            raise

    def index(self) -> dict[bytes, int]:
        """Key -> page of every entry that is whole. The pages themselves are verified when they are read.
        Raises OSError."""
        found: dict[bytes, int] = {}
        per_chunk = _TABLE_CHUNK_BYTES // _ENTRY_BYTES
        for first in range(0, self.num_pages, per_chunk):
            count = min(per_chunk, self.num_pages - first)
            chunk = os.pread(self._fd, count * _ENTRY_BYTES, self._entry_offset(first))
            for number in range(len(chunk) // _ENTRY_BYTES):
                entry = chunk[number * _ENTRY_BYTES : (number + 1) * _ENTRY_BYTES]
                if entry.startswith(_ENTRY_MAGIC) and (parts := self._parse(entry)) is not None:
                    found.setdefault(parts[0], first + number)
        return found

    def write(self, page: int, key: bytes, payload: memoryview) -> None:
        """Replace what the page holds. Raises OSError, say when the disk is full: the page is then a miss."""
        assert len(key) == KEY_BYTES
        assert payload.nbytes == self.page_bytes
        entry = _ENTRY.pack(_ENTRY_MAGIC, self.page_bytes, key, _checksum(key, payload))
        self._write_all(payload, self._page_offset(page))
        self._write_all(memoryview(_with_crc(entry)), self._entry_offset(page))

    def read(self, page: int, key: bytes, into: memoryview) -> bool:
        """Whether `into` now holds the content of `key`. If not, it may hold anything."""
        try:
            parts = self._parse(os.pread(self._fd, _ENTRY_BYTES, self._entry_offset(page)))
            whole = self._read_all(into, self._page_offset(page))
        except OSError as error:
            self._warnings.warn("error", "%s: page %d cannot be read: %s", self.path, page, error.strerror)
            return False
        if whole and parts == (key, _checksum(key, into)):
            return True
        self._warnings.warn(
            "damage", "%s: page %d is damaged or another one; it counts as missing", self.path, page
        )
        return False

    def erase(self, page: int) -> None:
        """Forget what the page holds. Raises OSError."""
        self._write_all(memoryview(bytes(_ENTRY_BYTES)), self._entry_offset(page))

    def close(self) -> None:
        """Also gives the file free for other processes. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _prepare(self) -> None:
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise DiskUnavailable(f"{self.path} is not a file")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DiskUnavailable(f"{self.path} is in use by another process") from error
        found = os.pread(self._fd, len(self._header), 0)
        # A crash while the file was made may leave zeros.
        if not found.startswith(_MAGIC) and found.strip(b"\0"):
            raise DiskUnavailable(f"{self.path} is not a file of KV pages; name another one")
        os.fchmod(self._fd, 0o600)
        if found != self._header:
            if found.startswith(_MAGIC):
                logger.warning("%s starts empty: %s", self.path, self._difference(found))
            os.ftruncate(self._fd, 0)
            self._write_all(memoryview(self._header), 0)
        # Sparse: blocks are taken as pages are written.
        os.ftruncate(self._fd, self._pages_offset + self.num_pages * self.page_bytes)

    def _difference(self, found: bytes) -> str:
        if len(found) < len(self._header) or found != _with_crc(found[: _HEADER.size]):
            return "its header is damaged"
        mine, other = _HEADER.unpack_from(self._header), _HEADER.unpack_from(found)
        names = ("kind", "version", "bytes of a page", "number of pages", "model, dtype or shape")
        changed = [name for name, here, there in zip(names, mine, other, strict=True) if here != there]
        return f"it was written under another {' and another '.join(changed)}"

    def _parse(self, entry: bytes) -> tuple[bytes, bytes] | None:
        """(key, checksum), if the entry is whole."""
        if entry != _with_crc(entry[: _ENTRY.size]):
            return None
        magic, length, key, checksum = _ENTRY.unpack_from(entry)
        return (key, checksum) if magic == _ENTRY_MAGIC and length == self.page_bytes else None

    def _entry_offset(self, page: int) -> int:
        assert 0 <= page < self.num_pages
        return _HEADER_BYTES + page * _ENTRY_BYTES

    def _page_offset(self, page: int) -> int:
        return self._pages_offset + page * self.page_bytes

    def _write_all(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._fd, data, offset)
            if not count:
                raise OSError(errno.EIO, "nothing was written")
            data, offset = data[count:], offset + count

    def _read_all(self, into: memoryview, offset: int) -> bool:
        while into:
            count = os.preadv(self._fd, [into], offset)
            if not count:
                return False  # the file was cut
            into, offset = into[count:], offset + count
        return True


def open_disk_file(path: Path, identity: bytes, page_bytes: int, num_pages: int) -> DiskFile | None:
    """The file, or None and a line in the log: a cache that cannot be had is no reason not to serve."""
    try:
        return DiskFile(path, identity, page_bytes, num_pages)
    except DiskUnavailable as reason:
        logger.warning("no KV pages on disk: %s", reason)
        return None


def _sealed_header(identity: bytes, page_bytes: int, num_pages: int) -> bytes:
    digest = hashlib.blake2b(identity, digest_size=32).digest()
    return _with_crc(_HEADER.pack(_MAGIC, _VERSION, page_bytes, num_pages, digest))


def _with_crc(data: bytes) -> bytes:
    return data + struct.pack("<I", zlib.crc32(data))


def _checksum(key: bytes, payload: memoryview) -> bytes:
    """SHA-256, cut: where processors have instructions for it, it costs hardly more than a CRC, and no
    damaged page passes by chance."""
    digest = hashlib.sha256(key)
    digest.update(payload)
    return digest.digest()[:20]


def _round_up(offset: int) -> int:
    return -(-offset // _HEADER_BYTES) * _HEADER_BYTES
