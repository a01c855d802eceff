"""From the engine's tokens to text: one mailbox per request, one merging slot and one reader per choice.

The sink only merges; everything that costs time happens in the consumer, piece by piece. What a choice
says does not depend on how its tokens were bundled: the reader goes token by token. What nobody has
fetched yet counts in the budget of `server.buffers`, beyond which the largest holder is ended.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from scheduler.types import FinishReason
from server.detokenizer import IncrementalDetokenizer
from server.errors import ApiError
from server.refusals import Refusal, engine_error
from server.stops import StopMatcher

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from engine.client import EngineClient
    from engine.messages import SequenceOutput, TokenLogprobs
    from scheduler.types import Request
    from server.admission import Ticket
    from server.buffers import Outgoing
    from server.metrics import Metrics
    from server.tokenizer import Tokenizer

MAX_READ_TOKENS = 256  # of a choice at once: a few milliseconds, with 20 alternatives each
# Of what is held per token, per alternative of its log-probabilities; measured, see the test
TOKEN_BYTES, LOGPROBS_BYTES, ALTERNATIVE_BYTES = 128, 256, 120


def _nothing() -> None: ...


def token_bytes(request: Request) -> int:
    """What a token of the request takes until it is sent."""
    wanted = (request.sampling.logprobs, request.sampling.prompt_logprobs)
    counts = [count for count in wanted if count is not None]
    return TOKEN_BYTES + (LOGPROBS_BYTES + ALTERNATIVE_BYTES * max(counts) if counts else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How the tokens of a request become text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    min_tokens: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    discard_output: bool = False  # only the prompt is scored; the one token computed is not shown


class Piece(NamedTuple):
    """A token and the offset of its text in the text of its choice."""

    token: int
    logprobs: TokenLogprobs | None
    start: int


@dataclass(slots=True)
class Delta:
    """News of one choice. `index` counts over all prompts of the HTTP request."""

    index: int
    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    finish: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Slot:
    """What arrived for one choice and was not read yet."""

    tokens: list[int] = field(default_factory=list)
    # Of each token: the drafts of its step, at the step's first token, and whether it was one that stood.
    drafts: list[tuple[int, bool]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    stop_token: int | None = None

    def merge(self, output: SequenceOutput) -> None:
        num_drafts = sum(verified.num_drafts for verified in output.verified)
        stood = {depth for verified in output.verified for depth in verified.accepted}
        for place, token in enumerate(output.tokens):
            self.tokens.append(token)
            self.drafts.append((0 if place else num_drafts, place in stood))
        self.logprobs.extend(output.logprobs or ())
        self.finish = output.finish
        self.stop_token = output.stop_token

    def take(self, count: int) -> Slot:
        """The first tokens, out of more than these: how the choice ended stays with the last."""
        first = Slot(self.tokens[:count], self.drafts[:count], self.logprobs[:count])
        del self.tokens[:count], self.drafts[:count], self.logprobs[:count]
        return first


class ChoiceReader:
    """Detokenises one choice, stops at its stop strings, and keeps tokens aligned with the text.

    Stop strings are looked for in all that the model wrote: the text of special tokens, and that of the
    token which ends the choice, are searched where they are not shown. A stop string counts if it ends
    in a token after the first `min_tokens`, wherever it begins.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, options: TextOptions) -> None:
        self.index = index
        self.num_tokens = self.num_drafts = self.num_accepted = 0
        self.finish: str | None = None
        self._tokenizer, self._options = tokenizer, options
        self._detokenizer = IncrementalDetokenizer(tokenizer, options.skip_special)
        self._stops = StopMatcher(options.stops, options.include_stop)
        self._matched: str | None = None
        # Tokens whose text is not out yet, each with its place in all text, hidden or not.
        self._held: deque[tuple[int, Piece]] = deque()
        self._num_read = 0  # characters of all text
        self._num_shown = 0  # those of them that are not hidden
        self._num_emitted = 0

    def read(self, slot: Slot) -> Delta:
        """Consume the slot. Sets `finish` when the choice is over, be it before the slot's last token."""
        delta = Delta(self.index)
        if self._options.discard_output:
            if slot.finish is not None:
                ended_well = slot.finish in (FinishReason.STOP, FinishReason.LENGTH)
                self.finish = delta.finish = "length" if ended_well else slot.finish.value
            return delta
        text = self._read_tokens(slot)
        if slot.finish is not None:
            text += self._flush(slot)
        if self._matched is not None:
            self.finish, delta.stop_reason = "stop", self._matched
        elif slot.finish is not None:
            self.finish, delta.stop_reason = slot.finish.value, self._stop_id(slot)
        self._num_emitted += len(text)
        delta.text, delta.finish = text, self.finish
        if text or self.finish is not None:  # hidden text alone is no news
            delta.pieces = self._release(everything=self.finish is not None and self._matched is None)
        return delta

    def _read_tokens(self, slot: Slot) -> str:
        text = ""
        last = len(slot.tokens) - 1
        for place, token in enumerate(slot.tokens):
            logprobs = slot.logprobs[place] if slot.logprobs else None
            self._held.append((self._num_read, Piece(token, logprobs, self._num_shown)))
            self.num_tokens += 1
            num_drafts, stood = slot.drafts[place]
            self.num_drafts += num_drafts
            self.num_accepted += stood
            stopping = slot.stop_token is not None and place == last
            if not stopping or self._options.include_stop:
                text += self._take(self._detokenizer.push((token,)))
                if self._options.skip_special and self._tokenizer.is_special(token):
                    text += self._take(self._text_of(token), hidden=True)
            if self._matched is not None:
                break
        return text

    def _take(self, piece: str, *, hidden: bool = False) -> str:
        """More text, in its order -> the part of it, and of what was held back, that may be shown now."""
        self._num_read += len(piece)
        self._num_shown += 0 if hidden else len(piece)
        may_stop = self.num_tokens > self._options.min_tokens
        shown, self._matched = self._stops.push(piece, hidden=hidden, may_stop=may_stop)
        return shown

    def _flush(self, slot: Slot) -> str:
        """The text ends here, with the token that stopped it if one did."""
        if self._matched is not None:
            return ""
        text = self._take(self._detokenizer.flush())
        if slot.stop_token is not None and not self._options.include_stop:
            text += self._take(self._text_of(slot.stop_token), hidden=True)
        return text + self._stops.flush()

    def _text_of(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

    def _release(self, *, everything: bool) -> list[Piece]:
        """Tokens whose text began to pass. After a stop string, those behind the cut never do."""
        held, released = self._held, []
        num_passed = self._stops.num_passed
        included = len(self._matched) if self._matched is not None and self._options.include_stop else 0
        while held and (everything or held[0][0] < num_passed):
            place, piece = held.popleft()
            behind = num_passed - place
            if behind <= included:  # all of the stop string is shown, also what would be hidden elsewhere
                piece = piece._replace(start=self._num_emitted - behind)
            released.append(piece)
        return released

    def _stop_id(self, slot: Slot) -> int | None:
        return None if slot.stop_token in self._options.eos_token_ids else slot.stop_token


class Generation:
    """The sequences of one HTTP request, from submission to the last word of each.

    Choice j of prompt i has index i * num_choices + j. Whoever creates one must `close` it, whatever
    happens: that frees the pages and the places.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        options: TextOptions,
        *,
        client: EngineClient,
        tokenizer: Tokenizer,
        metrics: Metrics,
        ticket: Ticket,
        outgoing: Outgoing,
        keep_text: bool = False,
        reports_drafts: bool = False,
    ) -> None:
        self.requests = requests
        self.num_choices = requests[0].num_choices
        self.readers = [
            ChoiceReader(index, tokenizer, options) for index in range(len(requests) * self.num_choices)
        ]
        self.prompt_logprobs: list[list[TokenLogprobs]] = [[] for _ in requests]
        self.num_cached = 0
        self.reports_drafts = reports_drafts
        self.texts: dict[int, str] = {}  # what each choice said, if it shall be kept for the log
        self._keep_text = keep_text
        self._numbers = {request.request_id: number for number, request in enumerate(requests)}
        self._cached_known: set[int] = set()
        self._slots: dict[int, Slot] = {}
        self._unfinished = len(self.readers)
        self._news = asyncio.Event()
        self._failure: ApiError | None = None
        self._client, self._metrics, self._ticket = client, metrics, ticket
        self._closed = False
        # What arrived and was not fetched, and what was fetched since the last `deltas`: it is being sent.
        self.backlog = outgoing.open(self._end_for_room)
        self.when_too_much: Callable[[], None] = _nothing  # for a reader that would not see the error
        self._token_bytes = token_bytes(requests[0])
        self._num_fetched_bytes = 0
        self._has_more = False  # in the slots: a reader takes only so much at once

    def start(self) -> None:
        for request in self.requests:
            self._metrics.begin(request)
            self._client.submit(request, self.receive)

    def receive(self, output: SequenceOutput) -> None:
        """The engine's sink: merge and wake the consumer."""
        if self._closed:
            return
        number = self._numbers[output.request_id]
        index = number * self.num_choices + output.index
        if output.prompt_logprobs:
            self.prompt_logprobs[number].extend(output.prompt_logprobs)
            self.backlog.add(len(output.prompt_logprobs) * self._token_bytes)
        if output.tokens and number not in self._cached_known:
            self._cached_known.add(number)
            self.num_cached += output.num_cached
        if self.readers[index].finish is None:
            self._slots.setdefault(index, Slot()).merge(output)
            self.backlog.add(len(output.tokens) * self._token_bytes)
        if output.tokens:
            self._ticket.charge(len(output.tokens))
        if output.finish is not None:
            self._ticket.release_one(finished=output.refusal is None)
        if output.finish is FinishReason.ERROR:
            self._take_error(output, engine_error(output))
        self._news.set()

    def _take_error(self, output: SequenceOutput, error: ApiError) -> None:
        if output.refusal is None:
            self._metrics.finish(output.request_id, output.index, FinishReason.ERROR.value)
        elif output.index == 0:  # once per request: nothing of it was computed
            self._metrics.forget(output.request_id)
            self._ticket.charge(-len(self.requests[self._numbers[output.request_id]].prompt_ids))
        if isinstance(error, Refusal) and self._failure is None:
            self._metrics.count_refused(error.reason)
        self.fail(error)

    def fail(self, error: ApiError) -> None:
        """End the request with an error, which `deltas` raises."""
        self._failure = self._failure or error
        self._news.set()

    def _end_for_room(self) -> None:
        message = "The server holds as much unsent output as it may, and most of it is this one's."
        self.fail(ApiError(503, message, code="buffers_full"))
        self.when_too_much()

    async def deltas(self, silence_s: float = 0.0, *, keep: bool = False) -> AsyncIterator[list[Delta]]:
        """News until every choice has ended; an empty list after each silence. Raises ApiError: that of a
        failure, or the 504 if the deadline came before any token. `keep`: nothing is sent before the end,
        so everything counts as held until `close`."""
        while self._unfinished:
            if not keep:
                self.backlog.add(-self._num_fetched_bytes)
            self._num_fetched_bytes = 0
            silent = await self._wait(silence_s)
            if self._failure is not None:
                raise self._failure
            deltas = self._read()
            if not self._unfinished and self._is_too_late():
                message = "The request's deadline passed before its first token."
                raise ApiError(504, message, code="deadline_exceeded")
            if deltas or silent:
                yield deltas

    def close(self) -> None:
        """Drop whatever still runs. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.backlog.close()
        for request in self.requests:
            self._client.abort(request.request_id)
            self._metrics.end(request.request_id)
        self._ticket.close()

    @property
    def num_output_tokens(self) -> int:
        return sum(reader.num_tokens for reader in self.readers)

    @property
    def num_drafts(self) -> int:
        """Drafts that were verified up to the end of each choice, wherever the engine has got to."""
        return sum(reader.num_drafts for reader in self.readers)

    @property
    def num_accepted(self) -> int:
        """Those of them that are tokens of the output."""
        return sum(reader.num_accepted for reader in self.readers)

    def _is_too_late(self) -> bool:
        """The deadline ended it, and there is nothing to show."""
        return not self.num_output_tokens and any(reader.finish == "deadline" for reader in self.readers)

    @property
    def outcome(self) -> str:
        """For the log: the code of the error that ended it, or how its choices ended."""
        if self._failure is not None and self._failure.code is not None:
            return self._failure.code
        return ",".join(sorted({reader.finish or "abort" for reader in self.readers}))

    async def _wait(self, silence_s: float) -> bool:
        """Sleep until there is news or the deadline passed; True if it was silent for `silence_s`."""
        if self._has_more:
            self._has_more = False
            await asyncio.sleep(0)  # others have their turn
            return False
        deadline_s = self.requests[0].deadline_s
        until_deadline = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        waits = [wait for wait in (silence_s or None, until_deadline) if wait is not None]
        try:
            async with asyncio.timeout(min(waits, default=None)):
                await self._news.wait()
        except TimeoutError:
            if deadline_s is not None and time.monotonic() >= deadline_s:
                self._expire()
            return True
        self._news.clear()
        return False

    def _expire(self) -> None:
        """The deadline holds even if the engine is stuck."""
        for reader in self.readers:
            if reader.finish is None:
                slot = self._slots.setdefault(reader.index, Slot())
                slot.finish = slot.finish or FinishReason.DEADLINE
                self._abort(reader.index)

    def _read(self) -> list[Delta]:
        deltas = []
        for index in [index for index in self._slots if self._prompt_is_scored(index)]:
            reader, slot = self.readers[index], self._take_slot(index)
            self._num_fetched_bytes += self._token_bytes * len(slot.tokens)
            delta = reader.read(slot)
            if delta.finish is not None:
                rest = self._slots.pop(index, Slot())  # behind a stop string
                self._num_fetched_bytes += self._token_bytes * len(rest.tokens)
                self._unfinished -= 1
                number, choice = divmod(index, self.num_choices)
                self._metrics.finish(self.requests[number].request_id, choice, delta.finish)
                if slot.finish is None and rest.finish is None:  # a stop string: the engine does not know
                    self._abort(index, natural=True)
            if self._keep_text:
                self.texts[index] = self.texts.get(index, "") + delta.text
            deltas.append(delta)
        return deltas

    def _take_slot(self, index: int) -> Slot:
        """What is read at once of a choice: all that arrived, unless that is much."""
        slot = self._slots[index]
        if len(slot.tokens) <= MAX_READ_TOKENS:
            return self._slots.pop(index)
        self._has_more = True
        return slot.take(MAX_READ_TOKENS)

    def _abort(self, index: int, *, natural: bool = False) -> None:
        number, choice = divmod(index, self.num_choices)
        self._client.abort(self.requests[number].request_id, choice, natural=natural)

    def _prompt_is_scored(self, index: int) -> bool:
        """Echoed logprobs come first, so a choice waits for those of its prompt, unless it ended."""
        number = index // self.num_choices
        request = self.requests[number]
        if request.sampling.prompt_logprobs is None or self._slots[index].finish is not None:
            return True
        return len(self.prompt_logprobs[number]) >= len(request.prompt_ids) - 1
