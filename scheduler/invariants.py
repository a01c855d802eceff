"""An independent checker: recomputes every fact of a scheduler from scratch, by the plainest means.

It shares no code with what it checks but the key functions' definition, and it is slow: for tests and
simulations. Every AssertionError names the fact that does not hold.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from scheduler.plan import Tier
from scheduler.prefix import group_key, page_key
from scheduler.spans import NO_PAGE
from scheduler.types import SequenceState

if TYPE_CHECKING:
    from scheduler.plan import StepPlan
    from scheduler.scheduler import Scheduler
    from scheduler.types import Sequence


def check(scheduler: Scheduler) -> None:
    """Raises AssertionError naming the first fact that does not hold. Call it between two steps."""
    _check_pool(scheduler)
    _check_owners(scheduler)
    _check_tiers(scheduler)
    _check_queues(scheduler)
    _check_tenants(scheduler)
    _check_requests(scheduler)
    for sequence in scheduler._sequences.values():
        _check_sequence(scheduler, sequence)
    _check_order(scheduler)


def check_empty(scheduler: Scheduler) -> None:
    """Every sequence has ended: nothing of any of them may be left anywhere."""
    check(scheduler)
    places, pool, tiers = scheduler._places, scheduler._pool, scheduler._tiers
    assert not scheduler.has_work, "work is left"
    assert not scheduler._sequences, "a sequence is left"
    assert not scheduler._requests, "a request is left"
    assert not scheduler._unserved, "a request is still counted as waiting"
    assert not len(scheduler._deadlines), "a deadline is left"
    assert not scheduler._ended_at_once, "an end is not reported"
    assert not places.running, "a place is taken"
    assert not len(places.waiting), "the queue is not empty"
    assert not places.waiting._levels, "a level is not empty"
    assert not places.parked, "a sequence is parked"
    assert not places._behind, "somebody is waited for"
    assert not len(places._put_aside), "somebody may become overdue"
    assert not places.preempted, "a preemption is not reported"
    assert not scheduler._tenants.active, "a tenant is left"
    assert scheduler._backlog.total_s == 0.0, "service is expected by nobody"
    assert not tiers.in_flight, "a copy is in flight"
    assert not tiers.fetches, "pages are fetched for nobody"
    assert not tiers._going_up, "pages go up without a copy"
    assert not tiers._unwanted, "a copy that ended is unwanted"
    assert pool.num_held == 0, "a page is held by nobody"
    assert getattr(scheduler._policy, "_num_live", 0) == 0, "the policy counts one that is gone"


def check_decisions(
    scheduler: Scheduler, plan: StepPlan, running_before: set[int], waiting_before: set[int]
) -> None:
    """Facts across one plan, called before its slices are applied.

    Whoever was preempted comes after the one who needed the room. Overtaking is bounded: within a
    tenant, whoever got a place arrived at most the largest head start after anyone who waited then and
    waits still, unless it had been put aside for too long.
    """
    places, sequences = scheduler._places, scheduler._sequences
    for entry in plan.preempted:
        first, last = sequences[entry.for_seq_id], sequences[entry.seq_id]
        assert places.order(first) < places.order(last), f"{entry.seq_id} gave way to a later one"
    waiting = [piece for piece in places.waiting if piece.seq_id in waiting_before]
    for number, sequence in places.running.items():
        if number in running_before or sequence.is_overdue:
            continue
        same_tenant = [piece.arrival_s for piece in waiting if piece.tenant == sequence.tenant]
        late_s = sequence.arrival_s - min(same_tenant, default=float("inf"))
        bound_s = scheduler._policy.max_head_start_s
        assert late_s <= bound_s + 1e-9, f"overtaken by someone {late_s} s younger; the bound is {bound_s}"
    for sequence in places.waiting:
        paused_s = scheduler._clock() - sequence.waiting_since_s if sequence.num_preemptions else 0.0
        too_long = paused_s > scheduler.config.max_pause_s
        assert sequence.is_overdue or not too_long, f"{sequence.seq_id} paused for {paused_s} s"
    _check_shared(scheduler, plan)
    _check_copies(scheduler, plan)


def check_entered(scheduler: Scheduler, tenant: str, served_before: dict[str, float]) -> None:
    """After a request of the tenant was accepted: who comes to those that stayed (`served_before`: the
    counters of the active tenants) brings no claim from before."""
    entered = scheduler._tenants.active.get(tenant)
    if served_before and tenant not in served_before and entered is not None:
        least = min(served_before.values())
        assert entered.served_s >= least, f"tenant {tenant!r} comes with {entered.served_s} s, not {least} s"


def _check_shared(scheduler: Scheduler, plan: StepPlan) -> None:
    starts = {piece.seq_id: piece.start for piece in plan.slices}
    grouped = [number for group in plan.shared for number in group.seq_ids]
    assert len(grouped) == len(set(grouped)), "a sequence in two groups"
    for group in plan.shared:
        assert len(group.seq_ids) > 1, "a group of one"
        assert group.num_pages * scheduler.config.page_size >= scheduler.config.min_shared_tokens
        tables = [scheduler._sequences[number].pages[:: len(scheduler.spans)] for number in group.seq_ids]
        assert len({tuple(pages[: group.num_pages]) for pages in tables}) == 1, (
            "a group that shares other pages"
        )
        assert scheduler.spans[0] == 0, "layers that do not see all of it share a prefix"
        for number in group.seq_ids:
            assert starts[number] >= group.num_pages * scheduler.config.page_size, "shared before computed"


def _check_copies(scheduler: Scheduler, plan: StepPlan) -> None:
    """What copies write is in no page table; what they read is not written by the step."""
    written = {copy.target_page for copy in plan.copies if copy.target is Tier.DEVICE}
    read = {copy.source_page for copy in plan.copies if copy.source is Tier.DEVICE}
    for piece in plan.slices:
        sequence = scheduler._sequences[piece.seq_id]
        assert written.isdisjoint(sequence.pages), "a page is used before its copy has landed"
        computed = sequence.pages[piece.start // scheduler.config.page_size * len(scheduler.spans) :]
        assert read.isdisjoint(computed), "a page is written while it is copied"


def _check_pool(scheduler: Scheduler) -> None:
    pool = scheduler._pool
    free, cached = set(pool.free), set(pool.cached)
    held = {page for page in range(pool.num_pages) if pool.references[page] > 0}
    assert len(free) == len(pool.free), "a page is free twice"
    assert len(free | cached | held) == len(free) + len(cached) + len(held), "a page is in two places"
    assert len(free) + len(cached) + len(held) == pool.num_pages, "a page is lost"
    assert all(count >= 0 for count in pool.references), "a reference count is negative"
    assert pool.available == len(free) + len(cached), "available = free + cached"
    assert {page: key for key, page in pool.page_of.items()} == pool.key_of, "key and page disagree"
    assert cached <= pool.key_of.keys(), "a cached page cannot be found"
    assert not free & pool.key_of.keys(), "a free page can be found"


def _check_owners(scheduler: Scheduler) -> None:
    sequences = scheduler._sequences.values()
    counted = Counter(page for piece in sequences for page in piece.pages if page != NO_PAGE)
    for copy in scheduler._tiers.in_flight.values():
        counted.update([copy.source_page] if copy.source is Tier.DEVICE else [])
        counted.update([copy.target_page] if copy.target is Tier.DEVICE else [])
    for page, references in enumerate(scheduler._pool.references):
        assert references == counted[page], f"page {page}: {references} references, {counted[page]} holders"


def _check_tiers(scheduler: Scheduler) -> None:
    tiers = scheduler._tiers
    copies = list(tiers.in_flight.values())
    assert len(copies) <= tiers._max_in_flight, "too many copies in flight"
    for tier in (tiers.host, tiers.disk):
        arriving = {copy.key: copy.target_page for copy in copies if copy.target is tier.tier}
        assert set(arriving) == tier.arriving, "content arrives without a copy"
        pages = [*tier.free, *tier.page_of.values(), *arriving.values()]
        assert sorted(pages) == list(range(tier.num_pages)), "a page of a tier is lost, or in two places"
        reading = Counter(copy.key for copy in copies if copy.source is tier.tier)
        assert reading == Counter(tier.reading), "content is read without a copy"
        assert reading.keys() <= tier.page_of.keys(), "content is evicted while it is read"
    going_up = {copy.key: copy.target_page for copy in copies if copy.target is Tier.DEVICE}
    assert going_up == tiers._going_up, "content goes up without a copy"
    for number, waits_for in tiers.fetches.items():
        assert number in scheduler._places.parked, "pages are fetched for one that is not parked"
        assert waits_for, "a fetch that waits for nothing"
        assert waits_for <= going_up.keys(), "a fetch waits for what does not come"
    assert len(tiers._put_aside) <= scheduler._pool.num_pages, "a page is offered twice"


def _check_queues(scheduler: Scheduler) -> None:
    places = scheduler._places
    waiting = {piece.seq_id for piece in places.waiting}
    running, parked = set(places.running), set(places.parked)
    held_back = {piece.seq_id for group in scheduler._requests.values() for piece in group.held_back}
    assert len(waiting) == len(places.waiting), "the queue is miscounted"
    together = len(waiting) + len(running) + len(parked) + len(held_back)
    assert waiting | running | parked | held_back == set(scheduler._sequences), "one is in no queue"
    assert together == len(scheduler._sequences), "a sequence is in two queues"
    assert len(running) <= scheduler.config.max_num_seqs, "more sequences than places"
    for number, sequence in scheduler._sequences.items():
        assert sequence.seq_id == number, "a sequence under another's number"
        assert sequence.state is _expected_state(number, running, parked), f"{number} is {sequence.state}"
        assert number in running or not sequence.pages, f"sequence {number} holds pages while it waits"
    behind = {piece.seq_id for group in places._behind.values() for _, piece in group}
    assert set(places._behind) <= running, "one is waited for that does not run"
    assert parked <= behind | set(scheduler._tiers.fetches), "parked for nothing"
    levels = Counter(piece.level for piece in places.waiting if not piece.is_overdue)
    assert levels == Counter(dict(places.waiting.by_level())), "waiting sequences are miscounted by level"


def _expected_state(number: int, running: set[int], parked: set[int]) -> SequenceState:
    if number in running:
        return SequenceState.RUNNING
    return SequenceState.PARKED if number in parked else SequenceState.WAITING


def _check_tenants(scheduler: Scheduler) -> None:
    live = Counter(piece.tenant for piece in scheduler._sequences.values())
    running = Counter(piece.tenant for piece in scheduler._places.running.values())
    tenants = scheduler._tenants.active
    assert live == Counter({name: tenant.num_live for name, tenant in tenants.items()}), "tenants miscounted"
    for name, tenant in tenants.items():
        assert tenant.num_running == running[name], f"tenant {name!r} runs {running[name]}"
        limit = scheduler.config.max_tenant_running
        assert not limit or running[name] <= limit, f"tenant {name!r} runs more than it may"


def _check_requests(scheduler: Scheduler) -> None:
    live = {}
    for request_id, group in scheduler._requests.items():
        assert group.request.request_id == request_id, "a request under another's id"
        assert group.live, "a request without a live choice"
        live.update({sequence.seq_id: sequence for sequence in group.live.values()})
        for index, sequence in group.live.items():
            assert sequence.index == index, "a choice under another's index"
        if group.held_back:
            leader = group.leader
            assert group.live.get(leader.index) is leader, "choices are held back for one that ended"
            assert leader not in group.held_back, "a choice is held back for itself"
            assert leader.num_reached < leader.prompt_len, "choices are held back for a computed prompt"
        timed = group.request.deadline_s is not None
        assert timed == (group.number in scheduler._deadlines), "deadlines do not match requests"
    assert live == scheduler._sequences, "a live sequence without its request"
    unserved = {
        request_id
        for request_id, group in scheduler._requests.items()
        if all(piece.first_scheduled_s is None for piece in group.live.values())
    }
    assert unserved >= scheduler._unserved, "a served request is counted as waiting"
    assert set(scheduler._unserved) <= set(scheduler._requests), "an ended request is counted as waiting"


def _check_sequence(scheduler: Scheduler, sequence: Sequence) -> None:
    name, size, num_groups = f"sequence {sequence.seq_id}", scheduler.config.page_size, len(scheduler.spans)
    prompt = list(sequence.request.prompt_ids)
    assert sequence.tokens[: len(prompt)] == prompt, f"{name}: its prompt has changed"
    assert len(sequence.tokens) <= scheduler.max_model_len, f"{name} is longer than the context"
    num_blocks = len(sequence.pages) // num_groups
    assert num_blocks * num_groups == len(sequence.pages), f"{name} lacks a page of some layers"
    assert sequence.num_computed <= num_blocks * size, f"{name}: computed beyond its pages"
    assert sequence.num_computed <= len(sequence.tokens), f"{name}: computed beyond its tokens"
    assert sequence.num_findable <= sequence.num_computed, f"{name}: more findable than computed"
    assert sequence.num_computed < sequence.num_tokens, f"{name} has nothing to compute"
    assert num_blocks * size < sequence.num_tokens + size, f"{name} holds idle pages"
    assert sequence.num_pages_sent <= len(sequence.pages), f"{name}: the engine knows too many pages"
    _check_holes(scheduler, sequence)
    parent = sequence.root_key
    for number in range(len(sequence.tokens) // size):
        parent = page_key(parent, sequence.tokens[number * size : (number + 1) * size])
        for group in range(num_groups):
            entry, key = number * num_groups + group, group_key(parent, group) if group else parent
            if entry < len(sequence.page_keys):
                assert sequence.page_keys[entry] == key, f"{name}: key {entry} does not match its tokens"
            if number < sequence.num_findable // size:
                found = scheduler._pool.key_of.get(sequence.pages[entry])
                assert found in (None, key), f"{name}: page {entry} can be found as other content"
    for page in sequence.pages[sequence.num_findable // size * num_groups :]:
        assert page not in scheduler._pool.key_of, f"{name}: private page {page} can be found"


def _check_holes(scheduler: Scheduler, sequence: Sequence) -> None:
    """A page is let go of when no token from the last full page's end on sees one of its slots."""
    name, size = f"sequence {sequence.seq_id}", scheduler.config.page_size
    held = [page for page in sequence.pages if page != NO_PAGE]
    assert len(set(held)) == len(held), f"{name} holds a page twice"
    next_token = sequence.num_computed // size * size
    for entry, page in enumerate(sequence.pages):
        number, group = divmod(entry, len(scheduler.spans))
        span, last_slot = scheduler.spans[group], number * size + size - 1
        is_seen = not span or last_slot > next_token - span
        assert is_seen == (page != NO_PAGE), f"{name}: page {entry} is held for nothing, or lost"


def _check_order(scheduler: Scheduler) -> None:
    """Heads of levels and their order, found by looking at everyone."""
    policy, places = scheduler._policy, scheduler._places
    for sequence in scheduler._sequences.values():
        head_start_s = sequence.arrival_s - policy.key(sequence.level, sequence.arrival_s)
        assert policy.max_head_start_s == float("inf") or (
            -1e-6 <= head_start_s <= policy.max_head_start_s + 1e-6
        ), f"a head start of {head_start_s} s is out of bounds"
    if places.epoch == policy.epoch:
        for sequence in places.running.values():
            assert sequence.order == places.order(sequence), f"{sequence.seq_id} is out of order"
    may_run, tenants = scheduler._tenants.may_run, scheduler._tenants.active
    eligible = [piece for piece in places.waiting if may_run(tenants[piece.tenant])]
    first = places.waiting.first()
    if not eligible:
        assert first is None, "a tenant that runs enough has its turn"
        return
    assert first is not None, "somebody waits and nobody has the turn"
    own = [places.order(piece) for piece in eligible if piece.tenant == first.tenant]
    assert places.order(first) == min(own), "a tenant's turn goes to one that is not its first"
    if len({piece.tenant for piece in eligible}) > 1 and not first.is_overdue:
        key_s = min(places.order(piece)[0] for piece in eligible)
        levels = {piece.level for piece in eligible if places.order(piece)[0] == key_s}
        least = {
            min(tenants[piece.tenant].served_s for piece in eligible if piece.level == level)
            for level in levels
        }
        assert tenants[first.tenant].served_s in least, "a turn goes to a tenant that was served more"
