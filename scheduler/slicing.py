"""Which of a sequence's tokens a step computes, as a slice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.plan import Slice

if TYPE_CHECKING:
    from scheduler.types import Sequence


def portion(sequence: Sequence, room: int) -> int:
    """How many tokens to compute, at most `room`. The last committed token goes with the window: its
    logits and the window's are one question to the decoding method. If that does not fit, tokens
    before it go alone."""
    wanted = sequence.num_tokens - sequence.num_computed
    if wanted <= room:
        return wanted
    left = len(sequence.tokens) - sequence.num_computed
    if sequence.window.tokens:
        left -= 1
    return max(0, min(left, room))


def make_slice(sequence: Sequence, share: int) -> Slice:
    """The next `share` tokens, for which the sequence holds pages."""
    start, end = sequence.num_computed, sequence.num_computed + share
    known, pages, sent = len(sequence.tokens), sequence.pages, sequence.num_pages_sent
    sequence.num_pages_sent = len(pages)
    new_pages = tuple(pages[sent:]) if sent < len(pages) else ()
    if share == 1 and sequence.num_known <= start == known - 1 and not sequence.window.tokens:
        # One more output token: nearly all slices are such.
        return Slice(sequence.seq_id, start, (sequence.tokens[start],), range(start, end), sent, new_pages, 1)
    num_window = max(0, end - known)
    num_logits = 0 if end < known else min(share, 1 + num_window)
    if start < sequence.num_known and sequence.wants_prompt_logits:
        num_logits = max(num_logits, end - max(start, sequence.num_reached))
    tokens = tuple(sequence.tokens[start:end])
    if not num_window:
        return Slice(sequence.seq_id, start, tokens, range(start, end), sent, new_pages, num_logits)
    window = sequence.window
    assert num_window == len(window.tokens), "a window is computed whole or not at all"
    return Slice(
        seq_id=sequence.seq_id,
        start=start,
        tokens=tokens + window.tokens,
        positions=(*range(start, known), *(known + depth for depth in window.depths)),
        first_new_page=sent,
        new_pages=new_pages,
        num_logits=num_logits,
        num_window=num_window,
        visibility=window.visibility,
        ancestors=window.ancestors,
    )
