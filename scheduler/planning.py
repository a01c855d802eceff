"""One step, decided: who computes which tokens, into which pages.

A plan is made in three rounds:

1. Seats. Under a preemptive policy, waiting sequences that precede a running one take a place, and if
   need be the places and pages of those behind them, last first.
2. Shares. The token budget is dealt out: to sequences with few tokens left first, so that a decode
   never waits for someone's chunk; what remains goes to chunks in policy order. The first sequence
   of the order is sure of a part. Then pages are provided strictly in policy order; when none is
   left, the last of the order is preempted. It has no slice yet, for slices are made from the front.
3. Leftovers. If tokens, places and pages are left, waiting sequences are admitted in policy order,
   only as many as get tokens now: those behind may find the pages that these compute.

Why somebody always gets on. Let F be the first of the order among the running. Round 2 gives F at
least one token, and everyone else's pages if F needs them; `Scheduler.add` refuses what does not fit
the pool alone, and `apply` ends a sequence whose window does not. So F is never preempted by someone
behind it and computes in every plan. Orders change only with service, at most `num_levels - 1` times
per sequence and only backwards; in between, of two sequences only the later one is ever preempted
for the other. So F's turn ends after finitely many steps, and there are finitely many turns before
any given sequence: who arrived later by more than the largest head start never comes before it. With
an order that is not preemptive, a waiting sequence that precedes all running ones stops admissions,
the running ones end, and it is seated. If nobody runs, the first waiting one is seated in round 1 or
3: alone it fits. No deadlock, no livelock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.plan import Slice

if TYPE_CHECKING:
    from scheduler.page_tables import PageTables
    from scheduler.places import Places
    from scheduler.types import Sequence


class Planner:
    def __init__(self, places: Places, max_num_batched_tokens: int) -> None:
        self._places = places
        self._tables: PageTables = places.tables
        self._budget = max_num_batched_tokens

    def slices(self) -> list[Slice]:
        preemptions = self._places.num_preemptions
        self._seat_those_ahead()
        slices, left = self._serve_running()
        if self._places.num_preemptions == preemptions:
            slices += self._admit(left)
        return slices

    # Round 1

    def _seat_those_ahead(self) -> None:
        places = self._places
        if not places.policy.preemptive or not len(places.waiting) or not places.running:
            return
        behind = places.by_policy()
        claimed = 0
        while claimed < self._budget and behind and (entry := places.first_waiting()) is not None:
            order, sequence = entry
            if places.policy.order(behind[-1]) < order:
                return
            found = self._tables.find(sequence)
            victims = self._victims(sequence, found, behind)
            if victims is None:
                return
            for victim in victims:
                places.set_aside(victim)
            del behind[len(behind) - len(victims) :]
            places.seat(sequence, found)
            claimed += sequence.num_tokens - sequence.num_computed

    def _victims(
        self, sequence: Sequence, found: list[int], running: list[Sequence]
    ) -> list[Sequence] | None:
        """Who must go so that `sequence` has a place and pages: the last of the order. None if only
        somebody ahead of it could make the room."""
        places = self._places
        order = places.policy.order(sequence)
        spare = self._spare_pages() - self._needed_pages(sequence, found)
        num_running = len(places.running)
        victims: list[Sequence] = []
        for victim in reversed(running):
            if num_running < places.max_num_seqs and spare >= 0:
                return victims
            if places.policy.order(victim) < order:
                return None
            victims.append(victim)
            num_running -= 1
            spare += self._pages_back(victim, found)
        # Whoever was seated in this round is not in `running`, and precedes `sequence`.
        return victims if num_running == 0 or (num_running < places.max_num_seqs and spare >= 0) else None

    def _pages_back(self, victim: Sequence, found: list[int]) -> int:
        """Pages that become available when one sequence goes, at the least: shared ones may stay."""
        references = self._tables.pool.references
        kept = set(found)
        own = sum(1 for page in victim.pages if references[page] == 1 and page not in kept)
        return own + self._tables.missing(victim, victim.num_tokens) + 1

    # Round 2

    def _serve_running(self) -> tuple[list[Slice], int]:
        running = self._places.by_policy()
        shares, left = self._share_tokens(running)
        slices = []
        for sequence, share in zip(running, shares, strict=True):
            if share and sequence.seq_id in self._places.running and self._provide(sequence, share, running):
                slices.append(self._slice(sequence, share))
        return slices, left

    def _share_tokens(self, running: list[Sequence]) -> tuple[list[int], int]:
        """Tokens for each of `running` (in policy order), and what is left of the budget.

        "Few" is up to a page of committed tokens, and the window. A longer head of the order has a
        quarter of the budget set apart, so that the decodes behind it cannot starve it either.
        """
        few = self._tables.page_size
        shares = [0] * len(running)
        left = self._budget
        chunks = [k for k, piece in enumerate(running) if len(piece.tokens) - piece.num_computed > few]
        if chunks and chunks[0] == 0:
            shares[0] = _portion(running[0], max(1, left // 4))
            left -= shares[0]
        waiting_for_rest = set(chunks)
        for k, sequence in enumerate(running):
            if k not in waiting_for_rest:
                shares[k] = _portion(sequence, left)
                left -= shares[k]
        for k in chunks:
            share = _portion(running[k], left + shares[k])
            left -= share - shares[k]
            shares[k] = share
        return shares, left

    def _provide(self, sequence: Sequence, share: int, running: list[Sequence]) -> bool:
        """Pages for the next `share` tokens, if need be from the last of the order. False: it is the
        last itself, keeps what it has, and waits for this step."""
        slots = sequence.num_computed + share
        needed = self._tables.missing(sequence, slots)
        while self._tables.pool.available < needed:
            last = next(piece for piece in reversed(running) if piece.seq_id in self._places.running)
            if last is sequence:
                assert sequence is not running[0], "the first of the order does not fit the pool alone"
                return False
            self._places.set_aside(last)
        if needed:
            self._tables.grow(sequence, slots)
        return True

    # Round 3

    def _admit(self, left: int) -> list[Slice]:
        places = self._places
        slices: list[Slice] = []
        if not left or not len(places.waiting):
            return slices
        spare = self._spare_pages()
        while left and not places.is_full and (entry := places.first_waiting()) is not None:
            sequence = entry[1]
            found = self._tables.find(sequence)
            needed = self._needed_pages(sequence, found)
            if places.running and needed > spare:
                break
            places.seat(sequence, found)
            spare -= needed + 1
            share = _portion(sequence, left)
            left -= share
            if not share:
                break
            self._tables.grow(sequence, sequence.num_computed + share)
            slices.append(self._slice(sequence, share))
        return slices

    def _spare_pages(self) -> int:
        """Available pages that nobody who runs will need soon: neither for tokens that are known
        already, nor one more each to grow into. Admitting beyond that would end in preemptions."""
        missing = self._tables.missing
        promised = sum(missing(piece, piece.num_tokens) + 1 for piece in self._places.running.values())
        return self._tables.pool.available - promised

    def _needed_pages(self, sequence: Sequence, found: list[int]) -> int:
        """Available pages that seating a sequence uses up: new ones, and found ones nobody holds."""
        unheld = sum(1 for page in found if self._tables.pool.references[page] == 0)
        return self._tables.pages_for(sequence.num_tokens) - len(found) + unheld

    def _slice(self, sequence: Sequence, share: int) -> Slice:
        start, end = sequence.num_computed, sequence.num_computed + share
        known = len(sequence.tokens)
        window = sequence.window
        num_window = max(0, end - known)
        assert num_window in (0, len(window.tokens)), "a window is computed whole or not at all"
        num_logits = 0 if end < known else min(share, 1 + num_window)
        if sequence.wants_prompt_logits:
            num_logits = max(num_logits, end - max(start, sequence.num_reached))
        sent = sequence.num_pages_sent
        sequence.num_pages_sent = len(sequence.pages)
        new_pages = tuple(sequence.pages[sent:])
        tokens = tuple(sequence.tokens[start:end])
        if not num_window:
            positions = range(start, end)
            return Slice(sequence.seq_id, start, tokens, positions, sent, new_pages, num_logits)
        return Slice(
            seq_id=sequence.seq_id,
            start=start,
            tokens=tokens + window.tokens,
            positions=(*range(start, known), *(known + depth for depth in window.depths)),
            first_new_page=sent,
            new_pages=new_pages,
            num_logits=num_logits,
            num_window=num_window,
            visibility=window.visibility,
            ancestors=window.ancestors,
        )


def _portion(sequence: Sequence, room: int) -> int:
    """How many tokens to compute, at most `room`. The last committed token goes with the window: its
    logits and the window's are one question to the decoding method. If that does not fit, tokens
    before it go alone."""
    wanted = sequence.num_tokens - sequence.num_computed
    if wanted <= room:
        return wanted
    left = len(sequence.tokens) - sequence.num_computed
    if sequence.window.tokens:
        left -= 1
    return max(0, min(left, room))
