"""Who is to blame for a step that raises: its slices are computed apart, halves first, then alone."""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.runner import Outcome
    from scheduler.plan import Slice, StepPlan


class Fault(NamedTuple):
    """What a slice raised that was computed alone; or a whole step, as text: the exception would keep what
    was allocated for it."""

    cause: str  # the name of the exception's type
    report: str  # with its traceback

    @classmethod
    def of(cls, failure: Exception) -> Fault:
        return cls(type(failure).__name__, "".join(traceback.format_exception(failure)).rstrip())


class Bisected(NamedTuple):
    """Of each slice its outcome or its fault, in the order of the plan. `first`: what the step as a whole
    raised; None: nothing, it was computed at once."""

    found: list[Outcome | Fault]
    first: Fault | None

    @property
    def is_lost(self) -> bool:
        """Nothing could be computed."""
        return all(isinstance(one, Fault) for one in self.found)


def bisect(plan: StepPlan, execute: Callable[[StepPlan], tuple[Outcome, ...]]) -> Bisected:
    """`execute` is called at most 2 n - 1 times for n slices, again for those of a call that
    raised. Rows do not depend on each other: whoever is computed has the bits of an undisturbed step."""
    found: list[Outcome | Fault] = []
    first: Fault | None = None
    parts: list[tuple[Slice, ...]] = [plan.slices]  # the next one last
    while parts:
        part = parts.pop()
        fault = None
        try:
            found += execute(_part(plan, part))
        except Exception as failure:
            fault = Fault.of(failure)
        # Not within the handler: memory may have been short, and the exception holds on to some.
        if fault is None:
            continue
        first = first or fault
        if len(part) == 1:
            found.append(fault)
        else:
            middle = len(part) // 2
            parts += [part[middle:], part[:middle]]
    return Bisected(found, first)


def _part(plan: StepPlan, slices: tuple[Slice, ...]) -> StepPlan:
    if len(slices) == len(plan.slices):
        return plan
    return replace(plan, slices=slices, preempted=(), copies=(), shared=())
