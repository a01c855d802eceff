"""Counters of speculative decoding: vLLM's names and meanings, and per drafter our own. All begin at zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter

from server.scheduler_metrics import labels_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from engine.messages import Verified

PER_PLACE = "vllm:spec_decode_num_accepted_tokens_per_pos"
NUM_PLACES = 64  # no step has more drafts


class SpecDecodeMetrics:
    def __init__(self, model_name: str, registry: CollectorRegistry) -> None:
        self._model = model_name
        self._registry = registry
        self._rounds = self._counter(
            "vllm:spec_decode_num_drafts", "Steps that verified drafts, of each sequence."
        )
        self._tokens = self._counter("vllm:spec_decode_num_draft_tokens", "Drafts that were verified.")
        self._accepted = self._counter("vllm:spec_decode_num_accepted_tokens", "Drafts that stood.")
        self._per_place = self._family(PER_PLACE, "Drafts that stood, by how many they followed.", "position")
        for place in range(NUM_PLACES):
            self._at(place)
        self._drafter_tokens = self._family(
            "octavo:spec_decode_draft_tokens", "Drafts that were verified, by who proposed them.", "drafter"
        )
        self._drafter_accepted = self._family(
            "octavo:spec_decode_accepted_tokens", "Drafts that stood, by who proposed them.", "drafter"
        )

    def begin(self, drafters: Iterable[str]) -> None:
        """These may draft from now on."""
        for drafter in drafters:
            self._drafter_tokens.labels(self._model, drafter)
            self._drafter_accepted.labels(self._model, drafter)

    def count(self, verified: Sequence[Verified]) -> None:
        """The drafts of one sequence in one step, by drafter."""
        if verified:
            self._rounds.inc()
        for part in verified:
            self._tokens.inc(part.num_drafts)
            self._accepted.inc(part.num_accepted)
            self._drafter_tokens.labels(self._model, part.drafter).inc(part.num_drafts)
            self._drafter_accepted.labels(self._model, part.drafter).inc(part.num_accepted)
            for depth in part.accepted:
                self._at(depth).inc()

    def _at(self, place: int) -> Counter:
        return self._per_place.labels(**labels_of(PER_PLACE, self._model), position=str(place))

    def _counter(self, name: str, text: str) -> Counter:
        return self._family(name, text).labels(**labels_of(name, self._model))

    def _family(self, name: str, text: str, *more: str) -> Counter:
        return Counter(name, text, [*labels_of(name, self._model), *more], registry=self._registry)
