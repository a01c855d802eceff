"""Whether asking a drafter pays: what its drafts have gained of late against the time that guessing takes.

Guessing happens between two steps and makes all of them wait. So a source of drafts is asked for those
sequences only for which it is expected to gain more tokens than would be committed in the same time without
it. Whoever is not asked is tried again, as traffic changes, after ever longer pauses: trials take at most
1 / `SHORTEST_PAUSE` of the time, and soon much less.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scheduler.clock import Clock

NEWEST_SHARE = 0.02  # of a step in what is known of a source; more while little is known
OWN_SHARE = 0.1  # of a guess in what is known of a sequence
FIRST_GAIN = 1.0  # tokens that are expected of a guess before anything is known: hopeful, so that it is tried
FIRST_STEPS = 1  # that weigh as much as that hope
RELAXING = 0.001  # of a sequence that gained less than others, back to what they gain, with each step
FORGETTING = 0.95  # of the seconds of all earlier calls, with each call
SHORTEST_PAUSE, LONGEST_PAUSE = 400.0, 3200.0  # until the next trial, in times of what the last one took
BORNE_BY = 32  # calls that bear the time of reading a prompt, the first ones most
MOST_READING = 128  # calls in a row that only read: more are of prompts that come faster than they are read
CHEAP = 0.1  # tokens
PROBED = 4  # sequences of a trial where a guess is known to be that cheap; otherwise one


@dataclass(slots=True)
class _CallTime:
    """seconds = fixed + each * sequences, by least squares over the calls, the latest most."""

    calls: float = 0.0
    sequences: float = 0.0
    squares: float = 0.0
    seconds: float = 0.0
    products: float = 0.0

    def note(self, count: int, seconds: float) -> None:
        self.calls = self.calls * FORGETTING + 1.0
        self.sequences = self.sequences * FORGETTING + count
        self.squares = self.squares * FORGETTING + count * count
        self.seconds = self.seconds * FORGETTING + seconds
        self.products = self.products * FORGETTING + count * seconds

    def fixed_and_each(self) -> tuple[float, float]:
        """Both at least 0. Where all calls were alike, all of their time counts as each sequence's."""
        if not self.calls:
            return 0.0, 0.0
        spread = self.calls * self.squares - self.sequences**2
        if spread <= 1e-6 * self.calls * self.squares:
            return 0.0, self.seconds / self.sequences
        each = (self.calls * self.products - self.sequences * self.seconds) / spread
        each = min(max(0.0, each), self.seconds / self.sequences)
        return (self.seconds - each * self.sequences) / self.calls, each

    def expected_s(self, count: int) -> float:
        fixed_s, each_s = self.fixed_and_each()
        return fixed_s + each_s * count


@dataclass(slots=True)
class _Trials:
    """Of a source, at whatever load."""

    pause: float = SHORTEST_PAUSE
    next_s: float = 0.0

    def rest(self, now_s: float, trial_s: float, *, told: bool = True) -> None:
        """Until the next one. A trial that has `told` nothing, as it only read, makes no pause longer."""
        self.next_s = now_s + self.pause * trial_s
        if told:
            self.pause = min(2 * self.pause, LONGEST_PAUSE)


@dataclass(slots=True)
class _Source:
    time: _CallTime = field(default_factory=_CallTime)
    trials: _Trials = field(default_factory=_Trials)
    gain: float = FIRST_GAIN  # tokens of a guess, whether any of it was computed or not
    num_steps: int = 0  # in which it was asked
    own: dict[int, float] = field(default_factory=dict)  # the same of each sequence
    is_paying: bool = False
    debt_s: float = 0.0  # of reading prompts, not yet counted as time of guesses
    num_reading: int = 0  # calls in a row, the latest ones, that only read

    def note_gain(self, gain: float) -> None:
        """Of a step."""
        self.num_steps += 1
        share = max(NEWEST_SHARE, 1 / (self.num_steps + FIRST_STEPS))
        self.gain += share * (gain - self.gain)

    def relax(self, sequences: Iterable[int]) -> None:
        """Who did not pay may pay later: a text changes."""
        for seq_id in sequences:
            if (before := self.own.get(seq_id)) is not None and before < self.gain:
                self.own[seq_id] = before + RELAXING * (self.gain - before)


class Yields:
    """Of each source of drafts, by name: a drafter whose guesses cost a forward pass, or several whose cost
    next to nothing together. What steps have taught counts for their load: the fuller a batch, the fewer
    drafts pay. A load that is new is taken to be like the nearest one that is known."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._loads: dict[int, dict[str, _Source]] = {}  # by the load's binary order of magnitude
        self.at(1)

    def at(self, num_committed: int) -> None:
        """The step to come commits so many tokens without drafts."""
        self._load = num_committed.bit_length()
        self._sources = self._loads.setdefault(self._load, {})

    def worth_asking(self, name: str, rivals: dict[int, float], tokens_per_s: float) -> list[int]:
        """`rivals`: sequences that the source could be asked for, and the tokens that are expected of drafts
        that are there already. `tokens_per_s`: of the step as it would be. -> those to ask it for"""
        source = self._sources.get(name) or self._meet(name)
        fixed_s, each_s = source.time.fixed_and_each()
        price, fixed_price = each_s * tokens_per_s, fixed_s * tokens_per_s
        own, gain = source.own, source.gain
        surplus = {seq_id: own.get(seq_id, gain) - rival - price for seq_id, rival in rivals.items()}
        asked = [seq_id for seq_id, tokens in surplus.items() if tokens > 0]
        if source.time.calls and asked and sum(surplus[seq_id] for seq_id in asked) > fixed_price:
            source.is_paying, source.trials.pause = True, SHORTEST_PAUSE
            if len(asked) < len(surplus):
                source.relax(surplus)
            return asked
        source.relax(surplus)
        if source.is_paying:
            source.is_paying = False
            source.trials.rest(self._clock(), source.time.expected_s(1))
        if self._clock() < source.trials.next_s:
            return []
        num_probed = PROBED if source.time.calls and price + fixed_price < CHEAP else 1
        return sorted(surplus, key=surplus.__getitem__)[-num_probed:]

    def _meet(self, name: str) -> _Source:
        """At this load."""
        known = [load for load, sources in self._loads.items() if name in sources]
        source = _Source()
        if known:
            near = self._loads[min(known, key=lambda load: abs(load - self._load))][name]
            source = _Source(replace(near.time), near.trials, near.gain)
        self._sources[name] = source
        return source

    def is_paying(self, name: str) -> bool:
        """Else it is only tried."""
        return self._sources[name].is_paying

    def took(self, name: str, num_asked: int, seconds: float, *, num_behind: int = 0) -> None:
        """What asking for so many took. A source reads a prompt before it can guess (it is `num_behind` with
        so many of them) for all guesses that follow: they bear that time, each a part. Where none follows for
        very long, reading bears it, and gains nothing."""
        source = self._sources[name]
        guesses = num_behind < num_asked
        source.num_reading = 0 if guesses else source.num_reading + 1
        never_guesses = source.num_reading > MOST_READING
        guessing_s = seconds
        if num_behind:
            guessing_s = min(seconds, source.time.expected_s(num_asked)) if guesses else 0.0
            source.debt_s += seconds - guessing_s
        if guesses or never_guesses:
            share_s = source.debt_s / BORNE_BY
            source.debt_s -= share_s
            source.time.note(num_asked, guessing_s + share_s)
        if never_guesses:
            source.note_gain(0.0)
        if not source.is_paying:
            source.trials.rest(self._clock(), seconds, told=guesses)

    def gained(self, name: str, asked: Iterable[tuple[int, float]]) -> None:
        """(sequence, tokens) of all that the source was asked for in this step: drafts that stood, less what
        its drafts cost."""
        source = self._sources[name]
        gains = dict(asked)
        for seq_id, gain in gains.items():
            before = source.own.get(seq_id, source.gain)
            source.own[seq_id] = before + OWN_SHARE * (gain - before)
        if gains:
            # Texts of one step are often alike: together they count once.
            source.note_gain(sum(gains.values()) / len(gains))

    def release(self, seq_id: int) -> None:
        for sources in self._loads.values():
            for source in sources.values():
                source.own.pop(seq_id, None)
