"""Drafters by name, and which of them need nothing but a vocabulary's size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafting.lookahead import Lookahead
from engine.drafting.past_outputs import PastOutputs
from engine.drafting.prompt_lookup import PromptLookup
from engine.drafting.recycling import Recycling

if TYPE_CHECKING:
    from engine.drafting.guess import Drafter

AUTO = "auto"  # whichever are expected to gain anything
LIGHT = ("prompt_lookup", "past_outputs", "recycling", "lookahead")  # a guess takes microseconds


def light_drafters(vocab_size: int) -> dict[str, Drafter]:
    return {
        "prompt_lookup": PromptLookup(),
        "past_outputs": PastOutputs(),
        "recycling": Recycling(vocab_size),
        "lookahead": Lookahead(),
    }
