"""One step, decided: who computes which tokens, into which pages.

A plan is made in three rounds:

1. Seats. Under a preemptive policy, waiting sequences that precede a running one take a place, and if need
   be the places and pages of those behind them.
2. Shares. The token budget is dealt out: to sequences with few tokens left first, so that a decode never
   waits for someone's chunk; what remains goes to chunks in policy order. The first sequence of the order is
   sure of a part. Then pages are provided strictly in policy order; when none is left, somebody behind is
   preempted. It has no slice yet, for slices are made from the front.
3. Leftovers. If nobody was preempted, and tokens, places and pages are left beyond the reserve and what those
   who run are expected to grow into, waiting sequences are admitted in policy order.

Before a sequence is seated it is parked if what it needs is on its way: a common prefix that somebody ahead
of it computes just now, or pages that lie in a lower tier, come up faster than they would be computed, and
have room.

Victims. For a place the last of the order goes; for pages one of the lowest level, the cheapest to restore
among its last ones. In round 1 a victim must come later than its beneficiary by more than restoring it
takes, and few may be put aside at a time. Who was for too long (`max_pause_s`) has the next place that
comes free, so pauses stay short. It displaces others, who are not overdue, only if they are cheap to
restore: else where pages are few each one put aside would put aside the next, and the machine would compute
the same tokens over and over.

Why somebody always gets on. Let F be the first of the order among the running. Round 2 gives F at least one
token, and everyone else's pages if F needs them; `Scheduler.add` refuses what does not fit the pool alone,
and `apply` ends a sequence whose window does not. So F is never preempted by someone behind it and computes
in every plan, but for one whose pages a copy in flight still holds; copies end by themselves. Of two
sequences only the later one is ever preempted for the other, so while the order stands F's turn ends after
finitely many steps. The order changes with service, of which there is a finite amount, when one becomes
overdue, which happens once to each, and with the policy's knob, which moves ever less often than requests
end. Within a tenant who arrived later by more than the largest head start never comes first, so there are
finitely many turns before any given sequence; where the head start is unbounded (`priority`, `srpt`) one may
starve, but the machine never stands still. With an order that is not preemptive, a waiting sequence that
precedes all running ones stops admissions, the running ones end, and it is seated. If nobody runs, the first
waiting one is seated in round 3: alone it fits. Who is parked waits for one who ran ahead of it when it was
parked and who computes or lets it go, or for copies; it fetches again only if it found more than before. No
deadlock, no livelock.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING

from scheduler.room import Room
from scheduler.sharing import Frontier
from scheduler.slicing import make_slice, portion
from scheduler.types import EMPTY_WINDOW

if TYPE_CHECKING:
    from scheduler.agenda import Order
    from scheduler.config import SchedulerConfig
    from scheduler.costs import CostModel
    from scheduler.page_tables import PageTables
    from scheduler.places import Places
    from scheduler.plan import Slice
    from scheduler.types import Sequence

PARKED_PER_PLACE = 2  # no more are parked, or one prefix that a whole queue shares would park it at once
ASIDE_SHARE = 8  # no more than 1 / ASIDE_SHARE of the places are owed to sequences put aside for others
COPIED_AHEAD = 4  # running sequences, the last in order, whose pages are copied down before they are taken,
COPY_AHEAD_SHARE = 4  # when less than 1 / COPY_AHEAD_SHARE of all pages is available
OVERDUE_COST_SHARE = 50  # at most 1 / 50 of the time is spent on restoring whom overdue ones displaced
MAX_COMPARED_VICTIMS = 16  # of the lowest level, the last in order, whose cost to restore is compared


class Planner:
    def __init__(self, places: Places, config: SchedulerConfig, costs: CostModel) -> None:
        self._places = places
        self._tables: PageTables = places.tables
        self._room = Room(places, config)
        self._config = config
        self._costs = costs
        self._budget = config.max_num_batched_tokens
        self._max_aside = max(1, config.max_num_seqs // ASIDE_SHARE)
        self._overdue_may_cost_s = overdue_may_cost_s(config.max_pause_s, config.max_num_seqs)
        self._reserve = int(config.reserve_share * config.num_pages)
        self._frontier: Frontier | None = None  # made when somebody may be seated

    def slices(self) -> list[Slice]:
        self._frontier = None
        preempted = len(self._places.preempted)
        self._places.call_overdue()
        ranked = self._seat_those_ahead(self._places.by_policy())
        slices, left = self._serve_running(ranked)
        if self._tables.tiers.enabled:
            self._copy_ahead(ranked)
        if len(self._places.preempted) == preempted:
            slices += self._admit(left)
        return slices

    # Round 1

    def _seat_those_ahead(self, ranked: list[Sequence]) -> list[Sequence]:
        """-> all who run now, in policy order"""
        places = self._places
        if not places.policy.preemptive or not len(places.waiting):
            return ranked
        behind = ranked
        claimed = 0
        past_overdue = False  # nobody makes room for them: places that come free are theirs
        while claimed < self._budget and behind and not (past_overdue and not places.is_full):
            sequence = self._next(past_overdue=past_overdue)
            if sequence is None:
                break
            order = places.order(sequence)
            if behind[-1].order < order:
                break
            found = self._tables.find(sequence)
            if self._waits_for_another(sequence, found):
                continue
            victims = self._victims(sequence, order, found, behind)
            if victims is None and sequence.is_overdue:
                past_overdue = True
                continue
            if victims is None:
                break
            if victims and victims[-1][0] == "place" and self._fetches(sequence, found):
                continue  # the place is taken when the pages are there
            for reason, victim in victims:
                places.set_aside(victim, reason, sequence)
            if victims:
                behind = [one for one in behind if one.seq_id in places.running]
            if not self._fetches(sequence, found):  # there is room for its pages now
                self._seat(sequence, found)
                claimed += sequence.num_tokens - sequence.num_computed
        return places.by_policy() if claimed else behind

    def _victims(
        self, sequence: Sequence, order: Order, found: list[int], behind: list[Sequence]
    ) -> list[tuple[str, Sequence]] | None:
        """Who must go, and for what, so that `sequence` has a place and pages; none if there is room.
        None if only somebody ahead of it could make the room, or it would cost too much."""
        places = self._places
        num_seated = len(places.running) + 1  # with it
        allowed = self._max_aside - len(places.aside)
        victims: list[tuple[str, Sequence]] = []
        left = list(behind)
        cost_s = 0.0
        spare: int | None = None  # looked at when there is a place: it takes a walk
        while True:
            reason = "place"
            if num_seated - len(victims) <= places.max_num_seqs:
                reason = "pages"
                if spare is None:
                    spare = self._room.spare_now() - self._room.needed_now(sequence, found)
                    spare += sum(self._room.back(victim, found) for _, victim in victims)
                if spare >= 0:
                    return victims
            if not left or (len(victims) >= allowed and not sequence.is_overdue):
                return None
            victim, restore_s = self._choose(left, cheapest=reason == "pages")
            if not order[0] + restore_s < victim.order[0]:
                return None
            cost_s += restore_s
            if sequence.is_overdue and cost_s > self._overdue_may_cost_s:
                return None
            left.remove(victim)
            victims.append((reason, victim))
            if spare is not None:
                spare += self._room.back(victim, found)

    def _choose(self, candidates: list[Sequence], cheapest: bool) -> tuple[Sequence, float]:
        """The victim among these (in policy order), and the seconds that restoring it will take."""
        if not cheapest or self._config.victims == "last":
            return candidates[-1], self._restore_s(candidates[-1])
        lowest = max(one.level for one in candidates)
        compared = [one for one in candidates if one.level == lowest][-MAX_COMPARED_VICTIMS:]
        priced = [(one, self._restore_s(one)) for one in reversed(compared)]
        return min(priced, key=itemgetter(1))

    def _restore_s(self, victim: Sequence) -> float:
        """What it takes to bring back what the sequence has computed, if it loses its pages."""
        tables, size = self._tables, self._tables.page_size
        num_below = 0
        if tables.tiers.enabled:
            on_host = tables.tiers.host.page_of.__contains__
            num_below = tables.reach(victim, on_host, victim.num_findable // size)
        num_lost = victim.num_computed - num_below * size
        config = self._config
        recompute_s = self._costs.prefill(
            num_below * size, num_lost, config.max_num_batched_tokens, config.max_num_seqs
        )
        num_pages = num_below * tables.num_groups - tables.spans.num_unseen(num_below)
        return num_pages * self._costs.host_page_s + recompute_s

    # Round 2

    def _serve_running(self, ranked: list[Sequence]) -> tuple[list[Slice], int]:
        running, size = self._places.running, self._tables.page_size
        num_groups = self._tables.num_groups
        shares, left = self._share_tokens(ranked)
        left = self._share_with_drafts(ranked, shares, left)
        slices = []
        for number, sequence in enumerate(ranked):
            share = shares[number]
            if not share or sequence.seq_id not in running:
                continue
            fits = (sequence.num_computed + share) * num_groups <= len(sequence.pages) * size
            if fits or self._provide(ranked, number, share):
                slices.append(make_slice(sequence, share))
        return slices, left

    def _share_tokens(self, running: list[Sequence]) -> tuple[list[int], int]:
        """Tokens for each of `running` (in policy order), and what is left of the budget.

        "Few" is up to a page of committed tokens, and the window. A longer head of the order has a
        quarter of the budget set apart, so that the decodes behind it cannot starve it either.
        """
        few = self._tables.page_size
        left = self._budget
        shares = []
        chunks = []
        for k, sequence in enumerate(running):
            known = len(sequence.tokens) - sequence.num_computed
            share = 0
            if known <= few:
                share = known if sequence.window.optional else known + len(sequence.window.tokens)
                if share > left:
                    share = portion(sequence, left)
            else:
                chunks.append(k)
                if k == 0:
                    share = portion(sequence, max(1, left // 4))
            left -= share
            shares.append(share)
        for k in chunks:
            share = portion(running[k], left + shares[k])
            left -= share - shares[k]
            shares[k] = share
        return shares, left

    def _share_with_drafts(self, running: list[Sequence], shares: list[int], left: int) -> int:
        """Drafts get tokens and pages that none of `running` needs, behind them or before; who gets none
        computes without. -> what is left of the budget"""
        drafting = [k for k, sequence in enumerate(running) if sequence.window.optional]
        if not drafting:
            return left
        missing = self._tables.missing
        lacked = [missing(one, one.num_computed + share) for one, share in zip(running, shares, strict=True)]
        spare = max(0, self._tables.pool.available - sum(lacked))
        for k in drafting:
            sequence = running[k]
            drafts = len(sequence.window.tokens)
            pages = missing(sequence, sequence.num_computed + shares[k] + drafts) - lacked[k]
            if not shares[k] or drafts > left or pages > spare:
                sequence.window = EMPTY_WINDOW
                continue
            shares[k] += drafts
            left -= drafts
            spare -= pages
        return left

    def _provide(self, ranked: list[Sequence], number: int, share: int) -> bool:
        """Pages for the next `share` tokens of one running sequence, if need be from somebody behind it.
        False: nobody is behind it; it keeps what it has, and waits for this step."""
        sequence = ranked[number]
        slots = sequence.num_computed + share
        needed = self._tables.missing(sequence, slots)
        while self._tables.pool.available < needed:
            behind = [one for one in ranked[number + 1 :] if one.seq_id in self._places.running]
            if not behind:
                assert number or self._tables.tiers.in_flight, "the first of the order does not fit the pool"
                return False
            victim, _ = self._choose(behind, cheapest=True)
            self._places.set_aside(victim, "pages", sequence)
        if needed:
            self._tables.grow(sequence, slots)
        return True

    def _copy_ahead(self, ranked: list[Sequence]) -> None:
        """When pages run short, those of the last in order begin to be copied down before they are taken:
        once they are, it is too late."""
        tables, running = self._tables, self._places.running
        num_groups = tables.num_groups
        if tables.pool.available * COPY_AHEAD_SHARE > tables.pool.num_pages:
            return
        for sequence in ranked[-COPIED_AHEAD:]:
            full_pages = sequence.num_findable // tables.page_size * num_groups
            if sequence.seq_id in running and sequence.num_offered < full_pages:
                pages = tables.held(sequence.pages[sequence.num_offered : full_pages])
                tables.tiers.put_aside(pages, sequence.order[0])
                sequence.num_offered = full_pages

    # Round 3

    def _admit(self, left: int) -> list[Slice]:
        places = self._places
        slices: list[Slice] = []
        if not len(places.waiting) or not left or places.is_full:
            return slices
        spare = self._room.spare()
        while left and not places.is_full and (sequence := self._next()) is not None:
            found = self._ready(sequence)
            if found is None:
                spare = self._room.spare()
                continue
            needed = self._room.needed(sequence, found)
            if needed > spare - self._reserve and (places.running or needed > self._tables.pool.available):
                break
            self._seat(sequence, found)
            spare -= needed
            share = portion(sequence, left)
            left -= share
            if not share:
                break
            self._tables.grow(sequence, sequence.num_computed + share)
            slices.append(make_slice(sequence, share))
        return slices

    # Seating

    def _next(self, *, past_overdue: bool = False) -> Sequence | None:
        """Whose turn it is. With many parked, nobody's: they come first, and they wait for those who run or
        for copies, which end."""
        places = self._places
        if len(places.parked) >= PARKED_PER_PLACE * places.max_num_seqs:
            return None
        return places.waiting.first(past_overdue=past_overdue)

    def _ready(self, sequence: Sequence) -> list[int] | None:
        """The pages found for the first of the queue; None: it is parked until there are more."""
        found = self._tables.find(sequence)
        if self._waits_for_another(sequence, found) or self._fetches(sequence, found):
            return None
        return found

    def _waits_for_another(self, sequence: Sequence, found: list[int]) -> bool:
        places = self._places
        num_found = len(found) // self._tables.num_groups
        if self._frontier is None:
            self._frontier = Frontier(self._tables, places.running.values())
        shared = self._frontier.computing_for(sequence, num_found, self._config.min_shared_tokens)
        if shared is None or shared[0].seq_id not in places.running:
            return False
        if not places.order(shared[0]) < places.order(sequence):
            return False
        places.park_behind(sequence, *shared)
        return True

    def _fetches(self, sequence: Sequence, found: list[int]) -> bool:
        tables, tiers = self._tables, self._tables.tiers
        if not tiers.enabled:
            return False
        num_found = len(found) // tables.num_groups
        num_blocks, keys = tables.find_below(sequence)
        num_there = num_blocks * tables.num_groups - tables.spans.num_unseen(num_blocks) - len(keys)
        if num_blocks <= num_found or num_there <= sequence.fetched_after:
            return False
        if self._room.needed(sequence, found) > self._room.spare():
            return False
        costs, config = self._costs, self._config
        computing_s = costs.prefill(
            num_found * tables.page_size,
            (num_blocks - num_found) * tables.page_size,
            config.max_num_batched_tokens,
            config.max_num_seqs,
        )
        if tiers.seconds(keys, costs.host_page_s, costs.disk_page_s) >= computing_s:
            return False
        tables.touch(sequence, num_blocks)
        if not tiers.fetch(sequence.seq_id, keys):
            return False
        sequence.fetched_after = num_there
        self._places.park(sequence)
        return True

    def _seat(self, sequence: Sequence, found: list[int]) -> None:
        self._places.seat(sequence, found)
        if self._frontier is not None:
            self._frontier.add(sequence)


def overdue_may_cost_s(max_pause_s: float, num_places: int) -> float:
    """What it may cost to restore all whom one overdue sequence displaces. In each `max_pause_s` about as
    many become overdue as may be put aside."""
    return max_pause_s / max(1, num_places // ASIDE_SHARE) / OVERDUE_COST_SHARE
