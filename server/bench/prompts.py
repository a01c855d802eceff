"""Prompts of random words with a wanted number of tokens, the same for the same seed."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from server.bench.http import HttpError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from server.bench.client import Client

# Frequent words, most of which are one token of their own in a byte-level BPE vocabulary.
_WORDS = """
    about after again air all along also always another answer any around ask away back because been
    before begin best better between big book both boy bring build call came can car care change child
    city close cold come could country cut day did different do door down draw each early earth eat end
    enough even every example eye face fact family far farm father feel few find fire first fish follow
    food form found four friend from full game gave get girl give go good great ground group grow had
    half hand hard have head hear help here high his hold home horse hour house how idea important
    inside just keep kind king know land large last late later learn leave left less letter life light
    like line list little live long look made make man many map may mean men might mind money moon more
    morning most mother mountain move much music must name near need never new next night north note
    nothing notice now number off often old once one only open order other our out over own page paper
    part people person picture place plan plant play point power problem put question quick rain ran
    reach read ready real red rest right river road rock room rule run said same saw say school sea
    second see seem sentence set several ship short should show side simple since sing sit six sleep
    slow small snow some song soon sound south space stand star start state stay step still stood stop
    story street strong study such sun sure table take talk teach tell ten than thank their them then
    there these thing think those thought three through time today together told too took top toward
    town travel tree true try turn two under unit until upon use usual very voice wait walk want war
    warm watch water way week well went west what wheel when where which while white whole why wind with
    without wood word work world would write year yet young your
"""
WORDS = tuple(_WORDS.split())
MAX_CORRECTIONS = 6
SAMPLE_WORDS = 200  # in the request that finds the ratio of tokens to words


class PromptMaker:
    """Makes prompts of a wanted length, by the server's own tokeniser where it offers one."""

    def __init__(self, count: Callable[[str], Awaitable[int]] | None, tokens_per_word: float) -> None:
        self._count = count
        self._tokens_per_word = tokens_per_word

    @property
    def calibration(self) -> str:
        """How lengths are met, for the report."""
        return "/tokenize" if self._count else f"{self._tokens_per_word:.3f} tokens per word"

    async def make(self, rng: random.Random, num_tokens: int) -> str:
        """A prompt of `num_tokens` tokens, or as near as a few corrections come."""
        words = rng.choices(WORDS, k=max(1, round(num_tokens / self._tokens_per_word)))
        for _ in range(MAX_CORRECTIONS if self._count else 0):
            assert self._count
            missing = num_tokens - await self._count(" ".join(words))
            if missing == 0:
                break
            words = words + rng.choices(WORDS, k=missing) if missing > 0 else words[:missing] or words[:1]
        return " ".join(words)


async def calibrate(client: Client) -> PromptMaker:
    """A maker that counts through /tokenize, or else by the ratio that one completion's usage shows."""

    async def count(text: str) -> int:
        # "prompt" is what vLLM's and our own route read, "content" what llama.cpp's does.
        answer = await client.call(
            "POST", "/tokenize", {"model": client.model, "prompt": text, "content": text}
        )
        return len(answer["tokens"])

    sample = " ".join(random.Random("calibration").choices(WORDS, k=SAMPLE_WORDS))
    try:
        return PromptMaker(count, await count(sample) / SAMPLE_WORDS)
    except (HttpError, KeyError, TypeError):
        pass
    answer = await client.call(
        "POST", "/v1/completions", {"model": client.model, "prompt": sample, "max_tokens": 1}
    )
    tokens = (answer.get("usage") or {}).get("prompt_tokens") or SAMPLE_WORDS
    return PromptMaker(None, tokens / SAMPLE_WORDS)
