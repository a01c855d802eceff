"""What the client keeps of requests in flight, and whom it lets an engine have."""

from __future__ import annotations

from engine.journal import Journal
from engine.messages import Abort, SequenceOutput, Submit
from scheduler.types import FinishReason, Request, SamplingParams


def ignore(_: SequenceOutput) -> None:
    pass


def journal_of(*names: str) -> Journal:
    """That many requests on an engine which has begun all of them."""
    journal = Journal()
    for name in names:
        journal.add(Request(request_id=name, prompt_ids=(1,), sampling=SamplingParams()), ignore)
    journal.resume()
    journal.begun(names)
    return journal


def given(messages: list[Submit | Abort]) -> list[str]:
    return [one.request.request_id for one in messages if isinstance(one, Submit)]


def get_on(journal: Journal, name: str) -> list[str]:
    """-> whom the engine is given for it"""
    return given(journal.record(SequenceOutput(name, 0, tokens=(5,)))[2])


def test_scores_that_were_delivered_before_are_no_progress() -> None:
    journal = Journal()
    sampling = SamplingParams(prompt_logprobs=0)
    journal.add(Request(request_id="r", prompt_ids=tuple(range(100)), sampling=sampling), ignore)
    journal.resume()
    scores = SequenceOutput("r", 0, prompt_logprobs=((1, -1.0, 1, ()),) * 50)
    news, _, _ = journal.record(scores)
    assert news is not None
    assert news.prompt_logprobs == scores.prompt_logprobs
    assert journal.advanced
    journal.lost(outside=False)
    journal.resume()
    journal.record(scores)
    assert not journal.advanced
    journal.record(SequenceOutput("r", 0, tokens=(5,)))
    assert journal.advanced


def test_suspects_are_tried_in_halves_and_everyone_else_waits() -> None:
    journal = journal_of("a", "b", "c")
    journal.add(Request(request_id="waits", prompt_ids=(1,), sampling=SamplingParams()), ignore)
    assert journal.lost(outside=False)[0].num_suspects == 3
    assert given(journal.resume()) == ["a", "b"]
    assert not journal.add(Request(request_id="new", prompt_ids=(1,), sampling=SamplingParams()), ignore)
    assert get_on(journal, "a") == []
    assert get_on(journal, "b") == ["c"]
    assert get_on(journal, "c") == ["waits", "new"]


def test_who_shared_the_engine_with_others_is_tried_once_more_alone() -> None:
    journal = journal_of("a", "b", "c")
    journal.lost(outside=False)
    journal.resume()
    get_on(journal, "a")
    get_on(journal, "b")  # and c is given
    verdict, culprit = journal.lost(outside=False)
    assert culprit is None
    assert verdict.is_closer
    assert given(journal.resume()) == ["c"]
    _, culprit = journal.lost(outside=False)
    assert culprit is not None
    assert culprit.request.request_id == "c"
    assert given(journal.resume()) == ["a", "b"]


def test_a_kill_from_outside_repeats_the_probation_and_blames_nobody() -> None:
    journal = journal_of("a", "b")
    journal.lost(outside=False)
    for _ in range(5):
        assert given(journal.resume()) == ["a"]
        verdict, culprit = journal.lost(outside=True)
        assert culprit is None
        assert not verdict.is_closer


def test_an_engine_that_was_given_nothing_blames_nobody() -> None:
    journal = journal_of("a")
    journal.lost(outside=False)
    for _ in range(5):  # none of them got ready
        assert journal.lost(outside=False)[1] is None
    assert given(journal.resume()) == ["a"]


def test_who_leaves_while_on_probation_lets_the_next_ones_in() -> None:
    journal = journal_of("a", "b", "c")
    journal.lost(outside=False)
    journal.resume()
    assert journal.abort(Abort("c")) == []  # was held
    assert given(journal.abort(Abort("a"))) == []
    assert given(journal.abort(Abort("b"))) == []
    journal.add(Request(request_id="new", prompt_ids=(1,), sampling=SamplingParams()), ignore)
    assert journal.entries["new"].given


def test_a_choice_that_is_aborted_while_held_ends_on_the_engine_that_gets_it() -> None:
    journal = journal_of("a", "b")
    journal.lost(outside=False)
    journal.resume()
    assert journal.abort(Abort("b", 0)) == []
    messages = journal.record(SequenceOutput("a", 0, finish=FinishReason.LENGTH))[2]
    assert given(messages) == ["b"]
    assert messages[1:] == [Abort("b", 0)]


def test_what_was_only_held_is_new_to_the_engine_that_gets_it() -> None:
    """It may be refused for the engine's load; what an engine has accepted once may not."""
    journal = journal_of("a")
    journal.lost(outside=False)
    journal.add(Request(request_id="new", prompt_ids=(1,), sampling=SamplingParams()), ignore)
    (first,) = journal.resume()
    assert isinstance(first, Submit)
    assert first.request.readmitted
    (second,) = journal.record(SequenceOutput("a", 0, tokens=(5,)))[2]
    assert isinstance(second, Submit)
    assert not second.request.readmitted


def test_a_stall_is_no_proof_until_there_was_more_time() -> None:
    journal = journal_of("a")
    journal.lost(outside=False, stalled=True)
    journal.resume()
    assert not journal.patient
    assert journal.lost(outside=False, stalled=True)[1] is None
    assert journal.patient
    journal.resume()
    assert journal.lost(outside=False, stalled=True)[1] is not None
    assert not journal.patient
