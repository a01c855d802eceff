"""The scheduler: accepts requests, decides each step, and takes in what the step made.

It knows no decoding mode and no device. One thread calls it, in this cycle:

    add, abort ...  ->  expire()  ->  plan()  ->  (the engine computes)  ->  apply()

Every choice of an accepted request gets exactly one `Progress` with a `finish`, from whichever call
ends it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.agenda import Agenda
from scheduler.choices import Choices, commit, finish_at_once, max_tokens_of
from scheduler.page_tables import PageTables
from scheduler.pages import PagePool
from scheduler.places import Places
from scheduler.plan import Advance, Progress, SchedulerStats, Slice, StepPlan
from scheduler.planning import Planner
from scheduler.policies import make_policy
from scheduler.prefix import root_key
from scheduler.refusal import RefusalReason, RequestRefused
from scheduler.types import FinishReason, Request, Sequence, Visibility

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scheduler.clock import Clock
    from scheduler.config import SchedulerConfig

__all__ = ["RefusalReason", "RequestRefused", "Scheduler"]


class Scheduler:
    def __init__(self, config: SchedulerConfig, clock: Clock, max_model_len: int) -> None:
        """Raises ValueError for an unknown policy. `config.num_pages` must be known by now."""
        assert config.num_pages > 0, "num_pages is not derived yet"
        self.config = config
        self.max_model_len = max_model_len
        self._clock = clock
        self._policy = make_policy(config)
        self._pool = PagePool(config.num_pages)
        self._tables = PageTables(self._pool, config.page_size)
        self._places = Places(self._policy, self._tables, config.max_num_seqs)
        self._planner = Planner(self._places, config.max_num_batched_tokens)
        self._requests: dict[str, Choices] = {}
        self._sequences: dict[int, Sequence] = {}
        self._unserved: set[str] = set()  # requests of which nothing was ever computed
        self._deadlines: Agenda[Choices] = Agenda()
        self._ended_at_once: list[Progress] = []  # reported by the next expire() or apply()
        self._in_flight: StepPlan | None = None
        self._num_steps = 0
        self._next_seq_id = 0
        self._recomputed_tokens = 0

    # What comes in

    def add(self, request: Request) -> None:
        """Accept a request. Raises RequestRefused; then nothing has changed."""
        self._refuse_unfit(request)
        self._refuse_unwelcome(request)
        choices = self._make_choices(request)
        self._requests[request.request_id] = choices
        self._unserved.add(request.request_id)
        if request.deadline_s is not None:
            self._deadlines.push((request.deadline_s, choices.number), choices)
        ended = []
        for sequence in choices.live.values():
            self._sequences[sequence.seq_id] = sequence
            finish = finish_at_once(sequence, max_tokens_of(request, self.max_model_len))
            if finish is not None:
                ended.append((sequence, finish))
            elif sequence is choices.leader:
                self._places.join(sequence)
        self._ended_at_once += [self._end(sequence, finish) for sequence, finish in ended]

    def abort(self, request_id: str, index: int | None = None) -> tuple[Progress, ...]:
        """End one choice of a request, or all of them. What is not alive is ignored."""
        choices = self._requests.get(request_id)
        if choices is None:
            return ()
        if index is None:
            return tuple(self._end_all(choices, FinishReason.ABORT))
        if index not in choices.live:
            return ()
        return (self._end(choices.live[index], FinishReason.ABORT),)

    def expire(self) -> tuple[Progress, ...]:
        """End every request whose deadline has passed, waiting or running."""
        progress = self._take_ended_at_once()
        now_s = self._clock()
        while (entry := self._deadlines.first()) is not None and entry[0][0] <= now_s:
            progress += self._end_all(entry[1], FinishReason.DEADLINE)
        return tuple(progress)

    # The step

    def plan(self) -> StepPlan:
        """Decide one step. Without slices there is nothing to compute, and `apply` may be skipped."""
        assert self._in_flight is None, "the last plan was not applied"
        slices = self._planner.slices()
        self._note_first_service(slices)
        preempted = tuple(self._places.set_aside_ids)
        self._places.set_aside_ids.clear()
        self._num_steps += 1
        plan = StepPlan(self._num_steps, tuple(slices), preempted)
        self._in_flight = plan if slices else None
        return plan

    def apply(self, plan: StepPlan, advances: Iterable[Advance]) -> tuple[Progress, ...]:
        """Take in what became of a plan's slices. Sequences that ended meanwhile are ignored; one
        without an advance stays where it was. An advance replaces the sequence's window, unless its
        slice stopped short of the last committed token."""
        assert plan is self._in_flight or not plan.slices, "not the plan in flight"
        self._in_flight = None
        progress = self._take_ended_at_once()
        slices = {piece.seq_id: piece for piece in plan.slices}
        for advance in advances:
            sequence = self._sequences.get(advance.seq_id)
            if sequence is not None:
                news = self._advance(sequence, slices[advance.seq_id], advance)
                if news is not None:
                    progress.append(news)
        return tuple(progress)

    # What can be seen

    def sequence(self, seq_id: int) -> Sequence:
        """A live sequence, to read. Raises KeyError when it has ended."""
        return self._sequences[seq_id]

    @property
    def has_work(self) -> bool:
        """Whether another step, or a call of `expire`, would bring news."""
        return bool(self._sequences or self._ended_at_once)

    def stats(self) -> SchedulerStats:
        places = self._places
        running_by_level = [0] * self._policy.num_levels
        for sequence in places.running.values():
            running_by_level[sequence.level] += 1
        return SchedulerStats(
            num_running=len(places.running),
            num_waiting=len(self._sequences) - len(places.running),
            num_pages=self._pool.num_pages,
            num_pages_held=self._pool.num_held,
            num_pages_cached=len(self._pool.cached),
            prefix_query_tokens=places.query_tokens,
            prefix_hit_tokens=places.hit_tokens,
            num_preemptions=places.num_preemptions,
            recomputed_tokens=self._recomputed_tokens,
            running_by_level=tuple(running_by_level),
            waiting_by_level=tuple(places.waiting_by_level),
        )

    # Accepting

    def _refuse_unfit(self, request: Request) -> None:
        """What can never be served, whatever the load."""
        prompt_len, sampling = len(request.prompt_ids), request.sampling
        if prompt_len < 1 or request.num_choices < 1:
            raise RequestRefused(RefusalReason.EMPTY, "a request needs a prompt and at least one choice")
        shortest = prompt_len + min(1, sampling.max_tokens)
        if shortest > self.max_model_len:
            message = f"the prompt has {prompt_len} tokens, of a context of {self.max_model_len}"
            raise RequestRefused(RefusalReason.CONTEXT, message, shortest, self.max_model_len)
        longest = max_tokens_of(request, self.max_model_len)
        capacity = self.config.num_pages * self.config.page_size
        if longest > capacity:
            message = f"prompt and output may need {longest} tokens, but the KV pages hold {capacity}"
            raise RequestRefused(RefusalReason.MEMORY, message, longest, capacity)

    def _refuse_unwelcome(self, request: Request) -> None:
        """What cannot be served now. A continued stream was accepted before, so it is not counted."""
        if request.request_id in self._requests:
            raise RequestRefused(RefusalReason.DUPLICATE, f"request id {request.request_id!r} is in use")
        free_places = self.config.max_num_seqs - len(self._places.running)
        limit = self.config.max_queued_requests + free_places
        if len(self._unserved) >= limit and not any(request.delivered):
            message = f"{len(self._unserved)} requests wait, the most that may (max_queued_requests)"
            raise RequestRefused(RefusalReason.QUEUE_FULL, message, len(self._unserved) + 1, limit)

    def _make_choices(self, request: Request) -> Choices:
        number = self._next_seq_id
        self._next_seq_id += request.num_choices
        private_to = None if self.config.prefix_cache else number
        root = root_key(Visibility.CAUSAL, request.cache_salt, private_to)
        live = {}
        for index in range(request.num_choices):
            delivered = request.delivered[index] if index < len(request.delivered) else ()
            tokens = [*request.prompt_ids, *delivered]
            live[index] = Sequence(number + index, request, index, tokens, root_key=root)
        leader, *others = live.values()
        return Choices(request, number, live, held_back=others, leader=leader)

    def _join_held_back(self, choices: Choices) -> None:
        for sequence in choices.held_back:
            self._places.join(sequence)
        choices.held_back.clear()

    # Advancing

    def _note_first_service(self, slices: list[Slice]) -> None:
        for piece in slices:
            sequence = self._sequences[piece.seq_id]
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = self._clock()
                self._places.query_tokens += sequence.prompt_len
                self._places.hit_tokens += sequence.num_cached
                self._unserved.discard(sequence.request.request_id)

    def _advance(self, sequence: Sequence, piece: Slice, advance: Advance) -> Progress | None:
        if advance.error is not None:
            self._tables.forget(sequence)
            return self._end(sequence, FinishReason.ERROR, error=advance.error)
        num_before = len(sequence.tokens)
        reached_end = piece.start + len(piece.tokens) - piece.num_window == num_before
        assert reached_end or not advance.committed, "tokens committed from the middle of known ones"
        limit = max_tokens_of(sequence.request, self.max_model_len)
        finish = commit(sequence, advance.committed, limit)
        self._take_in(sequence, piece, advance.num_valid)
        if reached_end:
            sequence.window = advance.window
        tokens = tuple(sequence.tokens[num_before:])
        if finish is not None:
            return self._end(sequence, finish, tokens)
        unfit = self._unfit_window(sequence)
        if unfit is not None:
            return self._end(sequence, FinishReason.ERROR, tokens, unfit)
        assert sequence.num_computed < sequence.num_tokens, "a live sequence with nothing to compute"
        self._tables.trim(sequence)
        if sequence.num_reached >= sequence.prompt_len:
            choices = self._requests[sequence.request.request_id]
            if sequence is choices.leader:
                self._join_held_back(choices)
        return _progress(sequence, tokens) if tokens else None

    def _take_in(self, sequence: Sequence, piece: Slice, num_valid: int) -> None:
        """Count the slice's valid KV as computed, let others find its full pages, charge for it."""
        num_known = len(piece.tokens) - piece.num_window
        assert num_known <= num_valid <= len(piece.tokens), "committed tokens stay valid"
        start, end = piece.start, piece.start + len(piece.tokens)
        # A stop inside the accepted part of a window leaves valid KV of tokens that were dropped.
        sequence.num_computed = min(start + num_valid, len(sequence.tokens))
        if sequence.num_findable == start:
            # Window tokens that saw later ones have KV that a causal computation would not give.
            causal = piece.visibility is not Visibility.ALL
            sequence.num_findable = sequence.num_computed if causal else start + num_known
            self._tables.publish(sequence, since=start)
        reached = sequence.num_reached
        self._recomputed_tokens += max(0, min(reached, end) - start)
        sequence.num_reached = max(reached, sequence.num_computed)
        self._policy.charge(sequence, max(0, end - max(start, reached)))

    def _unfit_window(self, sequence: Sequence) -> str | None:
        """What to say of a window that the pool cannot hold even when the sequence is alone."""
        num_window = len(sequence.window.tokens)
        assert num_window < self.config.max_num_batched_tokens, "the window exceeds every step"
        if not num_window or self._tables.pages_for(sequence.num_tokens) <= self._pool.num_pages:
            return None
        capacity = self.config.num_pages * self.config.page_size
        return f"a window of {num_window} tokens makes {sequence.num_tokens}; the KV pages hold {capacity}"

    # Ending

    def _end(
        self,
        sequence: Sequence,
        finish: FinishReason,
        tokens: tuple[int, ...] = (),
        error: str | None = None,
    ) -> Progress:
        """The only way out: every holder of the sequence's state lets go of it."""
        choices = self._requests[sequence.request.request_id]
        self._places.leave(sequence)
        del self._sequences[sequence.seq_id]
        del choices.live[sequence.index]
        if sequence in choices.held_back:
            choices.held_back.remove(sequence)
        if sequence is choices.leader and choices.held_back:
            choices.leader = choices.held_back.pop(0)
            self._places.join(choices.leader)
        if not choices.live:
            del self._requests[sequence.request.request_id]
            self._unserved.discard(sequence.request.request_id)
            self._deadlines.discard(choices.number)
        return _progress(sequence, tokens, finish, error)

    def _end_all(self, choices: Choices, finish: FinishReason) -> list[Progress]:
        """The leader goes last: its end would send the next one to the queue."""
        ended = [self._end(choices.live[index], finish) for index in sorted(choices.live, reverse=True)]
        return ended[::-1]

    def _take_ended_at_once(self) -> list[Progress]:
        ended, self._ended_at_once = self._ended_at_once, []
        return ended


def _progress(
    sequence: Sequence,
    tokens: tuple[int, ...],
    finish: FinishReason | None = None,
    error: str | None = None,
) -> Progress:
    return Progress(
        seq_id=sequence.seq_id,
        request_id=sequence.request.request_id,
        index=sequence.index,
        tokens=tokens,
        finish=finish,
        stop_token=sequence.tokens[-1] if finish is FinishReason.STOP else None,
        error=error,
        num_cached=sequence.num_cached,
        first_scheduled_s=sequence.first_scheduled_s,
    )
