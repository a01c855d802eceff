"""What a step says of its drafts: as many as were computed, and the path that stood, by who guessed it."""

from __future__ import annotations

import pytest

from engine.messages import Submit
from tests.engine.drafting.eager import eager
from tests.engine.drafting.test_speculative_text import PROMPTS
from tests.engine.tiny import request, run, tiny_core


def outputs_of(core, one):
    """All news of a request, and how many rows of drafts were planned at each of them."""
    planned, found = [], []
    plan = core.scheduler.plan

    def watched():
        made = plan()
        planned.append(sum(piece.num_window for piece in made.slices))
        return made

    core.scheduler.plan = watched
    core.handle(Submit(one))
    while core.has_work:
        news = core.step().outputs
        found += [(output, planned[-1]) for output in news if output.tokens]
    core.scheduler.plan = plan
    return found


@pytest.fixture
def core():
    made = tiny_core()
    eager(made)
    return made


def test_drafts_are_counted_once_and_the_path_by_depth(core):
    fields = {"temperature": 0.0, "max_tokens": 60, "method": "speculative"}
    run(core, request("a", PROMPTS[0], **fields))
    found = outputs_of(core, request("b", PROMPTS[0], **fields))
    for output, num_planned in found:
        assert sum(one.num_drafts for one in output.verified) == num_planned
        depths = sorted(depth for one in output.verified for depth in one.accepted)
        assert depths == list(range(len(depths)))
        assert len(output.tokens) == len(depths) + 1 or output.finish is not None
    assert any(len(output.tokens) > 4 for output, _ in found), "runs were accepted"
    assert any(num > len(output.tokens) for output, num in found), "drafts were rejected"


def test_a_stop_cuts_tokens_and_leaves_the_counts_of_the_step(core):
    """The counters are of what was verified; what of it is text is seen by the tokens."""
    fields = {"temperature": 0.0, "max_tokens": 60, "method": "speculative"}
    [whole] = run(core, request("a", PROMPTS[0], **fields)).values()
    stop = whole.tokens[40]
    found = outputs_of(core, request("b", PROMPTS[0], stop_token_ids=(stop,), **fields))
    last, _ = found[-1]
    assert last.stop_token == stop
    assert sum(one.num_accepted for one in last.verified) >= len(last.tokens), "it stopped within the run"
