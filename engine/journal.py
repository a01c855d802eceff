"""What each request in flight has been told: enough to continue it on a new engine process."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from engine.messages import Abort, SequenceOutput, Submit

if TYPE_CHECKING:
    from scheduler.types import Request


class JournalEntry:
    """One request. Tokens are recorded as they are delivered; a replay begins where they end.

    The noise of a place is a function of the seed, so the replayed stream goes on with the same text.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.delivered: list[list[int]] = [list(tokens) for tokens in request.delivered]
        self.delivered += [[] for _ in range(request.num_choices - len(self.delivered))]
        self.live = set(range(request.num_choices))
        self.aborted: dict[int, Abort] = {}  # by choice
        self.begun = False  # the current engine process has computed some of it, or was about to
        self.deaths_without_progress = 0  # of engines that had this request and delivered nothing of it
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
        if output.tokens or output.prompt_logprobs or output.finish is not None:
            self.deaths_without_progress = 0
        return output

    def replay(self) -> list[Submit | Abort]:
        """Messages that make a new engine go on where the old one was lost."""
        self._num_rescored = 0
        self.begun = False
        delivered = tuple(tuple(tokens) for tokens in self.delivered)
        request = replace(self.request, delivered=delivered, readmitted=True)
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
