"""How much of what was computed the next token sees, group by group of a model's layers.

A model whose layers see different stretches of the past keeps its KV in groups of equally many layers. A page
holds the KV of one group for `page_size` tokens, so a *block*, the same tokens in every group, is one page of
each. The span of a group is the most tokens that a token sees there, itself included; 0: all before it. The
pages of a sequence in a group with a span slide:

    0 ........ first page that the next token may see ........ num_computed ........ num_tokens
    | let go of: NO_PAGE in the table                        | held                          |

All counts here are of whole pages, and what is seen is counted from the start of the block that the next
token is in: there a sequence that was preempted begins again.
"""

from __future__ import annotations

NO_PAGE = -1


class Spans:
    """The groups' spans in pages; `num_whole` groups, the first ones, have none."""

    def __init__(self, spans: tuple[int, ...], page_size: int) -> None:
        self.spans = spans
        self.num_groups = len(spans)
        self.num_whole = spans.count(0)
        assert not any(spans[: self.num_whole]), "groups that see everything come first"
        assert min(spans) >= 0, "a negative span"
        assert any(spans) or len(spans) == 1, "groups that all see everything are one"
        self.page_size = page_size
        # By sliding group: pages before the block of the next token of which that token may see something.
        self.behind = tuple(-(-(span - 1) // page_size) for span in spans[self.num_whole :])
        self.slide = bool(self.behind)

    def num_unseen(self, num_blocks: int) -> int:
        """Pages that a token in the block after `num_blocks` and those after it see nothing of, in all."""
        return sum(num_blocks - behind for behind in self.behind if num_blocks > behind)

    def most_pages(self, num_slots: int, num_ahead: int) -> int:
        """The most pages that a sequence holds at a time on its way to `num_slots`, of which one step
        computes `num_ahead` at most."""
        num_blocks = -(-num_slots // self.page_size)
        pages = num_blocks * self.num_whole
        if self.behind:
            written = 1 - (1 - num_ahead) // self.page_size  # blocks that a step may touch
            pages += sum(min(num_blocks, behind + written) for behind in self.behind)
        return pages

    def longest(self, num_pages: int, num_ahead: int, limit: int) -> int:
        """The most slots, up to `limit`, for which `num_pages` are enough."""
        if self.most_pages(limit, num_ahead) <= num_pages:
            return limit
        enough, too_many = 0, -(-limit // self.page_size)  # in blocks
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if self.most_pages(middle * self.page_size, num_ahead) <= num_pages:
                enough = middle
            else:
                too_many = middle
        return enough * self.page_size
