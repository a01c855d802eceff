"""A stand-in for the engine: a text that is known beforehand, a KV memory that can be read.

The token of place t is a function of (prompt, seed, choice, t) alone, so the output that a request
must have does not depend on scheduling. What a slot of a page holds is a hash of all the tokens that
a true KV would depend on; every slice reads back its whole prefix through the page table that the
plans built up, so a page that is lost, shared wrongly or overwritten is noticed. In a group of layers with
a span it reads what the slice sees there, and no more.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scheduler.choices import max_tokens_of
from scheduler.plan import Advance, Tier
from scheduler.spans import NO_PAGE
from scheduler.types import EMPTY_WINDOW, FinishReason, Visibility, Window

if TYPE_CHECKING:
    import random

    from scheduler.fake_tiers import FakeTiers
    from scheduler.plan import Slice, StepPlan
    from scheduler.scheduler import Scheduler
    from scheduler.types import Request, Sequence

VOCABULARY = 40
METHODS = ("autoregressive", "drafts", "line", "tree", "block")


def true_token(request: Request, index: int, place: int) -> int:
    return hash((request.prompt_ids, request.sampling.seed, index, place)) % VOCABULARY


def true_output(request: Request, index: int, max_model_len: int) -> tuple[tuple[int, ...], FinishReason]:
    """The whole output of one choice and why it ends, by the plainest reading of the rules."""
    sampling, output = request.sampling, list[int]()
    room = min(sampling.max_tokens, max_model_len - len(request.prompt_ids))
    while len(output) < room:
        output.append(true_token(request, index, len(output)))
        if output[-1] in sampling.stop_token_ids and len(output) >= sampling.min_tokens:
            return tuple(output), FinishReason.STOP
    return tuple(output), FinishReason.LENGTH


def _in_group(content: int, group: int) -> int:
    """The KV of the same token differs between groups of layers."""
    return hash((content, group)) if group else content


@dataclass(slots=True)
class _Memory:
    """What the engine knows of one sequence: its page table, and what its slots should hold."""

    table: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)


class FakeRunner:
    """Executes plans of one scheduler; `failing` are (request id, choice) that cannot be computed."""

    def __init__(
        self, scheduler: Scheduler, rng: random.Random, failing: set[tuple[str, int]], tiers: FakeTiers
    ) -> None:
        self._scheduler = scheduler
        self._rng = rng
        self._failing = failing
        self._page_size = scheduler.config.page_size
        self._spans = scheduler.spans
        self._tiers = tiers
        self._known: dict[int, _Memory] = {}
        self.prompt_logits: dict[tuple[str, int], list[int]] = {}  # slots reported, by choice

    def execute(self, plan: StepPlan) -> list[Advance]:
        """Compute all slices of a plan, in any order, as a batch would."""
        for entry in plan.preempted:
            self._known.pop(entry.seq_id, None)
        assert plan.num_tokens <= self._scheduler.config.max_num_batched_tokens, "too many tokens in a step"
        assert len({piece.seq_id for piece in plan.slices}) == len(plan.slices), "two slices of one sequence"
        advances = []
        for piece in self._rng.sample(plan.slices, len(plan.slices)):
            sequence = self._scheduler.sequence(piece.seq_id)
            self._check_slice(piece, sequence)
            self._compute(piece, sequence)
            advances.append(self._decode(piece, sequence))
        return advances

    def forget(self, seq_id: int) -> None:
        self._known.pop(seq_id, None)

    def is_empty(self) -> bool:
        return not self._known

    # The slice

    def _check_slice(self, piece: Slice, sequence: Sequence) -> None:
        known, num = len(sequence.tokens), len(piece.tokens)
        end = piece.start + num
        assert num > 0, "an empty slice"
        wanted = (*sequence.tokens, *sequence.window.tokens)
        places = (*range(known), *(known + depth for depth in sequence.window.depths))
        assert piece.tokens == wanted[piece.start : end], "other tokens than the sequence's"
        assert tuple(piece.positions) == places[piece.start : end], "wrong positions"
        assert piece.num_window in (0, len(sequence.window.tokens)), "a part of a window"
        assert end - piece.num_window <= known, "window tokens that are not declared"
        self._check_logits(piece, sequence, end - piece.num_window == known)

    def _check_logits(self, piece: Slice, sequence: Sequence, reaches_end: bool) -> None:
        request, num = sequence.request, len(piece.tokens)
        reports_prompt = request.sampling.prompt_logprobs is not None and sequence.index == 0
        asked = range(piece.start + num - piece.num_logits, piece.start + num)
        if reaches_end:
            assert piece.num_logits >= min(num, 1 + piece.num_window), "logits are missing"
        if not reports_prompt:
            assert piece.num_logits == (min(num, 1 + piece.num_window) if reaches_end else 0), "idle logits"
            return
        reported = self.prompt_logits.setdefault((request.request_id, sequence.index), [])
        reported += [slot for slot in asked if slot < len(request.prompt_ids) - 1]

    def _compute(self, piece: Slice, sequence: Sequence) -> None:
        """Extend the page table, read back what the slice sees, write the new slots."""
        if piece.first_new_page == 0:
            self._known[piece.seq_id] = _Memory(contents=self._causal(sequence, piece.start))
        memory = self._known[piece.seq_id]
        assert piece.first_new_page <= len(memory.table), "a gap in the page table"
        memory.table[piece.first_new_page :] = piece.new_pages
        end = piece.start + len(piece.tokens)
        assert end * len(self._spans) <= len(memory.table) * self._page_size, "slots without a page"
        assert len(memory.contents) >= piece.start, "a slice behind a gap"
        del memory.contents[piece.start :]
        for group in range(len(self._spans)):
            self._read(memory, group, piece)
        memory.contents += self._kv(piece, memory.contents, sequence)
        for group in range(len(self._spans)):
            self._write(memory, group, piece.start, end)

    def _read(self, memory: _Memory, group: int, piece: Slice) -> None:
        span = self._spans[group]
        for slot in range(max(0, piece.start + 1 - span) if span else 0, piece.start):
            page = self._page(memory, group, slot)
            assert page != NO_PAGE, f"sequence {piece.seq_id} lacks a page that it sees"
            assert self._scheduler._pool.references[page] > 0, "a page is read that nobody holds"
            held = self._tiers.pages[Tier.DEVICE, page][slot % self._page_size]
            expected = _in_group(memory.contents[slot], group)
            assert held == expected, f"sequence {piece.seq_id} finds foreign KV in its pages"

    def _write(self, memory: _Memory, group: int, start: int, end: int) -> None:
        pool = self._scheduler._pool
        for slot in range(start, end):
            page = self._page(memory, group, slot)
            assert pool.references[page] == 1, "a shared page is written"
            assert page not in pool.key_of, "a findable page is written"
            content = _in_group(memory.contents[slot], group)
            self._tiers.pages[Tier.DEVICE, page][slot % self._page_size] = content

    def _page(self, memory: _Memory, group: int, slot: int) -> int:
        return memory.table[slot // self._page_size * len(self._spans) + group]

    def _root(self, sequence: Sequence) -> int:
        own = "" if self._scheduler.config.prefix_cache else sequence.request.request_id
        return zlib.crc32(f"{sequence.request.cache_salt}/{own}".encode())

    def _causal(self, sequence: Sequence, end: int) -> list[int]:
        contents, last = list[int](), self._root(sequence)
        for token in sequence.tokens[:end]:
            last = hash((last, token))
            contents.append(last)
        return contents

    def _kv(self, piece: Slice, before: list[int], sequence: Sequence) -> list[int]:
        """Slot contents of the slice's tokens. Those of a window that sees all of itself differ from
        causal ones."""
        last = before[-1] if before else self._root(sequence)
        contents = []
        num_known = len(piece.tokens) - piece.num_window
        sees_all = piece.visibility is Visibility.ALL
        for k, token in enumerate(piece.tokens):
            whole = piece.tokens[num_known:] if sees_all and k >= num_known else None
            last = hash((last, token)) if whole is None else hash((last, token, whole))
            contents.append(last)
        return contents

    # The decoding methods

    def _decode(self, piece: Slice, sequence: Sequence) -> Advance:
        request, index = sequence.request, sequence.index
        if (request.request_id, index) in self._failing and self._rng.random() < 0.3:
            return Advance(piece.seq_id, (), 0, error="injected")
        num_known = len(piece.tokens) - piece.num_window
        if piece.start + num_known < len(sequence.tokens):
            return Advance(piece.seq_id, (), num_known)
        if piece.num_window and sequence.window.optional and self._rng.random() < 0.05:
            return Advance(piece.seq_id, (), 0, spoiled=True)
        place = sequence.num_output
        if piece.visibility is Visibility.ALL:
            return self._unmask(piece, sequence, num_known)
        drafts = sequence.window.tokens if piece.num_window else ()
        agreed = 0
        while agreed < len(drafts) and drafts[agreed] == true_token(request, index, place + agreed):
            agreed += 1
        committed = tuple(true_token(request, index, place + k) for k in range(agreed + 1))
        return Advance(piece.seq_id, committed, num_known + agreed, self._window(sequence, agreed + 1))

    def _unmask(self, piece: Slice, sequence: Sequence, num_known: int) -> Advance:
        """A block: denoise it some more, or commit it with the KV that it has."""
        window, place = sequence.window, sequence.num_output
        if self._rng.random() < 0.5:
            return Advance(piece.seq_id, (), num_known, window)
        block = range(place, place + len(window.tokens))
        true_block = tuple(true_token(sequence.request, sequence.index, k) for k in block)
        if window.tokens != true_block:
            filled = Window(true_block, window.depths, window.visibility)
            return Advance(piece.seq_id, (), num_known, filled)
        return Advance(piece.seq_id, true_block, len(piece.tokens), self._window(sequence, len(true_block)))

    def offer_drafts(self) -> int:
        """Guesses for some of those that can use them, also more than there is room for. -> how many"""
        drafts = 0
        for sequence in self._scheduler.draftable("drafts"):
            size = min(self._rng.randint(0, 12), self._scheduler.most_drafts(sequence))
            if size > 0:
                tokens = self._drafts(sequence, sequence.num_output, size)
                self._scheduler.offer(
                    sequence.seq_id, Window(tuple(tokens), tuple(range(size)), optional=True)
                )
                drafts += size
        return drafts

    def _drafts(self, sequence: Sequence, place: int, size: int) -> list[int]:
        tokens = [true_token(sequence.request, sequence.index, place + k) for k in range(size)]
        if size and self._rng.random() < 0.6:
            tokens[self._rng.randrange(size)] = VOCABULARY + 1  # a draft that is never right
        return tokens

    def _window(self, sequence: Sequence, num_committed: int) -> Window:
        """The next window of a sequence that is about to commit; it keeps within all limits."""
        request, place = sequence.request, sequence.num_output + num_committed
        limit = max_tokens_of(request, self._scheduler.max_model_len)
        room = limit - len(sequence.tokens) - num_committed
        size = min(room, self._scheduler.config.max_num_batched_tokens - 1, 6)
        if request.method in ("autoregressive", "drafts") or size < 1:
            return EMPTY_WINDOW
        if request.method == "block":
            return Window((VOCABULARY,) * size, tuple(range(size)), Visibility.ALL)
        tokens = self._drafts(sequence, place, self._rng.randint(0, size))
        size = len(tokens)
        if request.method == "tree" and size > 1:
            # A path of size - 1 tokens, and one rival of its first token.
            tokens[-1] = VOCABULARY + 2
            words = (*((1 << (k + 1)) - 1 for k in range(size - 1)), 1 << (size - 1))
            return Window(tuple(tokens), (*range(size - 1), 0), Visibility.ANCESTORS, words)
        return Window(tuple(tokens), tuple(range(size)))
