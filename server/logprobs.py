"""Log-probabilities in OpenAI's two shapes and in vLLM's for prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.wire.responses import ChatLogprobs, LegacyLogprobs, PromptLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.messages import TokenLogprobs
    from server.streams import Piece
    from server.tokenizer import Tokenizer

FLOOR = -9999.0  # JSON has no infinity


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The token by itself; part of a character shows as a replacement character."""
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def chat_logprobs(tokenizer: Tokenizer, pieces: Sequence[Piece], num_top: int) -> ChatLogprobs:
    content = []
    for piece in pieces:
        assert piece.logprobs is not None
        top = [
            TopLogprob(token=text, logprob=logprob, bytes=raw)
            for text, logprob, raw in (_shown(tokenizer, *pair) for pair in piece.logprobs.top[:num_top])
        ]
        text, logprob, raw = _shown(tokenizer, piece.token, piece.logprobs.logprob)
        content.append(TokenLogprob(token=text, logprob=logprob, bytes=raw, top_logprobs=top))
    return ChatLogprobs(content=content)


def legacy_logprobs(
    tokenizer: Tokenizer, pieces: Sequence[Piece], num_top: int, base_offset: int
) -> LegacyLogprobs:
    """`base_offset` is where the text of the pieces begins in the choice's text (after an echo)."""
    legacy = LegacyLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for piece in pieces:
        legacy.tokens.append(token_text(tokenizer, piece.token))
        legacy.text_offset.append(base_offset + piece.start)
        if piece.logprobs is None:  # the first token of a prompt has nothing before it
            legacy.token_logprobs.append(None)
            legacy.top_logprobs.append(None)
        else:
            legacy.token_logprobs.append(max(FLOOR, piece.logprobs.logprob))
            legacy.top_logprobs.append(_top(tokenizer, piece.token, piece.logprobs, num_top))
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


def _shown(tokenizer: Tokenizer, token: int, logprob: float) -> tuple[str, float, list[int]]:
    raw = tokenizer.token_bytes(token)
    return raw.decode("utf-8", "replace"), max(FLOOR, logprob), list(raw)


def _top(tokenizer: Tokenizer, token: int, entry: TokenLogprobs, num_top: int) -> dict[str, float]:
    """By text, the best first; the chosen token is always among them. Equal texts: the likelier wins."""
    top: dict[str, float] = {}
    for candidate, logprob in (*entry.top[:num_top], (token, entry.logprob)):
        top.setdefault(token_text(tokenizer, candidate), max(FLOOR, logprob))
    return top
