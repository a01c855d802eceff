"""Content keys of pages: equal keys mean equal KV.

A key covers everything that the KV of a page depends on: its own tokens, all tokens before them
(through the parent's key), the visibility rule under which they were computed, and the salt that
separates those who must not share.
"""

from __future__ import annotations

import struct
from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.types import Visibility

_DIGEST_BYTES = 32
_SHARED = 0


def root_key(rule: Visibility, cache_salt: str, private_to: int | None = None) -> bytes:
    """The parent of first pages. With `private_to`, only holders of the same number share."""
    owner = _SHARED if private_to is None else private_to + 1
    header = struct.pack("<BQ", rule, owner)
    return blake2b(header + cache_salt.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).digest()


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page of `tokens` that follows the page (or root) `parent`."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=_DIGEST_BYTES).digest()


def group_key(key: bytes, group: int) -> bytes:
    """The key of a page with the same tokens in another group of layers; that of group 0 is `key`."""
    return blake2b(key + group.to_bytes(4, "little"), digest_size=_DIGEST_BYTES).digest()
