"""A step that raises: who raises alone ends with the error, everybody else has the bits of a quiet run."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass

import pytest
import torch

from engine import runner as runner_module
from engine.core import MAX_FAILED_STEPS
from engine.decoding import METHODS
from engine.decoding.autoregressive import Autoregressive
from engine.drafting.overlap import Overlap
from engine.messages import Submit
from scheduler.types import FinishReason
from tests.engine.drafting.eager import eager
from tests.engine.drafting.models.small import own_model
from tests.engine.drafting.test_spoiling_drafts import Poisoner, unused
from tests.engine.tiny import CPU, Heard, request, run, tiny_core
from tests.engine.windows import LineGuesser

NUM = 16
BAD_TOKEN = 299
SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "frequency_penalty": 0.5, "presence_penalty": 0.2, "repetition_penalty": 1.2},
    {"temperature": 0.9, "top_p": 0.7, "logit_bias": ((7, 2.0), (8, -1.0))},
    {"temperature": 1.1, "top_k": 9, "prompt_logprobs": 2},
    {"temperature": 0.7, "min_tokens": 5, "stop_token_ids": (3, 4), "bad_words": ((5, 6), (9,))},
]


def asked(number: int, culprits: set[int], **fields):
    prompt = [5, 17, 88, 250, 3, 9, 41, *range(20, 20 + number)]
    if number in culprits:
        prompt[4] = BAD_TOKEN
    sampling = SAMPLINGS[number % len(SAMPLINGS)]
    fields = {"max_tokens": 6 + number % 7, "logprobs": 2, "seed": number} | sampling | fields
    return request(name_of(number), prompt, **fields)


def name_of(number: int) -> str:
    return f"r{number}"


@pytest.fixture(scope="module")
def quiet() -> list[Heard]:
    heard = run(tiny_core(), *(asked(number, set()) for number in range(NUM)))
    return [heard[name_of(number), 0] for number in range(NUM)]


def assert_same(one: Heard, other: Heard) -> None:
    assert one.error is None
    assert (one.tokens, one.finish) == (other.tokens, other.finish)
    assert one.logprobs == other.logprobs
    assert one.prompt_logprobs == other.prompt_logprobs


class Boom(Exception):
    pass


@dataclass
class Poison:
    """Raises where one of the culprits is met with `since` tokens of output or more."""

    names: set[str]
    since: int = 0
    num_raised: int = 0

    def meet(self, sequence) -> None:
        if sequence.request.request_id in self.names and sequence.num_output >= self.since:
            self.num_raised += 1
            raise Boom("poison")


def in_the_sampler(core, poison, monkeypatch):
    sample = runner_module.sample

    def poisoned(logits, places):
        drawn = sample(logits, places)
        for place in places:
            poison.meet(place.sequence)
        return drawn

    monkeypatch.setattr(runner_module, "sample", poisoned)


def in_the_forward_pass(core, poison, monkeypatch):
    _forward(core, poison, at_its_end=True)


def before_the_forward_pass(core, poison, monkeypatch):
    _forward(core, poison, at_its_end=False)


def _forward(core, poison, *, at_its_end: bool):
    """At its end everything is written that the step writes."""
    build, compute = core.runner.batches.build, core.runner.model.compute
    met = []

    def building(plan):
        met[:] = [core.scheduler.sequence(piece.seq_id) for piece in plan.slices]
        return build(plan)

    def poisoned(*arguments):
        found = compute(*arguments) if at_its_end else None
        for sequence in met:
            poison.meet(sequence)
        return found or compute(*arguments)

    core.runner.batches.build, core.runner.model.compute = building, poisoned


def in_the_method(core, poison, monkeypatch):
    decide = Autoregressive.decide

    def poisoned(self, sequence, draws):
        decision = decide(self, sequence, draws)
        poison.meet(sequence)
        return decision

    monkeypatch.setattr(Autoregressive, "decide", poisoned)


def in_log_probabilities(core, poison, monkeypatch):
    found = runner_module._logprobs

    def poisoned(sequence, *arguments):
        poison.meet(sequence)
        return found(sequence, *arguments)

    monkeypatch.setattr(runner_module, "_logprobs", poisoned)


def in_what_is_asked_of_the_logits(core, poison, monkeypatch):
    processor_of = core.runner.processor_of

    def poisoned(sequence):
        poison.meet(sequence)
        return processor_of(sequence)

    core.runner.processor_of = poisoned


def in_the_batch(core, poison, monkeypatch):
    build = core.runner.batches.build

    def poisoned(plan):
        for piece in reversed(plan.slices):
            poison.meet(core.scheduler.sequence(piece.seq_id))
        return build(plan)

    core.runner.batches.build = poisoned


PLACES = [
    in_the_sampler,
    in_the_forward_pass,
    before_the_forward_pass,
    in_the_method,
    in_log_probabilities,
    in_what_is_asked_of_the_logits,
    in_the_batch,
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize(("culprits", "since"), [({5}, 0), ({0}, 3), ({15}, 5), ({2, 3, 11}, 2)])
def test_whoever_raises_ends_alone_and_all_others_have_their_bits(
    place, culprits, since, quiet, monkeypatch, caplog
):
    core = tiny_core(max_num_batched_tokens=100)
    place(core, Poison({name_of(number) for number in culprits}, since), monkeypatch)
    with caplog.at_level(logging.ERROR):
        heard = run(core, *(asked(number, set()) for number in range(NUM)))
    for number in range(NUM):
        one = heard[name_of(number), 0]
        if number not in culprits:
            assert_same(one, quiet[number])
            continue
        assert one.finish is FinishReason.ERROR
        assert one.error == "the engine could not compute this step: Boom"
        assert one.tokens == quiet[number].tokens[: max(since, len(one.tokens))]
        assert len(one.tokens) == since
        assert f"request={name_of(number)} choice=0" in caplog.text
    assert not any(f"request={name_of(number)} " in caplog.text for number in set(range(NUM)) - culprits)


def test_a_step_of_n_slices_is_executed_2_n_times_at_most():
    core = tiny_core(max_num_batched_tokens=512)
    sizes = []

    def execute(plan):
        sizes.append(len(plan.slices))
        raise Boom

    core.runner.execute = execute
    for number in range(NUM):
        core.handle(Submit(asked(number, set())))
    report = core.step()
    assert sizes[0] == NUM
    assert len(sizes) == 2 * NUM - 1
    assert {output.finish for output in report.outputs} == {FinishReason.ERROR}


@pytest.mark.parametrize("where", ["tokens", "positions"])
def test_what_raises_may_be_a_token_or_a_position(where, quiet):
    core = tiny_core(max_num_batched_tokens=60)
    compute = core.runner.model.compute

    def poisoned(rows, *arguments):
        found = compute(rows, *arguments)
        if bool((rows.tokens == BAD_TOKEN).any() if where == "tokens" else (rows.positions == 25).any()):
            raise Boom
        return found

    core.runner.model.compute = poisoned
    culprits = {4, 9} if where == "tokens" else set()
    heard = run(core, *(asked(number, culprits) for number in range(NUM)))
    num_failed = 0
    for number in range(NUM):
        one, other = heard[name_of(number), 0], quiet[number]
        # The last token is committed and never computed.
        if number in culprits or (where == "positions" and 7 + number + len(other.tokens) - 1 > 25):
            num_failed += 1
            assert one.error is not None
        else:
            assert_same(one, other)
    assert 0 < num_failed < NUM


@pytest.mark.parametrize("failure", [MemoryError(), torch.OutOfMemoryError("2 GiB"), RuntimeError("alloc")])
def test_where_only_a_large_step_lacks_memory_nobody_fails(failure, quiet, caplog):
    core = tiny_core(max_num_batched_tokens=100)
    compute = core.runner.model.compute
    num_failed = 0

    def poisoned(rows, *arguments):
        nonlocal num_failed
        if rows.num_rows > 22:  # the longest prompt
            num_failed += 1
            raise failure
        return compute(rows, *arguments)

    core.runner.model.compute = poisoned
    with caplog.at_level(logging.WARNING):
        heard = run(core, *(asked(number, set()) for number in range(NUM)))
    for number in range(NUM):
        assert_same(heard[name_of(number), 0], quiet[number])
    assert num_failed > 2
    (message,) = caplog.messages  # one a minute
    assert "computed in parts" in message
    assert type(failure).__name__ in message
    assert "lower max_num_batched_tokens" in message


def test_what_a_failed_attempt_allocated_is_free_when_its_halves_are_computed():
    """An exception holds on to the frames that it passed, and they to their tensors."""
    core = tiny_core(max_num_batched_tokens=512)
    compute = core.runner.model.compute
    held: list[weakref.ref[torch.Tensor]] = []
    left: list[bool] = []

    def poisoned(rows, *arguments):
        left.append(any(one() is not None for one in held))
        large = torch.empty(rows.num_rows, 1000)
        held.append(weakref.ref(large))
        if rows.num_rows > 30:
            raise MemoryError
        return compute(rows, *arguments)

    core.runner.model.compute = poisoned
    run(core, *(asked(number, set()) for number in range(NUM)))
    assert len(left) > NUM
    assert not any(left)


@pytest.mark.parametrize("computed", [0, 5])
def test_steps_that_fail_as_a_whole_end_the_engine(computed):
    """Be it that nothing can be computed, or only what is smaller than a usual prompt."""
    core = tiny_core()
    compute = core.runner.model.compute
    core.runner.model.compute = lambda rows, *arguments: (
        compute(rows, *arguments) if rows.num_rows <= computed else 1 / 0
    )
    for _ in range(MAX_FAILED_STEPS - 1):
        core.handle(Submit(asked(0, set())))
        (output,) = core.step().outputs
        assert output.finish is FinishReason.ERROR
    core.handle(Submit(asked(0, set())))
    with pytest.raises(ZeroDivisionError):
        core.step()


def test_steps_in_which_somebody_is_computed_do_not_count(quiet, monkeypatch):
    core = tiny_core(max_num_seqs=4)
    culprits = {2 * number for number in range(7)}
    in_the_method(core, Poison({name_of(number) for number in culprits}), monkeypatch)
    heard = run(core, *(asked(number, set()) for number in range(NUM)))
    for number in set(range(NUM)) - culprits:
        assert_same(heard[name_of(number), 0], quiet[number])


def test_a_client_that_tries_again_and_again_ends_no_engine(quiet, monkeypatch):
    """Alone on an idle server it is all that the steps are made of."""
    core = tiny_core()
    in_the_method(core, Poison({"r1"}), monkeypatch)
    for _ in range(3 * MAX_FAILED_STEPS):
        assert run(core, asked(1, set()))["r1", 0].error is not None
    assert_same(run(core, asked(0, set()))["r0", 0], quiet[0])


def test_a_lost_device_is_nobodys_fault():
    """The engine ends at once, and everyone is replayed."""
    core = tiny_core(max_num_batched_tokens=512)

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    core.runner.model.compute = core.runner.check_device = lost
    for number in range(NUM):
        core.handle(Submit(asked(number, set())))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        core.step()
    assert len(core.scheduler._sequences) == NUM


def test_the_device_of_this_machine_answers():
    tiny_core().runner.check_device()


def test_numbers_that_are_not_finite_and_written_before_a_step_raises_reach_nobody(quiet):
    """Pages are few: the next ones get those of the culprit, and a NaN spreads even from a weight of 0."""
    core = tiny_core(num_pages=8, max_num_batched_tokens=40)
    core.runner.model.embedding[BAD_TOKEN] = torch.nan
    compute = core.runner.model.compute

    def poisoned(rows, *arguments):
        found = compute(rows, *arguments)
        if bool((rows.tokens == BAD_TOKEN).any()):
            raise Boom
        return found

    core.runner.model.compute = poisoned
    for number in range(NUM):
        bad = asked(number, {number})
        assert run(core, bad)[bad.request_id, 0].error is not None
        good = asked(number, set())
        assert_same(run(core, good)[good.request_id, 0], quiet[number])


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.2, "presence_penalty": 0.4}])
def test_a_wrong_guess_that_raises_changes_no_text(sampling):
    fields = {"max_tokens": 30, "logprobs": 2, "seed": 3} | sampling
    prompts = [[11, 12, 13, 14, 15, 16, 17, 18] * 3, [21, 22, 23] * 5, [31, 32, 33, 34] * 4]
    plain = run(tiny_core(), *(request(str(n), prompt, **fields) for n, prompt in enumerate(prompts)))
    text = plain["0", 0].tokens
    bad = unused(*(one.tokens for one in plain.values()))
    core = eager(tiny_core(drafters=lambda _: {"poisoner": Poisoner(bad, text)}))
    compute = core.runner.model.compute
    num_raised = 0

    def poisoned(rows, *arguments):
        nonlocal num_raised
        found = compute(rows, *arguments)
        if bool((rows.tokens == bad).any()):
            num_raised += 1
            raise Boom
        return found

    core.runner.model.compute = poisoned
    drafted = {"method": "speculative", "drafter": "poisoner"}
    heard = run(core, *(request(str(n), prompt, **fields, **drafted) for n, prompt in enumerate(prompts)))
    assert num_raised >= len(prompts)
    for key, one in heard.items():
        assert_same(one, plain[key])


def test_a_method_with_windows_of_its_own_beside_a_culprit(quiet, monkeypatch):
    oracle = quiet[0].tokens
    made: list[LineGuesser] = []

    def make() -> LineGuesser:
        made.append(LineGuesser(oracle, seed=len(made)))
        return made[-1]

    monkeypatch.setitem(METHODS, "guess", make)
    core = tiny_core()
    in_the_sampler(core, Poison({"r1", "r5", "r6"}, since=2), monkeypatch)
    others = [asked(number, set()) for number in range(1, 8)]
    heard = run(core, asked(0, set(), method="guess"), *others)
    assert_same(heard["r0", 0], quiet[0])
    assert_same(heard["r7", 0], quiet[7])


@pytest.mark.parametrize("broken", ["start", "stop"])
def test_who_cannot_draft_ahead_is_nobodys_fault(broken, monkeypatch, caplog):
    class Broken(Overlap):
        pass

    def fail(*_):
        raise RuntimeError("can't start new thread")

    fields = {"max_tokens": 20, "temperature": 0.0, "logprobs": 1}
    plain = run(tiny_core(), request("a", [7, 8, 9] * 8, **fields))["a", 0]
    core = eager(tiny_core(drafters=own_model))
    core.speculation.overlap = Broken(1, CPU)
    setattr(Broken, broken, fail)
    core.handle(Submit(request("a", [7, 8, 9] * 8, method="speculative", drafter="model", **fields)))
    heard = Heard()
    while core.has_work:
        for output in core.step().outputs:
            heard.hear(output)
    assert_same(heard, plain)
    assert core.speculation.failed == {"model"}
    assert "can't start new thread" in caplog.text
