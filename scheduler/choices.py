"""The choices of one request, and when a sequence has said all it may say."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.types import FinishReason, Request, Sequence


@dataclass(slots=True, eq=False)
class Choices:
    """A request while any of its choices is alive.

    The leader, the first of them, queues at once. The others are held back until it has computed the
    prompt, so that they find the prompt's pages instead of computing it beside it. If it ends before
    that, the next one leads.
    """

    request: Request
    number: int  # unique; orders deadlines
    live: dict[int, Sequence]  # by index
    held_back: list[Sequence]
    leader: Sequence


def max_tokens_of(request: Request, max_model_len: int) -> int:
    """The most tokens that a choice may have, prompt and output."""
    return min(len(request.prompt_ids) + request.sampling.max_tokens, max_model_len)


def finish_at_once(sequence: Sequence) -> FinishReason | None:
    """Whether a new sequence has nothing left to say: it was delivered before, or wants no output."""
    if sequence.num_output == 0 and sequence.wants_prompt_logits:
        return None
    return finish_after_last(sequence)


def finish_after_last(sequence: Sequence) -> FinishReason | None:
    """Whether the sequence's last output token ends it. The stop token counts as output."""
    sampling = sequence.request.sampling
    num_output = sequence.num_output
    if sequence.tokens[-1] in sampling.stop_token_ids and num_output >= max(1, sampling.min_tokens):
        return FinishReason.STOP
    return FinishReason.LENGTH if num_output >= sequence.max_output else None


def commit(sequence: Sequence, committed: tuple[int, ...]) -> FinishReason | None:
    """Append tokens one at a time until one ends the sequence; what follows that one is dropped."""
    for token in committed:
        if not sequence.max_output:
            return FinishReason.LENGTH  # only the prompt was wanted
        sequence.tokens.append(token)
        finish = finish_after_last(sequence)
        if finish is not None:
            return finish
    return None
