"""A scheduler under test, with an engine that always says the same token."""

from __future__ import annotations

from typing import Any

from scheduler.clock import ManualClock
from scheduler.config import SchedulerConfig
from scheduler.costs import CostModel
from scheduler.invariants import check
from scheduler.lengths import Lengths
from scheduler.plan import Advance, Copied, Copy, Progress, Slice, StepPlan
from scheduler.scheduler import Scheduler
from scheduler.types import EMPTY_WINDOW, Request, SamplingParams, Visibility, Window

TOKEN = 7


def request(name: str, prompt: int | tuple[int, ...] = 4, **fields: Any) -> Request:
    """A request; sampling fields and request fields may be mixed. An int is a prompt of that length
    that no other name shares."""
    if isinstance(prompt, int):
        base = 1000 * (1 + sum(name.encode()))
        prompt = tuple(range(base, base + prompt))
    sampling = {key: fields.pop(key) for key in list(fields) if key in SamplingParams.__slots__}
    return Request(request_id=name, prompt_ids=prompt, sampling=SamplingParams(**sampling), **fields)


def line(*tokens: int) -> Window:
    return Window(tokens, tuple(range(len(tokens))))


def block(*tokens: int) -> Window:
    return Window(tokens, tuple(range(len(tokens))), Visibility.ALL)


class Driver:
    """Copies between tiers stay under way until `land` is called."""

    def __init__(
        self,
        max_model_len: int = 64,
        costs: CostModel | None = None,
        lengths: Lengths | None = None,
        spans: tuple[int, ...] = (0,),
        **config: Any,
    ) -> None:
        # Pages are promised to nobody for output that is only expected: tests bring shortages about.
        scarce = {"policy": "fcfs", "page_size": 4, "num_pages": 16, "max_num_seqs": 4, "growth_share": 0.0}
        settings = scarce | config
        self.clock = ManualClock()
        self.scheduler = Scheduler(
            SchedulerConfig(**settings), self.clock, max_model_len, costs, lengths, spans=spans
        )
        self.names: dict[int, str] = {}
        self.under_way: list[Copy] = []

    def add(self, *requests: Request) -> None:
        for one in requests:
            self.scheduler.add(one)
            check(self.scheduler)

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        check(self.scheduler)
        self.under_way += plan.copies
        for piece in plan.slices:
            owner = self.scheduler.sequence(piece.seq_id)
            self.names[piece.seq_id] = f"{owner.request.request_id}.{owner.index}"
        return plan

    def answer(self, piece: Slice, window: Window = EMPTY_WINDOW) -> Advance:
        """One token at the end of the known ones, no draft accepted."""
        known = len(piece.tokens) - piece.num_window
        at_end = piece.start + known == len(self.scheduler.sequence(piece.seq_id).tokens)
        return Advance(piece.seq_id, (TOKEN,) if at_end else (), known, window if at_end else EMPTY_WINDOW)

    def apply(self, plan: StepPlan, *advances: Advance) -> tuple[Progress, ...]:
        progress = self.scheduler.apply(plan, advances or [self.answer(piece) for piece in plan.slices])
        check(self.scheduler)
        return progress

    def step(self, window: Window = EMPTY_WINDOW) -> dict[str, Slice]:
        """One step; the slices by "request.choice"."""
        plan = self.plan()
        self.apply(plan, *[self.answer(piece, window) for piece in plan.slices])
        return {self.names[piece.seq_id]: piece for piece in plan.slices}

    def counts(self) -> dict[str, int]:
        """Like step, but only how many tokens each computed."""
        return {name: len(piece.tokens) for name, piece in self.step().items()}

    def land(self, ok: bool = True) -> None:
        """All copies under way end."""
        landed, self.under_way = self.under_way, []
        self.scheduler.copied([Copied(copy.number, ok) for copy in landed])
        check(self.scheduler)

    def set_aside(self, seq_id: int) -> None:
        """Preempt a sequence, as if its place were needed."""
        sequence = self.scheduler.sequence(seq_id)
        self.scheduler._places.set_aside(sequence, "place", sequence)

    def forget_cached_content(self) -> None:
        """Overwrite every page that nobody holds."""
        pool = self.scheduler._pool
        pool.release(pool.take(pool.available))

    def finish(self, max_steps: int = 300) -> list[Progress]:
        news: list[Progress] = []
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return news
            self.land()
            news += self.scheduler.expire()
            news += self.apply(self.plan())
        raise AssertionError("the scheduler does not come to an end")
