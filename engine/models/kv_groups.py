"""Layers whose KV shares pages: they see the same slots, and there are equally many in every group.

A model with layers of several kinds (Gemma's local and global ones) keeps its pages by groups, so that those
behind a window can be let go of alone. Groups are of one size, so that one pool of pages serves them all
(as in vLLM's hybrid cache): a kind with more layers has several groups, and a last group may be short of
some, which costs the room of those. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.spans import Spans

if TYPE_CHECKING:
    from engine.models.config import TransformerConfig

MAX_GROUPS = 8  # each has page tables and an attention plan of its own in every step
WORTH_SHARE = 1.05  # fewer groups are worth so much more memory
USUAL_LEN = 4096  # tokens


@dataclass(frozen=True, slots=True)
class KVGroup:
    """`window` and `chunk` as in `Layer`."""

    window: int
    chunk: int
    layers: tuple[int, ...]

    @property
    def span(self) -> int:
        """The most tokens that a token sees in these layers, itself included; 0: all before it."""
        return self.window or self.chunk


def kv_groups(config: TransformerConfig) -> tuple[KVGroup, ...]:
    """Every layer in exactly one group; groups that see everything first."""
    kinds: dict[tuple[int, int], list[int]] = {}
    for index, layer in enumerate(config.layers):
        kinds.setdefault((layer.window, layer.chunk), []).append(index)
    size = _group_size(kinds, config.max_positions)
    groups = [
        KVGroup(window, chunk, tuple(layers[first : first + size]))
        for (window, chunk), layers in kinds.items()
        for first in range(0, len(layers), size)
    ]
    return tuple(sorted(groups, key=lambda group: (group.span, group.layers)))


def kv_spans(config: TransformerConfig, page_size: int) -> Spans:
    """The groups as the scheduler knows them."""
    return Spans(tuple(group.span for group in kv_groups(config)), page_size)


def layers_per_page(groups: tuple[KVGroup, ...]) -> int:
    return max(len(group.layers) for group in groups)


def page_values(config: TransformerConfig, page_size: int) -> int:
    """Numbers that one page holds: the keys and values of `page_size` tokens in the layers of a group."""
    return 2 * layers_per_page(kv_groups(config)) * config.num_kv_heads * config.head_dim * page_size


def kv_values(config: TransformerConfig, num_tokens: int, page_size: int = 16) -> int:
    """Numbers that the KV cache keeps of a sequence of so many tokens, in whole pages; multiplied by the
    bytes of one, its memory. `config`: from `for_context`, else windows beyond the context count as well."""
    return kv_spans(config, page_size).most_pages(num_tokens, 1) * page_values(config, page_size)


def _group_size(kinds: dict[tuple[int, int], list[int]], max_positions: int) -> int:
    """Layers of a group: those that groups are short of take the least room, in texts of a usual length and
    in the longest; of sizes that take about the same the largest."""
    counts = [(max(kind), len(layers)) for kind, layers in kinds.items()]

    def num_groups(size: int) -> int:
        return sum(-(-count // size) for _, count in counts)

    def taken(size: int, length: int) -> int:
        return sum(-(-count // size) * size * min(span or length, length) for span, count in counts)

    lengths = (min(USUAL_LEN, max_positions), max_positions)
    waste = {
        size: max(taken(size, length) / taken(1, length) for length in lengths)
        for size in range(1, max(count for _, count in counts) + 1)
        if num_groups(size) <= max(MAX_GROUPS, len(counts))
    }
    return max(size for size, share in waste.items() if share <= min(waste.values()) * WORTH_SHARE)
