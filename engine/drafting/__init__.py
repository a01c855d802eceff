"""Drafters by name, and which of them need nothing but a vocabulary's size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafting.lookahead import Lookahead
from engine.drafting.ngrams import TOKEN_BYTES
from engine.drafting.past_outputs import PastOutputs
from engine.drafting.prompt_lookup import PromptLookup
from engine.drafting.recycling import Recycling

if TYPE_CHECKING:
    from engine.drafting.guess import Drafter

AUTO = "auto"  # whichever are expected to gain anything
STORE_BYTES = 640 * 2**20  # of the light drafters together, at most, where nobody says otherwise
LIGHT = ("prompt_lookup", "past_outputs", "recycling", "lookahead")  # a guess takes microseconds


def light_drafters(vocab_size: int, store_bytes: int = STORE_BYTES) -> dict[str, Drafter]:
    """What they remember takes at most `store_bytes`."""
    fifth = store_bytes // 5
    max_tokens = 2 * fifth // TOKEN_BYTES
    return {
        "prompt_lookup": PromptLookup(max_tokens),
        "past_outputs": PastOutputs(max_tokens),
        "recycling": Recycling(vocab_size, fifth),
        "lookahead": Lookahead(),
    }
