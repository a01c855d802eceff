"""A tokeniser whose ids are bytes, with two special ones: small enough to see through."""

from __future__ import annotations

from dataclasses import dataclass

BOS, EOS = 256, 257


@dataclass
class ByteTokenizer:
    vocab_size: int = 258
    add_bos: bool = False
    joins_bytes: bool = True

    def encode(self, text: str, *, special: bool) -> list[int]:
        return [*text.encode()]

    def encode_within(self, text: str) -> list[int]:
        return self.encode(text, special=False)

    def encode_prompt(self, text: str) -> list[int]:
        return [*([BOS] if self.add_bos else []), *text.encode()]

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        parts = [self.token_bytes(token) for token in ids if not (skip_special and self.is_special(token))]
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        return {BOS: b"<bos>", EOS: b"<eos>"}.get(token) or bytes([token])

    def is_special(self, token: int) -> bool:
        return token >= BOS
