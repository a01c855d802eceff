"""An independent checker: recomputes every fact of a scheduler from scratch, by the plainest means.

It shares no code with what it checks but the key functions' definition, and it is slow: for tests and
simulations. Every AssertionError names the fact that does not hold.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from scheduler.prefix import page_key
from scheduler.types import SequenceState

if TYPE_CHECKING:
    from scheduler.plan import StepPlan
    from scheduler.scheduler import Scheduler
    from scheduler.types import Sequence


def check(scheduler: Scheduler) -> None:
    """Raises AssertionError naming the first fact that does not hold. Call it between two steps."""
    _check_pool(scheduler)
    _check_owners(scheduler)
    _check_queues(scheduler)
    _check_requests(scheduler)
    for sequence in scheduler._sequences.values():
        _check_sequence(scheduler, sequence)
    _check_order(scheduler)


def check_empty(scheduler: Scheduler) -> None:
    """Every sequence has ended: nothing of any of them may be left anywhere."""
    check(scheduler)
    places, pool = scheduler._places, scheduler._pool
    assert not scheduler.has_work, "work is left"
    assert not scheduler._sequences, "a sequence is left"
    assert not scheduler._requests, "a request is left"
    assert not scheduler._unserved, "a request is still counted as waiting"
    assert not len(scheduler._deadlines), "a deadline is left"
    assert not scheduler._ended_at_once, "an end is not reported"
    assert not places.running, "a place is taken"
    assert not len(places.waiting), "the queue is not empty"
    assert not any(places.waiting_by_level), "a level is not empty"
    assert pool.num_held == 0, "a page is held by nobody"


def check_decisions(
    scheduler: Scheduler, plan: StepPlan, running_before: set[int], waiting_before: set[int]
) -> None:
    """Facts across one plan, called before its slices are applied.

    Nobody who computes comes after someone who was preempted. Overtaking is bounded: whoever got a
    place arrived at most the largest head start after anyone who waited then and waits still.
    """
    places, policy = scheduler._places, scheduler._policy
    computing = [policy.order(scheduler._sequences[piece.seq_id]) for piece in plan.slices]
    for number in plan.preempted:
        order = policy.order(scheduler._sequences[number])
        assert all(other < order for other in computing), f"sequence {number} gave way to a later one"
    started = [piece for number, piece in places.running.items() if number not in running_before]
    if not started:
        return
    passed_over = [piece for _, piece in places.waiting.entries() if piece.seq_id in waiting_before]
    earliest_s = min((piece.request.arrival_s for piece in passed_over), default=float("inf"))
    for sequence in started:
        late_s, bound_s = sequence.request.arrival_s - earliest_s, policy.max_head_start_s
        assert late_s <= bound_s + 1e-9, f"overtaken by someone {late_s} s younger; the bound is {bound_s}"


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
    counted = Counter(page for piece in scheduler._sequences.values() for page in piece.pages)
    for page, references in enumerate(scheduler._pool.references):
        assert references == counted[page], f"page {page}: {references} references, {counted[page]} holders"


def _check_queues(scheduler: Scheduler) -> None:
    places = scheduler._places
    waiting = {piece.seq_id for _, piece in places.waiting.entries()}
    running = set(places.running)
    held_back = {piece.seq_id for group in scheduler._requests.values() for piece in group.held_back}
    assert waiting.isdisjoint(running), "a sequence waits and runs"
    assert held_back.isdisjoint(waiting | running), "a sequence that is held back waits or runs"
    assert waiting | running | held_back == set(scheduler._sequences), "a live sequence is in no queue"
    assert len(running) <= scheduler.config.max_num_seqs, "more sequences than places"
    for number, sequence in scheduler._sequences.items():
        assert sequence.seq_id == number, "a sequence under another's number"
        expected = SequenceState.RUNNING if number in running else SequenceState.WAITING
        assert sequence.state is expected, f"sequence {number} is {sequence.state}"
        assert number in running or not sequence.pages, f"sequence {number} holds pages while it waits"
    levels = Counter(piece.level for _, piece in places.waiting.entries())
    counted = [levels[level] for level in range(scheduler._policy.num_levels)]
    assert counted == places.waiting_by_level, "waiting sequences are miscounted by level"


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
    name, size = f"sequence {sequence.seq_id}", scheduler.config.page_size
    prompt = list(sequence.request.prompt_ids)
    assert sequence.tokens[: len(prompt)] == prompt, f"{name}: its prompt has changed"
    assert len(sequence.tokens) <= scheduler.max_model_len, f"{name} is longer than the context"
    assert sequence.num_computed <= len(sequence.pages) * size, f"{name}: computed beyond its pages"
    assert sequence.num_computed <= len(sequence.tokens), f"{name}: computed beyond its tokens"
    assert sequence.num_findable <= sequence.num_computed, f"{name}: more findable than computed"
    assert sequence.num_computed < sequence.num_tokens, f"{name} has nothing to compute"
    assert len(sequence.pages) * size < sequence.num_tokens + size, f"{name} holds idle pages"
    assert sequence.num_pages_sent <= len(sequence.pages), f"{name}: the engine knows too many pages"
    assert len(set(sequence.pages)) == len(sequence.pages), f"{name} holds a page twice"
    parent = sequence.root_key
    for number in range(len(sequence.tokens) // size):
        parent = page_key(parent, sequence.tokens[number * size : (number + 1) * size])
        if number < len(sequence.page_keys):
            assert sequence.page_keys[number] == parent, f"{name}: key {number} does not match its tokens"
        if number < sequence.num_findable // size:
            found = scheduler._pool.key_of.get(sequence.pages[number])
            assert found in (None, parent), f"{name}: page {number} can be found as other content"
    for page in sequence.pages[sequence.num_findable // size :]:
        assert page not in scheduler._pool.key_of, f"{name}: private page {page} can be found"


def _check_order(scheduler: Scheduler) -> None:
    policy = scheduler._policy
    for order, sequence in scheduler._places.waiting.entries():
        assert order == policy.order(sequence), f"sequence {sequence.seq_id} waits out of its order"
    for sequence in scheduler._sequences.values():
        head_start_s = sequence.request.arrival_s - policy.order(sequence)[0]
        assert -1e-9 <= head_start_s <= policy.max_head_start_s + 1e-9, "a head start is out of bounds"
        assert 0 <= sequence.level < policy.num_levels, "a level that is none"
