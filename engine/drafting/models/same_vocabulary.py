"""Whether two checkpoints mean the same by the same token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import vocabulary
from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint

# Relatives rename a few special tokens and append some; a draft of such a token is a draft lost, no more.
MAX_OTHER_SHARE = 0.01


def same_vocabulary(checkpoint: Checkpoint, target: Checkpoint | None, num_target_tokens: int) -> bool:
    """By their tokens' texts; where one of them has no readable vocabulary, by the number of rows. Rows
    beyond the tokens are padding, of which relatives have different numbers."""
    known = _texts(checkpoint)
    needed = _texts(target) if target is not None else None
    if known is None or needed is None:
        return checkpoint.transformer.vocab_size == num_target_tokens
    others = sum(known.get(token) != text for token, text in needed.items())
    return others <= MAX_OTHER_SHARE * len(needed)


def _texts(checkpoint: Checkpoint) -> dict[int, str] | None:
    try:
        found = vocabulary.load(checkpoint)
    except CheckpointError:
        return None
    return {token: text for text, token in found.marked.get_vocab(with_added_tokens=True).items()}
