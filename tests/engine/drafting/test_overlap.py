"""Drafting while the target verifies: never another text, guesses that are there at once, an end."""

from __future__ import annotations

import threading

import pytest
import torch

from engine.drafting.overlap import Overlap, overlap_threads
from engine.messages import Submit
from tests.engine.drafting.eager import eager
from tests.engine.drafting.models.small import drafts_stood, own_model, random_models
from tests.engine.drafting.models.test_small_model_text import asked, assert_empty, few_pages, plain
from tests.engine.drafting.test_masked_text import asked as asked_masked
from tests.engine.drafting.test_masked_text import masked
from tests.engine.drafting.test_masked_text import told as told_masked
from tests.engine.drafting.test_speculative_text import PROMPTS, SAMPLINGS, told
from tests.engine.tiny import CPU, abort, request, run, tiny_core

__all__ = ["plain"]  # a fixture
SPECULATIVE = {"method": "speculative", "drafter": "model"}


class Patient(Overlap):
    """The target is slow: everything that can be drafted ahead is."""

    def stop(self):
        if self._running is not None:
            self._running.exception()
        return super().stop()


@pytest.fixture
def overlapping():
    """A core that drafts ahead."""
    cores = []

    def make(drafters=own_model, kind=Patient, **settings):
        core = tiny_core(drafters=drafters, **settings)
        core.speculation.overlap = kind(1, CPU)
        cores.append(core)
        return eager(core)

    yield make
    for core in cores:
        core.close()


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("drafters", [own_model, random_models])
@pytest.mark.parametrize("kind", [Patient, Overlap])
def test_the_text_is_that_of_plain_decoding(name, drafters, kind, overlapping, plain):
    core = overlapping(drafters, kind)
    assert told(core, asked("speculative", SAMPLINGS[name])) == plain[name]
    assert_empty(core)


@pytest.mark.parametrize(
    "settings", [{"num_pages": 12}, {"max_num_seqs": 2}, {"max_num_batched_tokens": 16}], ids=str
)
def test_also_where_pages_places_or_tokens_are_few(settings, overlapping, plain):
    for drafters, name in ((own_model, "hot"), (random_models, "greedy"), (few_pages, "warm")):
        core = overlapping(drafters, **settings)
        assert told(core, asked("speculative", SAMPLINGS[name], drafter="model")) == plain[name]
        assert_empty(core)


def test_choices_of_one_prompt(overlapping):
    fields = {"num_choices": 3, "temperature": 0.9, "max_tokens": 30, "seed": 5, "presence_penalty": 0.8}
    expected = run(tiny_core(), request("a", PROMPTS[0], **fields))
    found = run(overlapping(), request("a", PROMPTS[0], **SPECULATIVE, **fields))
    assert {key: one.tokens for key, one in found.items()} == {
        key: one.tokens for key, one in expected.items()
    }


def test_no_mask_is_asked_by_two_threads(overlapping):
    plain = tiny_core()
    masked(plain)
    expected = told_masked(plain, asked_masked("autoregressive", SAMPLINGS["warm"]))
    core = overlapping()
    ahead = core.speculation.drafters["model"].ahead
    grown = set()

    def noted(sequences):
        passes = ahead(sequences)
        grown.update(
            one.request.request_id
            for one in sequences
            if core.speculation.drafters["model"].following.grown(one).limit > 32
        )
        return passes

    core.speculation.drafters["model"].ahead = noted
    masks = masked(core)
    assert told_masked(core, asked_masked("speculative", SAMPLINGS["warm"], drafter="model")) == expected
    assert any(path for mask in masks.values() for path in mask.asked)
    assert grown
    assert not any(name.startswith("m") for name in grown)


def test_requests_that_leave_in_the_middle_leave_nothing_behind(overlapping):
    core = overlapping()
    for number in range(4):
        fields = {"temperature": 0.9, "max_tokens": 200, "seed": number}
        core.handle(Submit(request(f"r{number}", PROMPTS[number % 3], **SPECULATIVE, **fields)))
    for number in range(4):
        for _ in range(4):
            core.step()
        abort(core, f"r{number}")
    core.step()
    assert not core.has_work
    assert_empty(core)


def passes_of(drafter, monkeypatch):
    """-> the names of the threads in which passes were computed, in their order"""
    threads = []
    logits = drafter.draft.logits

    def noted(pieces):
        threads.append(threading.current_thread().name)
        return logits(pieces)

    monkeypatch.setattr(drafter.draft, "logits", noted)
    return threads


@pytest.mark.parametrize("name", ["greedy", "hot"])
def test_a_guess_that_was_drafted_ahead_takes_no_pass(name, overlapping, monkeypatch):
    """The target as its own drafter is right: what follows an accepted line was found meanwhile."""
    core = overlapping()
    drafter = core.speculation.drafters["model"]
    drafter.cost = 0.9  # so that hardly a pass is worth waiting for
    fields = {"max_tokens": 120, **SPECULATIVE, **SAMPLINGS[name]}
    run(core, request("a", PROMPTS[0], **fields))  # its chances become known
    threads = passes_of(drafter, monkeypatch)
    before = core.scheduler._num_steps
    [heard] = run(core, request("b", PROMPTS[2], **fields)).values()
    waited_for = [thread for thread in threads if thread == threading.main_thread().name]
    assert len(heard.tokens) == 120
    assert len(waited_for) <= 4, "the first one, and where all that was drafted ahead had stood"
    assert len(threads) > 30
    assert core.scheduler._num_steps - before < 40


@pytest.mark.parametrize("name", SAMPLINGS)
def test_who_knows_the_target_is_right_whatever_became_of_earlier_guesses(name, overlapping):
    """Trees that the text left, and trees that it went through, leave the right KV behind."""
    core = overlapping()
    run(core, *asked("speculative", SAMPLINGS[name], drafter="model"), steps_between=3)
    stood, seen = drafts_stood(core.speculation.drafters["model"].standing, drawn=name != "greedy")
    assert seen > 20
    assert stood >= 0.97 * seen


def test_a_drafter_that_fails_ahead_is_given_up_and_the_text_goes_on(overlapping, plain, caplog):
    core = overlapping()
    steps = []

    def failing(sequences):
        steps.append(len(sequences))
        yield
        raise RuntimeError("out of memory")

    core.speculation.drafters["model"].ahead = failing
    requests = asked("speculative", SAMPLINGS["hot"])
    for one in requests:
        core.handle(Submit(one))
    found = {}
    while core.has_work:
        for output in core.step().outputs:
            found.setdefault(output.request_id, []).extend(output.tokens)
    assert {name: tokens for (name, _), (tokens, *_) in plain["hot"].items()} == found
    assert core.speculation.failed == {"model"}
    assert len(steps) == 1
    assert "out of memory" in caplog.text


def test_a_step_that_fails_leaves_nobody_drafting(overlapping, monkeypatch):
    core = overlapping()
    core.handle(Submit(request("a", PROMPTS[0], max_tokens=60, **SPECULATIVE)))
    for _ in range(8):
        core.step()
    execute = core.runner.execute

    def broken(plan):
        raise RuntimeError("no")

    monkeypatch.setattr(core.runner, "execute", broken)
    assert not core.step().outputs  # the drafts may be the cause
    assert core.speculation.overlap._running is None
    assert core.step().outputs[-1].error
    monkeypatch.setattr(core.runner, "execute", execute)
    [heard] = run(core, request("b", PROMPTS[0], max_tokens=60, **SPECULATIVE)).values()
    assert len(heard.tokens) == 60
    assert_empty(core)


def test_the_thread_has_its_own_number_of_threads_and_ends_at_close():
    before = torch.get_num_threads()
    overlap = Overlap(3, CPU)
    found = []

    def look():
        found.append((torch.get_num_threads(), torch.is_inference_mode_enabled(), threading.current_thread()))
        yield

    overlap.start({"model": look()})
    assert overlap.stop() == {}
    overlap.start({"model": look()})
    overlap.close()
    for num_threads, inference, thread in found:
        assert (num_threads, inference) == (3, True)
        assert thread is not threading.current_thread()
        assert not thread.is_alive()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("choice", "device", "cores", "num_threads", "expected"),
    [
        ("auto", "cpu", 8, 8, 0),
        ("auto", "cpu", 8, 6, 2),
        ("auto", "cuda", 8, 8, 1),
        ("on", "cpu", 2, 2, 1),
        ("on", "cpu", 2, 1, 1),
        ("off", "cuda", 8, 2, 0),
        ("off", "cpu", 8, 2, 0),
    ],
)
def test_when_it_is_on(choice, device, cores, num_threads, expected):
    assert overlap_threads(choice, torch.device(device), cores, num_threads) == expected
