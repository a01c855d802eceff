"""Drafters by name: the registry is the only place that lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafting.lookahead import Lookahead
from engine.drafting.past_outputs import PastOutputs
from engine.drafting.prompt_lookup import PromptLookup
from engine.drafting.recycling import Recycling

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.drafting.guess import Drafter

AUTO = "auto"  # whichever is expected to guess most

DRAFTERS: dict[str, Callable[[int], Drafter]] = {  # of a vocabulary's size
    "prompt_lookup": lambda _: PromptLookup(),
    "past_outputs": lambda _: PastOutputs(),
    "recycling": Recycling,
    "lookahead": lambda _: Lookahead(),
}
