"""What crosses the process edge, as msgspec values; nothing is ever unpickled.

Server to engine: `Submit`, `Abort`, `Inspect`, `Stop`. Engine to server: `Ready` once, then `StepOutput`s, a
`LongStep` before one that takes long; an `Inspected` for every `Inspect`; or one `Failed` when it cannot
start or go on; `Loading` and `Log` lines at any time. On the leash (`engine/zygote.py`): `Started`, and a
`Begun` before the first step of a request. From the zygote: `Loading` and `Log`.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from scheduler.costs import CostModel
from scheduler.plan import SchedulerStats, Tier
from scheduler.refusal import RefusalReason
from scheduler.snapshot import Snapshot
from scheduler.types import FinishReason, Request


class Submit(msgspec.Struct, tag=True, frozen=True, gc=False):
    request: Request


class Abort(msgspec.Struct, tag=True, frozen=True, gc=False):
    """End one choice of a request, or with `index` None all of them. Unknown ones are ignored."""

    request_id: str
    index: int | None = None
    natural: bool = False  # the text ended by itself: a stop string was found


class Stop(msgspec.Struct, tag=True, frozen=True, gc=False):
    """Leave the loop; whatever still runs is dropped."""


class Inspect(msgspec.Struct, tag=True, frozen=True, gc=False):
    """Ask for the scheduler's state; at most `max_sequences` of its sequences are described."""

    number: int
    max_sequences: int = 1000


ToEngine = Submit | Abort | Inspect | Stop


class TokenLogprobs(NamedTuple):
    """Natural-log probabilities at one place, of the model itself (before temperature and penalties)."""

    token: int
    logprob: float
    rank: int  # 1 = the most likely token
    top: tuple[tuple[int, float], ...]  # the most likely tokens, best first


class Verified(NamedTuple):
    """Drafts of one drafter that the target has judged in one step: how many, and the depths (0: right after
    the committed tokens) of those that stood."""

    drafter: str
    num_drafts: int
    accepted: tuple[int, ...]

    @property
    def num_accepted(self) -> int:
        return len(self.accepted)


class SequenceOutput(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """News of one sequence. `finish` is set exactly once per sequence, in its last output."""

    request_id: str
    index: int
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    stop_token: int | None = None  # the token that stopped it, which is the last of `tokens`
    error: str | None = None
    refused: bool = False  # with an error: the request is at fault, not the engine
    refusal: RefusalReason | None = None  # with an error: the scheduler did not accept it, and why
    retry_after_s: float = 0.0  # of a refusal: when it may be accepted; 0 where waiting does not help
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per token, when asked for
    # Of prompt tokens 1.., in order, possibly in several pieces (choice 0 only), when asked for.
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached: int = 0  # prompt tokens served from the prefix cache
    first_scheduled_s: float | None = None  # monotonic clock; None while it waits
    verified: tuple[Verified, ...] = ()  # the drafts of this step, by drafter


class StepOutput(msgspec.Struct, tag=True, frozen=True, gc=False):
    outputs: tuple[SequenceOutput, ...]
    stats: SchedulerStats
    num_prompt_tokens: int = 0  # of prompts, computed in this step or found in the cache, each counted once
    failed_copies: tuple[Tier, ...] = ()  # where KV pages should have arrived, of copies that have failed
    step_time_ratio: float = 0.0  # measured over predicted, a mean of late; 0 before the first step


class Phase(NamedTuple):
    name: str
    seconds: float


class Ready(msgspec.Struct, tag=True, frozen=True, gc=False):
    """The engine can compute. Sizes in tokens unless named otherwise."""

    max_model_len: int
    vocab_size: int  # width of the logits
    page_size: int
    num_pages: int
    kv_bytes_per_token: int
    dtype: str
    device: str
    phases: tuple[Phase, ...]  # where the start-up time went
    host_pages: int = 0
    disk_pages: int = 0
    costs: CostModel = CostModel()  # of steps, measured on this machine or given
    drafters: tuple[str, ...] = ()  # those that requests may name, beside "auto"
    identity: str = ""  # changes with whatever the bits of a text's KV depend on: weights, kernels, machine


class Failed(msgspec.Struct, tag=True, frozen=True, gc=False):
    """The engine cannot start or go on; one line that names the thing and the way out."""

    message: str


class Log(msgspec.Struct, tag=True, frozen=True, gc=False):
    """A line for the operator: the server writes it, in the format and to the place it writes its own."""

    level: int  # of the logging module
    text: str


class Begun(msgspec.Struct, tag=True, frozen=True, gc=False):
    """Requests of which this engine is about to compute something for the first time. If it dies now, they
    may be the cause; those that only wait are not."""

    request_ids: tuple[str, ...]


class Inspected(msgspec.Struct, tag=True, frozen=True, gc=False):
    """The answer to the `Inspect` of the same number."""

    number: int
    snapshot: Snapshot


class Started(msgspec.Struct, tag=True, frozen=True, gc=False):
    """The engine is there, and a child of the server, or is about to be."""

    pid: int


class LongStep(msgspec.Struct, tag=True, frozen=True, gc=False):
    """The engine is about to compute a step that is predicted to take so long."""

    predicted_s: float


class Loading(msgspec.Struct, tag=True, frozen=True, gc=False):
    """Weights come in: a sign of life."""

    done_bytes: int
    total_bytes: int


FromEngine = Ready | StepOutput | LongStep | Inspected | Failed | Loading | Log
FromZygote = Loading | Log
OnLeash = Started | Begun
