"""The scheduler: accepts requests, decides each step, and takes in what the step made.

It knows no decoding mode and no device. One thread calls it, in this cycle:

    add, abort, copied ...  ->  expire()  ->  plan()  ->  (the engine computes)  ->  apply()

Every choice of an accepted request gets exactly one `Progress` with a `finish`, from whichever call
ends it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.agenda import Agenda
from scheduler.backlog import Backlog
from scheduler.choices import Choices, commit, finish_at_once, max_tokens_of
from scheduler.costs import CostModel
from scheduler.lengths import Lengths
from scheduler.page_tables import PageTables
from scheduler.pages import PagePool
from scheduler.places import Places
from scheduler.plan import Advance, Copied, Progress, SchedulerStats, Slice, StepPlan
from scheduler.planning import Planner
from scheduler.policies import make_policy
from scheduler.prefix import root_key
from scheduler.refusal import RefusalReason, RequestRefused
from scheduler.sharing import shared_pages
from scheduler.spans import Spans
from scheduler.tenants import Tenants, parse_weights
from scheduler.tiers import Tiers
from scheduler.types import EMPTY_WINDOW, FinishReason, Request, Sequence, Visibility, Window

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from scheduler.clock import Clock
    from scheduler.config import SchedulerConfig

__all__ = ["RefusalReason", "RequestRefused", "Scheduler"]

BENEFIT_OF_DOUBT = 0.5  # of the predicted wait; costs and lengths are estimates
_COPYING_SHARE = 8  # at most 1 / 8 of the pages are held by copies in flight
_LEARNT_FROM = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT, FinishReason.DEADLINE)


class Scheduler:
    def __init__(
        self,
        config: SchedulerConfig,
        clock: Clock,
        max_model_len: int,
        costs: CostModel | None = None,
        lengths: Lengths | None = None,
        disk_index: Mapping[bytes, int] | None = None,
        spans: tuple[int, ...] = (0,),
    ) -> None:
        """Raises ValueError for an unknown policy or a wrong weight. `config.num_pages` must be known by
        now. `disk_index`: what the disk file holds already, by content key. `spans`: by group of the
        model's layers, the most tokens that a token sees there; 0, and those first: all before it."""
        assert config.num_pages > 0, "num_pages is not derived yet"
        self.config = config
        self.max_model_len = max_model_len
        self.costs = costs or CostModel()
        self.lengths = lengths or Lengths()
        self._clock = clock
        self._policy = make_policy(config, self.costs, clock, self.lengths)
        self._pool = PagePool(config.num_pages)
        in_flight = max(1, min(config.max_copies_in_flight, config.num_pages // _COPYING_SHARE))
        self._tiers = Tiers(
            self._pool,
            config.host_pages,
            config.disk_pages,
            in_flight,
            disk_index if config.prefix_cache else None,
        )
        self.spans = spans
        self._spans = Spans(spans, config.page_size)
        self._tables = PageTables(self._pool, self._tiers, self._spans)
        self._tenants = Tenants(parse_weights(config.tenant_weights), config.max_tenant_running)
        self._places = Places(
            self._policy, self._tables, self._tenants, clock, config.max_num_seqs, config.max_pause_s
        )
        self._planner = Planner(self._places, config, self.costs)
        self._backlog = Backlog(self.costs, config, self.lengths)
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
        self._refuse_too_late(choices.leader)
        self._next_seq_id += request.num_choices
        self._requests[request.request_id] = choices
        self._unserved.add(request.request_id)
        if request.deadline_s is not None:
            self._deadlines.push((request.deadline_s, choices.number), choices)
        ended = []
        for sequence in choices.live.values():
            self._sequences[sequence.seq_id] = sequence
            self._tenants.enter(request.tenant)
            finish = finish_at_once(sequence)
            if finish is not None:
                ended.append((sequence, finish))
            elif sequence is choices.leader:
                self._join(sequence)
            else:
                self._expect(sequence)
        # The leader goes last: its end would send the next one to the queue.
        self._ended_at_once += [self._end(sequence, finish) for sequence, finish in reversed(ended)]

    def copied(self, copied: Iterable[Copied]) -> None:
        """Copies of earlier plans have ended."""
        for copy in copied:
            for seq_id in self._tiers.ended(copy):
                self._places.unpark(seq_id)

    def abort(
        self, request_id: str, index: int | None = None, *, natural: bool = False
    ) -> tuple[Progress, ...]:
        """End one choice of a request, or all of them. What is not alive is ignored. `natural`: the text
        ended by itself, as whoever reads it has found."""
        choices = self._requests.get(request_id)
        if choices is None:
            return ()
        if index is None:
            return tuple(self._end_all(choices, FinishReason.ABORT, natural))
        if index not in choices.live:
            return ()
        return (self._end(choices.live[index], FinishReason.ABORT, natural=natural),)

    def expire(self) -> tuple[Progress, ...]:
        """End every request whose deadline has passed, waiting or running."""
        progress = self._take_ended_at_once()
        now_s = self._clock()
        while (entry := self._deadlines.first()) is not None and entry[0][0] <= now_s:
            progress += self._end_all(entry[1], FinishReason.DEADLINE)
        return tuple(progress)

    # Drafts

    def draftable(self, method: str) -> list[Sequence]:
        """Running sequences that the next plan would give one token to compute, the last committed one, and
        that decode by `method`: a window of drafts may be offered to them."""
        return [
            sequence
            for sequence in self._places.running.values()
            if sequence.request.method == method
            and sequence.num_computed == len(sequence.tokens) - 1
            and sequence.num_output
            and sequence.takes_drafts
            and not sequence.window.tokens
        ]

    def offer(self, seq_id: int, window: Window) -> None:
        """Let the next plan compute drafts for a draftable sequence, if there is room for them."""
        sequence = self._sequences[seq_id]
        assert window.optional, "only drafts are offered"
        assert not sequence.window.tokens, "drafts beside a window"
        sequence.window = window

    def without_drafts(self) -> tuple[list[tuple[int, int]], int]:
        """About what the next step computes of those who run, each (start, tokens), and how many tokens it
        commits."""
        left = self.config.max_num_batched_tokens
        slices, num_committed = [], 0
        for sequence in self._places.running.values():
            wanted = sequence.num_tokens - sequence.num_computed
            share = min(wanted, left)
            left -= share
            num_committed += share == wanted
            if share:
                slices.append((sequence.num_computed, share))
        return slices, num_committed

    def room_for_drafts(self) -> int:
        """Drafts that fit into the next step beside what those who run want computed."""
        wanted = sum(one.num_tokens - one.num_computed for one in self._places.running.values())
        room = self.config.max_num_batched_tokens - wanted
        spare_blocks = self._pool.available // self._spans.num_groups
        return max(0, min(room, spare_blocks * self.config.page_size))

    def most_drafts(self, sequence: Sequence) -> int:
        """Drafts that a sequence can use: one token is committed without any."""
        return sequence.max_output - sequence.num_output - 1

    # The step

    def plan(self) -> StepPlan:
        """Decide one step. Without slices there is nothing to compute, and `apply` may be skipped; then
        everything that is alive waits for copies in flight, or there is nothing."""
        assert self._in_flight is None, "the last plan was not applied"
        slices = self._planner.slices()
        self._note_first_service(slices)
        preempted = tuple(self._places.preempted)
        self._places.preempted.clear()
        self._num_steps += 1
        shared = shared_pages(self._tables, self._sequences, slices, self.config.min_shared_tokens)
        plan = StepPlan(self._num_steps, tuple(slices), preempted, self._tiers.take_copies(), shared)
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
        """Whether another step, or a call of `expire` or `copied`, would bring news."""
        return bool(self._sequences or self._ended_at_once or self._tiers.in_flight)

    def stats(self) -> SchedulerStats:
        places, pool, tiers = self._places, self._pool, self._tiers
        return SchedulerStats(
            num_running=len(places.running),
            num_waiting=len(self._sequences) - len(places.running),
            num_parked=len(places.parked),
            num_pages=pool.num_pages,
            num_pages_held=pool.num_held,
            num_pages_cached=len(pool.cached),
            prefix_query_tokens=places.query_tokens,
            prefix_hit_tokens=places.hit_tokens,
            num_preempted_for_places=places.num_preempted["place"],
            num_preempted_for_pages=places.num_preempted["pages"],
            num_resumed_kept=places.num_resumed["kept"],
            num_resumed_fetched=places.num_resumed["fetched"],
            num_resumed_recomputed=places.num_resumed["recomputed"],
            recomputed_tokens=self._recomputed_tokens,
            num_pages_up=tiers.num_up,
            num_overdue=places.num_overdue,
            longest_pause_s=places.longest_pause_s,
            backlog_s=self._backlog.total_s,
            head_start_gamma=self._policy.gamma,
            levels=places.counts.stats(places.waiting.by_level(), places.running.values()),
            tiers=(tiers.host.stats(), tiers.disk.stats()) if tiers.enabled else (),
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
        num_pages, chunk = self.config.num_pages, self.config.max_num_batched_tokens
        if self._spans.most_pages(longest, chunk) > num_pages:
            capacity = self._spans.longest(num_pages, chunk, longest)
            message = f"prompt and output may need {longest} tokens, but the KV pages hold {capacity}"
            raise RequestRefused(RefusalReason.MEMORY, message, longest, capacity)

    def _refuse_unwelcome(self, request: Request) -> None:
        """What cannot be served now. What an earlier engine process accepted is accepted."""
        if request.request_id in self._requests:
            raise RequestRefused(RefusalReason.DUPLICATE, f"request id {request.request_id!r} is in use")
        free_places = self.config.max_num_seqs - len(self._places.running)
        limit = self.config.max_queued_requests + free_places
        if len(self._unserved) >= limit and not request.readmitted:
            message = f"{len(self._unserved)} requests wait, the most that may (max_queued_requests)"
            wait_s = self._backlog.total_s / max(1, len(self._sequences))
            raise RequestRefused(RefusalReason.QUEUE_FULL, message, len(self._unserved) + 1, limit, wait_s)

    def _refuse_too_late(self, sequence: Sequence) -> None:
        """A deadline that cannot be met, by what is known of costs and lengths. The estimate favours the
        newcomer: little output, and only those waited for who surely precede it."""
        deadline_s = sequence.request.deadline_s
        if deadline_s is None or sequence.request.readmitted:
            return
        sequence.num_found = self._tables.num_slots(self._tables.find(sequence))
        sequence.level = self._policy.level(sequence)
        left_s = deadline_s - self._clock()
        wait_s = self._wait_s(sequence.level)
        needed_s = wait_s * BENEFIT_OF_DOUBT + self._backlog.alone_s(sequence)
        if needed_s > left_s:
            message = f"the request would take {needed_s:.2f} s, and its deadline is in {left_s:.2f} s"
            raise RequestRefused(RefusalReason.DEADLINE, message, needed_s, left_s, wait_s)

    def _wait_s(self, level: int) -> float:
        """Until a newcomer of the level has a place: the service of those who wait before it."""
        if not self._places.is_full and not len(self._places.waiting):
            return 0.0
        running = self._places.running.values()
        return self._backlog.ahead_s(level) - sum(one.backlog_s for one in running if one.level <= level)

    def _make_choices(self, request: Request) -> Choices:
        number = self._next_seq_id
        private_to = None if self.config.prefix_cache else number
        root = root_key(Visibility.CAUSAL, request.cache_salt, private_to)
        live = {}
        for index in range(request.num_choices):
            delivered = request.delivered[index] if index < len(request.delivered) else ()
            tokens = [*request.prompt_ids, *delivered]
            live[index] = Sequence(
                number + index,
                request,
                index,
                tokens,
                max_output=max_tokens_of(request, self.max_model_len) - len(request.prompt_ids),
                root_key=root,
                num_known=len(tokens),
            )
        leader, *others = live.values()
        return Choices(request, number, live, held_back=others, leader=leader)

    def _expect(self, sequence: Sequence) -> None:
        """It is held back, and will find the full pages of the prompt: those nobody has to wait for."""
        size = self.config.page_size
        sequence.num_found = (sequence.prompt_len - 1) // size * size
        sequence.level = self._policy.level(sequence)
        self._backlog.add(sequence)

    def _join_held_back(self, choices: Choices) -> None:
        for sequence in choices.held_back:
            self._join(sequence)
        choices.held_back.clear()

    def _join(self, sequence: Sequence) -> None:
        self._places.join(sequence)
        self._backlog.add(sequence)
        expected = self._backlog.expected_output(sequence) * self.config.growth_share
        sequence.num_expected = sequence.prompt_len + sequence.num_output + int(expected)

    # Advancing

    def _note_first_service(self, slices: list[Slice]) -> None:
        for piece in slices:
            if piece.first_new_page:
                continue  # it has a table
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
        if advance.spoiled:
            sequence.window, sequence.takes_drafts = EMPTY_WINDOW, False
            self._tables.trim(sequence)
            return None
        num_before = len(sequence.tokens)
        reached_end = piece.start + len(piece.tokens) - piece.num_window == num_before
        assert reached_end or not advance.committed, "tokens committed from the middle of known ones"
        finish = commit(sequence, advance.committed)
        self._take_in(sequence, piece, advance.num_valid)
        if reached_end:
            sequence.window = advance.window
        tokens = tuple(sequence.tokens[num_before:])
        if finish is not None:
            return self._end(sequence, finish, tokens)
        if sequence.window.tokens and (unfit := self._unfit_window(sequence)) is not None:
            return self._end(sequence, FinishReason.ERROR, tokens, unfit)
        assert sequence.num_computed < sequence.num_tokens, "a live sequence with nothing to compute"
        if piece.num_window:
            self._tables.trim(sequence)
        choices = self._requests[sequence.request.request_id]
        if choices.held_back and sequence is choices.leader and sequence.num_reached >= sequence.prompt_len:
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
        if self._spans.slide:
            self._tables.slide(sequence, since=start)
        reached = sequence.num_reached
        if start < reached:
            self._recomputed_tokens += min(reached, end) - start
        if reached < sequence.num_computed:
            sequence.num_reached = sequence.num_computed
        if start < sequence.num_known:
            self._places.unpark_behind(sequence, sequence.num_computed)
        self._charge(sequence, max(start, reached), end)

    def _charge(self, sequence: Sequence, start: int, end: int) -> None:
        """Attribute the service of tokens that were computed for the first time: what a preemption makes a
        sequence compute again is not its fault."""
        if end <= start:
            return
        seconds = self.costs.slice(start, end - start) + self.costs.step_s / self.config.max_num_seqs
        sequence.attained_s += seconds
        self._tenants.charge(sequence.request.tenant, seconds)
        if sequence.num_output >= sequence.next_change or sequence.num_reached < sequence.num_known:
            self._places.relevel(sequence)
        self._backlog.served(sequence, seconds)

    def _unfit_window(self, sequence: Sequence) -> str | None:
        """What to say of a window that the pool cannot hold even when the sequence is alone."""
        num_window = len(sequence.window.tokens)
        assert num_window < self.config.max_num_batched_tokens, "the window exceeds every step"
        num_pages, chunk = self.config.num_pages, self.config.max_num_batched_tokens
        if self._spans.most_pages(sequence.num_tokens, chunk) <= num_pages:
            return None
        capacity = self._spans.longest(num_pages, chunk, sequence.num_tokens)
        return f"a window of {num_window} tokens makes {sequence.num_tokens}; the KV pages hold {capacity}"

    # Ending

    def _end(
        self,
        sequence: Sequence,
        finish: FinishReason,
        tokens: tuple[int, ...] = (),
        error: str | None = None,
        natural: bool = False,
    ) -> Progress:
        """The only way out: every holder of the sequence's state lets go of it."""
        choices = self._requests[sequence.request.request_id]
        self._places.leave(sequence)
        has_waited = self._backlog.remove(sequence) and sequence not in choices.held_back
        self._tenants.leave(sequence.request.tenant)
        ended_before = sequence.request.readmitted and sequence.first_scheduled_s is None
        if has_waited and finish in _LEARNT_FROM and not ended_before:
            natural = natural or finish is FinishReason.STOP
            if self._policy.lengths is None:
                self.lengths.observe(sequence.tenant, sequence.prompt_len, sequence.num_output, natural)
            self._policy.learn(sequence, natural)
        del self._sequences[sequence.seq_id]
        del choices.live[sequence.index]
        if sequence in choices.held_back:
            choices.held_back.remove(sequence)
        if sequence is choices.leader and sequence.num_reached >= sequence.prompt_len:
            self._join_held_back(choices)
        elif sequence is choices.leader and choices.held_back:
            choices.leader = choices.held_back.pop(0)
            self._join(choices.leader)
        if not choices.live:
            del self._requests[sequence.request.request_id]
            self._unserved.discard(sequence.request.request_id)
            self._deadlines.discard(choices.number)
        return _progress(sequence, tokens, finish, error)

    def _end_all(self, choices: Choices, finish: FinishReason, natural: bool = False) -> list[Progress]:
        """The leader goes last: its end would send the next one to the queue."""
        live = [choices.live[index] for index in sorted(choices.live, reverse=True)]
        return [self._end(sequence, finish, natural=natural) for sequence in live][::-1]

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
        sequence.seq_id,
        sequence.request.request_id,
        sequence.index,
        tokens,
        finish,
        sequence.tokens[-1] if finish is FinishReason.STOP else None,
        error,
        sequence.num_cached,
        sequence.first_scheduled_s,
    )
