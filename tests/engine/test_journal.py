"""What the server keeps of a request while it is in flight."""

from __future__ import annotations

from engine.journal import JournalEntry
from engine.messages import SequenceOutput
from scheduler.types import Request, SamplingParams


def test_scores_that_were_delivered_before_are_no_progress() -> None:
    sampling = SamplingParams(prompt_logprobs=0)
    entry = JournalEntry(Request(request_id="r", prompt_ids=tuple(range(100)), sampling=sampling))
    scores = SequenceOutput("r", 0, prompt_logprobs=((1, -1.0, 1, ()),) * 50)
    heard = entry.record(scores)
    assert heard is not None
    assert heard.prompt_logprobs == scores.prompt_logprobs
    entry.deaths_without_progress = 1
    entry.replay()
    entry.record(scores)
    assert entry.deaths_without_progress == 1
    entry.record(SequenceOutput("r", 0, tokens=(5,)))
    assert entry.deaths_without_progress == 0
