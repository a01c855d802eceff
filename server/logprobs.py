"""Log-probabilities in OpenAI's two shapes and in vLLM's for prompts.

How a token is named: by its text; where its bytes are no whole UTF-8, as OpenAI writes them, with \\x for
every byte that is not printable ASCII, and "bytes:" before it in completions; or, where the client asks
for it, as token_id:N. In completions, where names are keys, the chosen token has its name and of others
with equal names the likeliest; the rest are token_id:N.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.wire.responses import ChatLogprobs, LegacyLogprobs, PromptLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from engine.messages import TokenLogprobs
    from server.streams import Piece
    from server.tokenizer import Tokenizer

FLOOR = -9999.0  # JSON has no infinity
BYTES_PREFIX = "bytes:"


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The token by itself; part of a character shows as a replacement character."""
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def token_name(tokenizer: Tokenizer, token: int, *, prefix: str = "", as_id: bool = False) -> str:
    """What the log-probabilities call a token; `prefix` goes before bytes that are no text."""
    if as_id:
        return f"token_id:{token}"
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        backslash = ord("\\")
        shown = (chr(byte) if 32 <= byte < 127 and byte != backslash else f"\\x{byte:02x}" for byte in raw)
        return prefix + "".join(shown)


def chat_logprobs(
    tokenizer: Tokenizer, pieces: Sequence[Piece], num_top: int, *, as_ids: bool = False
) -> ChatLogprobs:
    def shown(token: int, logprob: float) -> tuple[str, float, list[int]]:
        name = token_name(tokenizer, token, as_id=as_ids)
        return name, max(FLOOR, logprob), list(tokenizer.token_bytes(token))

    content = []
    for piece in pieces:
        assert piece.logprobs is not None
        top = [
            TopLogprob(token=name, logprob=logprob, bytes=raw)
            for name, logprob, raw in (shown(*pair) for pair in piece.logprobs.top[:num_top])
        ]
        name, logprob, raw = shown(piece.token, piece.logprobs.logprob)
        content.append(TokenLogprob(token=name, logprob=logprob, bytes=raw, top_logprobs=top))
    return ChatLogprobs(content=content)


def legacy_logprobs(
    tokenizer: Tokenizer, pieces: Sequence[Piece], num_top: int, base_offset: int, *, as_ids: bool = False
) -> LegacyLogprobs:
    """`base_offset` is where the text of the pieces begins in the choice's text (after an echo)."""

    def name_of(token: int) -> str:
        return token_name(tokenizer, token, prefix=BYTES_PREFIX, as_id=as_ids)

    legacy = LegacyLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for piece in pieces:
        legacy.tokens.append(name_of(piece.token))
        legacy.text_offset.append(base_offset + piece.start)
        if piece.logprobs is None:  # the first token of a prompt has nothing before it
            legacy.token_logprobs.append(None)
            legacy.top_logprobs.append(None)
        else:
            legacy.token_logprobs.append(max(FLOOR, piece.logprobs.logprob))
            legacy.top_logprobs.append(_top(name_of, piece.token, piece.logprobs, num_top))
    return legacy


def joined(first: LegacyLogprobs, second: LegacyLogprobs) -> LegacyLogprobs:
    return LegacyLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def prompt_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], num_top: int) -> PromptLogprobs:
    """vLLM's shape: the chosen token and the top ones, by id; null for the first token."""
    shown: PromptLogprobs = [None]
    for entry in entries:
        by_id: dict[str, dict[str, Any]] = {}
        for rank, (token, logprob) in enumerate(entry.top[:num_top], start=1):
            by_id[str(token)] = _ranked(tokenizer, token, logprob, rank)
        by_id[str(entry.token)] = _ranked(tokenizer, entry.token, entry.logprob, entry.rank)
        shown.append(by_id)
    return shown


def _ranked(tokenizer: Tokenizer, token: int, logprob: float, rank: int) -> dict[str, Any]:
    return {
        "logprob": max(FLOOR, logprob),
        "rank": rank,
        "decoded_token": token_text(tokenizer, token),
    }


def _top(name_of: Callable[[int], str], chosen: int, entry: TokenLogprobs, num_top: int) -> dict[str, float]:
    """By name, the best first; the chosen token is always among them, under its own."""
    top: dict[str, float] = {}
    own = name_of(chosen)
    for token, logprob in entry.top[:num_top]:
        name = name_of(token)
        if token != chosen and (name == own or name in top):
            name = f"token_id:{token}"
        top[name] = max(FLOOR, logprob)
    top.setdefault(own, max(FLOOR, entry.logprob))
    return top
