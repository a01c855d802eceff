"""What each request in flight has been told, enough to continue it on a new engine process; and which of them
the engine may be given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from engine.blame import Blame, Verdict
from engine.messages import Abort, SequenceOutput, Submit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scheduler.types import Request

Sink = Callable[[SequenceOutput], None]


class JournalEntry:
    """One request. Tokens are recorded as they are delivered; a replay begins where they end.

    The noise of a place is a function of the seed, so the replayed stream goes on with the same text.
    """

    def __init__(self, request: Request, sink: Sink) -> None:
        self.request = request
        self.sink = sink
        self.delivered: list[list[int]] = [list(tokens) for tokens in request.delivered]
        self.delivered += [[] for _ in range(request.num_choices - len(self.delivered))]
        self.live = set(range(request.num_choices))
        self.aborted: dict[int, Abort] = {}  # by choice
        self.given = False  # to the current engine process
        self.begun = False  # which has computed some of it, or was about to
        self._was_given = False  # to any
        self._num_scored = 0  # prompt log-probabilities delivered, ever
        self._num_rescored = 0  # seen from the current engine process

    def record(self, output: SequenceOutput) -> SequenceOutput | None:
        """Take an output into account -> what the stream should hear of it, or None."""
        if output.index not in self.live:
            return None
        self.delivered[output.index].extend(output.tokens)
        if output.finish is not None:
            self.live.discard(output.index)
        if output.prompt_logprobs:
            output = self._without_repeats(output)
        return output

    def give(self) -> list[Submit | Abort]:
        """Messages that make a new engine go on where the old one was lost."""
        self._num_rescored = 0
        request = self.request
        if self._was_given:  # an engine took it, so that none may refuse it for its load
            delivered = tuple(tuple(tokens) for tokens in self.delivered)
            request = replace(request, delivered=delivered, readmitted=True)
        self.given = self._was_given = True
        ended = sorted((set(range(request.num_choices)) - self.live) | self.aborted.keys())
        aborts = (self.aborted.get(index, Abort(request.request_id, index)) for index in ended)
        return [Submit(request), *aborts]

    def _without_repeats(self, output: SequenceOutput) -> SequenceOutput:
        """A new engine scores the prompt from its beginning again."""
        scores = output.prompt_logprobs or ()
        repeated = max(0, min(len(scores), self._num_scored - self._num_rescored))
        self._num_rescored += len(scores)
        self._num_scored = max(self._num_scored, self._num_rescored)
        return msgspec.structs.replace(output, prompt_logprobs=scores[repeated:] or None)


class Journal:
    """All requests in flight. What it returns is to be sent to the engine, in that order; while there is
    none, or while it is to be found out who kills engines, requests are held here."""

    def __init__(self) -> None:
        self.entries: dict[str, JournalEntry] = {}
        self.advanced = False  # somebody got on since an engine died
        self._blame = Blame()
        self._is_up = False

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def patient(self) -> bool:
        """Whether the engine shall be given more time than usual."""
        return self._blame.patient

    def add(self, request: Request, sink: Sink) -> list[Submit | Abort]:
        self.entries[request.request_id] = JournalEntry(request, sink)
        return self._give_all([request.request_id])

    def abort(self, message: Abort) -> list[Submit | Abort]:
        """Of a whole request no more is heard. An unknown one is ignored."""
        entry = self.entries.get(message.request_id)
        if entry is None:
            return []
        sent: list[Submit | Abort] = [message] if entry.given else []
        if message.index is not None:
            entry.aborted[message.index] = message
            return sent
        del self.entries[message.request_id]
        return sent + self._clear(message.request_id)

    def begun(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if request_id in self.entries:
                self.entries[request_id].begun = True

    def record(
        self, output: SequenceOutput
    ) -> tuple[SequenceOutput | None, Sink | None, list[Submit | Abort]]:
        """-> what the stream should hear of it, how, and whom the engine may be given now"""
        entry = self.entries.get(output.request_id)
        news = entry.record(output) if entry is not None else None
        if entry is None or news is None:
            return None, None, []
        if not entry.live:
            del self.entries[output.request_id]
        if not (news.tokens or news.prompt_logprobs or news.finish is not None):
            return news, entry.sink, []
        self.advanced = True
        return news, entry.sink, self._clear(output.request_id)

    def resume(self) -> list[Submit | Abort]:
        """A new engine is ready."""
        self._is_up = True
        return self._give_all(self.entries)

    def lost(self, *, outside: bool, stalled: bool = False) -> tuple[Verdict, JournalEntry | None]:
        """The engine is gone. `outside`: somebody ended it; `stalled`: it was killed for its silence. -> who
        is blamed, who is no more in flight for it."""
        self._is_up = self.advanced = False
        begun = [name for name, entry in self.entries.items() if entry.begun]
        if not begun:  # it may have ended before it could say of whom
            begun = [name for name, entry in self.entries.items() if entry.given]
        for entry in self.entries.values():
            entry.given = entry.begun = False
        if outside:
            self._blame.spare()
            return Verdict(), None
        verdict = self._blame.judge(begun, stalled=stalled)
        return verdict, self.entries.pop(verdict.culprit) if verdict.culprit is not None else None

    def _clear(self, request_id: str) -> list[Submit | Abort]:
        return self._give_all(self.entries) if self._blame.clear(request_id) else []

    def _give_all(self, request_ids: Iterable[str]) -> list[Submit | Abort]:
        """Those who may be given and are not."""
        messages: list[Submit | Abort] = []
        for request_id in request_ids if self._is_up else ():
            entry = self.entries[request_id]
            if not entry.given and self._blame.may_be_given(request_id):
                self._blame.give()
                messages += entry.give()
        return messages
