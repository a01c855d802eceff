"""Counters of speculative decoding, per drafter: vLLM's names and meanings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter

if TYPE_CHECKING:
    from engine.messages import Verified

LABELS = ("model_name", "drafter")


class SpecDecodeMetrics:
    def __init__(self, model_name: str, registry: CollectorRegistry) -> None:
        self._model = model_name
        self._drafts = Counter(
            "vllm:spec_decode_num_drafts",
            "Steps that verified drafts, of each sequence.",
            LABELS,
            registry=registry,
        )
        self._tokens = Counter(
            "vllm:spec_decode_num_draft_tokens", "Drafts that were verified.", LABELS, registry=registry
        )
        self._accepted = Counter(
            "vllm:spec_decode_num_accepted_tokens", "Drafts that stood.", LABELS, registry=registry
        )
        self._per_place = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts that stood, by how many they followed.",
            (*LABELS, "position"),
            registry=registry,
        )

    def count(self, verified: Verified) -> None:
        labels = (self._model, verified.drafter)
        self._drafts.labels(*labels).inc()
        self._tokens.labels(*labels).inc(verified.num_drafts)
        self._accepted.labels(*labels).inc(verified.num_accepted)
        for depth in verified.accepted:
            self._per_place.labels(*labels, str(depth)).inc()
