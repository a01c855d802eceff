"""The words that every package shares: requests, sampling parameters, sequences, outcomes.

Standard library only. Frozen dataclasses cross process edges; `Sequence` is the one mutable record
and belongs to the scheduler alone.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal


class FinishReason(enum.StrEnum):
    """Why a sequence ended. Exactly one is reported per sequence, whatever happens."""

    STOP = "stop"  # an end-of-sequence or stop token, or a stop string found by the server
    LENGTH = "length"  # max_tokens or the context length
    ABORT = "abort"  # the client left, or the server asked
    DEADLINE = "deadline"  # the request's deadline passed
    ERROR = "error"  # the engine could not compute this sequence; the others go on


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. Validated by the server; token ids, never text.

    The text is a pure function of these, the prompt and the model: `seed` is always set (the server
    draws one when the client sends none), so that a replay after a crash gives the same tokens.
    """

    seed: int = 0  # 64 bits, unsigned
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()  # end-of-sequence ids included, unless ignore_eos removed them
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None  # this many alternatives beside the chosen token; 0 = the chosen alone
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossyAcceptance:
    """A rule by which drafts stand that the target would not have drawn (`engine.decoding.lossy`)."""

    rule: Literal["typical", "threshold"]
    epsilon: float = 0.09  # of "typical", as Medusa has them
    delta: float = 0.3
    threshold: float = 0.3  # of "threshold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One accepted request, as it crosses from the server to the engine.

    `delivered` holds, per choice, output tokens already committed by an earlier engine process: a
    restart is a request whose outputs have begun. Times are seconds on the system's monotonic clock.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    num_choices: int = 1
    arrival_s: float = 0.0
    deadline_s: float | None = None
    priority: int = 0  # lower first, for the `priority` policy
    tenant: str = ""
    cache_salt: str = ""  # sequences share pages and drafts only under equal salts
    method: str = "autoregressive"  # decoding method, by name
    drafter: str = "auto"  # who guesses ahead, where the method verifies guesses
    max_draft_tokens: int = 0  # in one step; 0 = as many as pay
    lossy: LossyAcceptance | None = None  # None: the text is that of plain decoding, whoever guesses
    delivered: tuple[tuple[int, ...], ...] = ()
    readmitted: bool = False  # accepted by an earlier engine process: load is no reason to refuse it


class SequenceState(enum.Enum):
    WAITING = "waiting"  # holds no pages (its old ones may still be found by content)
    PARKED = "parked"  # waits, not for its turn but for pages that are being computed or fetched
    RUNNING = "running"  # holds pages; may be given a slice in any step
    FINISHED = "finished"


class Visibility(enum.IntEnum):
    """What a token of a slice may see inside that slice. Everything computed before it is visible."""

    CAUSAL = 0  # itself and the slice's earlier tokens
    ALL = 1  # every token of the slice
    ANCESTORS = 2  # the tokens named by its own 64-bit word


@dataclass(frozen=True, slots=True)
class Window:
    """Provisional tokens beyond the committed ones; a decoding method fills it, no one else reads it.

    `depths[k]` is the distance of token k's position from the first uncommitted position: positions
    are data. `ancestors[k]` is a word over the window's own tokens (bit j = token j is visible,
    itself included), only with `Visibility.ANCESTORS`. A window is computed whole or not at all. An
    `optional` one is a guess: it is dropped where its tokens or pages would cost anyone anything.
    """

    tokens: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    visibility: Visibility = Visibility.CAUSAL
    ancestors: tuple[int, ...] = ()
    optional: bool = False

    @property
    def parents(self) -> tuple[int, ...]:
        """The window's token that each of its tokens follows; -1: the last committed one."""
        if self.visibility is not Visibility.ANCESTORS:
            return tuple(range(-1, len(self.tokens) - 1))
        return tuple((word & ~(1 << k)).bit_length() - 1 for k, word in enumerate(self.ancestors))


EMPTY_WINDOW = Window()


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request: committed tokens, a window beyond them, and the pages it holds.

    Work is `num_tokens - num_computed`; there is no prefill or decode phase.
    """

    seq_id: int
    request: Request
    index: int  # which choice
    tokens: list[int]  # prompt, then committed output
    num_computed: int = 0  # leading tokens whose KV is valid
    # Of each page_size tokens the device page in every group of layers, and the content keys of full ones.
    pages: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    window: Window = EMPTY_WINDOW
    state: SequenceState = SequenceState.WAITING
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    first_scheduled_s: float | None = None
    num_preemptions: int = 0
    attained_s: float = 0.0  # service attributed to it so far
    backlog_s: float = 0.0  # service it is expected to need still
    level: int = 0  # the policy's queue
    order: tuple[float, int] = (0.0, 0)  # while it runs: its place in the policy's order
    next_change: float = 0.0  # the number of output tokens from which its level may be another
    max_output: int = 0
    expected_s: float = 0.0  # the policy's notes
    fcfs_s: float = 0.0
    root_key: bytes = b""  # what the keys of its pages start from
    num_known: int = 0  # tokens it came with: its prompt, and what was delivered before
    num_found: int = 0  # leading tokens that were found computed when it was last looked at
    num_reached: int = 0  # the most leading tokens ever computed; a preemption does not lower it
    num_findable: int = 0  # leading computed tokens whose KV others may share
    parked_behind: int = -1  # the running sequence that computes pages for it
    num_expected: int = 0  # tokens that it is expected to have in the end
    num_offered: int = 0  # leading pages that were offered to lower tiers since it got its place
    num_pages_sent: int = 0  # leading pages that some plan has told the engine of
    waiting_since_s: float = 0.0  # when it came into the queue last
    fetched_after: int = -1  # pages that were found when more were last fetched for it, since it last ran
    is_overdue: bool = False  # it was put aside for too long: it goes before all that were not
    takes_drafts: bool = True  # none of them has ever spoiled what was computed beside it

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_left(self) -> int:
        """Tokens it came with that were never computed for it, and were not found computed."""
        return max(0, self.num_known - max(self.num_reached, self.num_found))

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def arrival_s(self) -> float:
        return self.request.arrival_s

    @property
    def num_tokens(self) -> int:
        """Tokens it wants computed: committed ones and the window."""
        return len(self.tokens) + len(self.window.tokens)

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether log-probabilities of its prompt are asked for and not all computed yet. Output that
        an earlier engine process delivered proves that they were reported then."""
        return (
            self.request.sampling.prompt_logprobs is not None
            and self.index == 0
            and self.num_reached < self.prompt_len
            and not any(self.request.delivered[:1])
        )
