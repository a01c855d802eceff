"""A smaller model with another vocabulary drafts (Timor 2025, "Accelerating LLM Inference with Lossless
Speculative Decoding Algorithms for Heterogeneous Vocabularies", arXiv 2502.05202).

Drafts are tokens of the target, whoever found them, so acceptance is as ever and nothing here can change a
text. There are two ways to find them:

- Where the target draws with noise, or the request wants something of its logits, the draft model chooses
  among the tokens that both vocabularies have: its chances, of these alone, stand for the target's
  (token-level intersection, `vocabulary_map.py`).
- Else it goes on with its own best tokens, and the target's tokeniser spells what it said (string-level exact
  match, `Alignment.spelled`).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice
from typing import TYPE_CHECKING

import torch

from engine.drafting.growing_tree import GrowingTree
from engine.drafting.guess import CATCHING_UP, NO_GUESS, ROOT
from engine.drafting.models.draft_model import DraftModel, Successors, load_draft_model, pass_cost
from engine.drafting.models.small_model import MAX_PASSES, SmallModel
from engine.drafting.vocabularies.following_text import FollowingText
from engine.drafting.vocabularies.speller import Speller
from engine.drafting.vocabularies.vocabulary_map import VocabularyMap
from engine.sampling.places import Place
from engine.sampling.ranking import is_random
from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Sequence as SequenceOf

    from engine.checkpoint import Checkpoint
    from engine.drafting.guess import Guess, Seen, Want
    from engine.drafting.models.following import Stretch
    from engine.drafting.surroundings import Surroundings
    from scheduler.types import Sequence


def find(checkpoint: Checkpoint, target: Checkpoint | None) -> Callable[[Surroundings, int], OtherVocabulary]:
    """The vocabularies only -> what loads the model. Raises CheckpointError for those that cannot be read."""
    if target is None:
        raise CheckpointError(f"{checkpoint.path}: the target has no vocabulary to compare this one with")
    return partial(_load, checkpoint, (Speller.of(target), Speller.of(checkpoint)))


def _load(
    checkpoint: Checkpoint, spellers: tuple[Speller, Speller], around: Surroundings, free_bytes: int
) -> OtherVocabulary:
    """Raises CheckpointError for what does not fit, and for vocabularies that have nothing in common."""
    draft, following = load_draft_model(checkpoint, around, free_bytes)
    cost = pass_cost(draft.model.config, around.model.config)
    try:
        return OtherVocabulary(draft, following.max_len, spellers, cost)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


class MappedModel(DraftModel):
    """Its logits are of its own vocabulary, what may follow is of the target's."""

    def __init__(self, draft: DraftModel, shared: VocabularyMap) -> None:
        super().__init__(draft.model, draft.kv, draft.model.config.vocab_size, draft.processor_of)
        self.shared = shared

    def successors(
        self, logits: torch.Tensor, after: SequenceOf[tuple[Sequence, tuple[int, ...]]]
    ) -> list[Successors]:
        """What it would rather say in tokens that the target has not counts against all others."""
        mapped, shares = self.shared.of_target(logits)
        return [
            Successors(found.tokens, [chance * share for chance in found.chances])
            for found, share in zip(super().successors(mapped, after), shares.tolist(), strict=True)
        ]


@dataclass(slots=True)
class _Speech:
    """What the draft model says behind a text: its own tokens, and the chance of all up to each. A special
    token, which ends it, is the last."""

    stretch: Stretch
    tokens: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    ended: bool = False


class OtherVocabulary:
    """`cost`: the time of one of the draft model's passes, in passes of the target."""

    taps: tuple[int, ...] = ()

    def __init__(
        self, draft: DraftModel, max_len: int, spellers: tuple[Speller, Speller], cost: float
    ) -> None:
        """`spellers`: of the target, of the draft model. Raises CheckpointError."""
        target, own = spellers
        num_known = draft.model.config.vocab_size
        shared = VocabularyMap(target, own, draft.vocab_size, num_known, draft.model.embedding.device)
        self.speller = own
        self.shared = shared
        self.cost = cost
        self.draft = MappedModel(draft, shared)
        self.following = FollowingText(draft.kv, max_len, num_known, spellers, shared)
        self._mapped = SmallModel(self.draft, self.following, cost)

    @torch.inference_mode()
    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        spoken = [want for want in wants if self._speaks(want.sequence)]
        guesses = self._spoken(spoken) if spoken else {}
        mapped = [want for want in wants if not self._speaks(want.sequence)]
        if mapped:
            ids = (want.sequence.seq_id for want in mapped)
            guesses |= zip(ids, self._mapped.guess(mapped), strict=True)
        return [guesses.get(want.sequence.seq_id, NO_GUESS) for want in wants]

    def observe(self, seen: SequenceOf[Seen]) -> None:
        """Committed tokens say all."""

    def release(self, sequence: Sequence) -> None:
        self.following.release(sequence.seq_id)

    def _speaks(self, sequence: Sequence) -> bool:
        """Whether the draft model's own words are as good as the target's tokens."""
        return not is_random(Place(sequence)) and self.draft.processor_of(sequence) is None

    def _spoken(self, wants: SequenceOf[Want]) -> dict[int, Guess]:
        stretches = self.following.stretches(wants)
        guesses = dict.fromkeys(self.following.behind, CATCHING_UP)
        if not stretches:
            return guesses
        logits = self.draft.logits([self.following.piece(stretch) for stretch in stretches])
        speeches = [_Speech(stretch) for stretch in stretches if stretch.catches_up]
        speaking = speeches
        for _ in range(MAX_PASSES):
            self._speak(speaking, logits)
            speaking = [speech for speech in speaking if self._goes_on(speech)]
            if not speaking:
                break
            logits = self.draft.logits(
                [self.following.say(speech.stretch, speech.tokens) for speech in speaking]
            )
        return guesses | {speech.stretch.seq_id: self._spelled(speech).guess() for speech in speeches}

    def _speak(self, speeches: list[_Speech], logits: torch.Tensor) -> None:
        """One more token for each, of its row; none where that is no token, or where numbers went wrong."""
        best = logits.max(-1)
        chances = (best.values - logits.logsumexp(-1)).exp().nan_to_num(0.0).tolist()
        for speech, token, chance in zip(speeches, best.indices.tolist(), chances, strict=True):
            if chance > 0.0 and self.speller.bytes_of(token):
                speech.tokens.append(token)
                speech.chances.append(chance * (speech.chances[-1] if speech.chances else 1.0))
                speech.ended = self.speller.special_text(token) is not None
            else:
                speech.ended = True
                self.draft.kv.storage.tainted |= not chance  # fresh pages are cleared from now on

    def _goes_on(self, speech: _Speech) -> bool:
        """A further token costs this part of a step; so likely it should be to be of use."""
        return (
            not speech.ended and len(speech.tokens) < speech.stretch.limit and speech.chances[-1] >= self.cost
        )

    def _spelled(self, speech: _Speech) -> GrowingTree:
        """What was said as a line of the target's tokens: each stands if all that it takes of it does."""
        stretch = speech.stretch
        tree = GrowingTree(stretch.limit, self._mapped.standing, drawn=False)
        parent, before = ROOT, 1.0
        for number, (token, chance) in enumerate(islice(self._line(speech), stretch.limit)):
            tree.grow(parent, [token], [chance / before])
            if len(tree.nodes) == number:
                break
            parent, before = number, chance
        self.following.plant(stretch, tree)
        return tree

    def _line(self, speech: _Speech) -> Iterator[tuple[int, float]]:
        """The target's tokens, and the chance of all up to each."""
        words = [token for token in speech.tokens if self.speller.special_text(token) is None]
        parts = [self.speller.bytes_of(token) for token in words]
        ends = list(accumulate(map(len, parts)))
        alignment = self.following.alignments[speech.stretch.seq_id]
        at = 0
        try:
            spelled = alignment.spelled(speech.stretch.want.sequence.tokens, b"".join(parts))
        except CheckpointError:  # of the tokeniser's library
            return
        for token in spelled:
            at += len(alignment.target.bytes_of(token))
            yield token, speech.chances[bisect_left(ends, at)]
        if len(words) < len(speech.tokens) and at == sum(map(len, parts)):
            last = self.shared.target_of(speech.tokens[-1])
            if last is not None:
                yield last, speech.chances[-1]
