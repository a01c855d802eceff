"""The same bits from pages for a twentieth of the demand: computed again, moved to host and disk and back,
with copies that fail or are slow, under every policy; and what one engine wrote to disk serves the next."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from engine.decoding import METHODS
from engine.messages import Abort, Submit
from scheduler.clock import ManualClock
from scheduler.config import POLICIES
from scheduler.invariants import check_empty
from scheduler.plan import Tier
from scheduler.types import FinishReason
from tests.engine.tiny import Heard, request, run, tiny_core
from tests.engine.windows import LineGuesser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from engine.core import EngineCore
    from engine.messages import StepOutput
    from scheduler.plan import Copy, SchedulerStats
    from scheduler.types import Request

STEM = [(7 * n * n + 3 * n) % 300 for n in range(150)]
SHORT, LONG = (24, 9), (68, 28)  # tokens of prompt and output
NUM_REQUESTS = 24
PAGE_SIZE = 4
FEW_PAGES = 24  # a twentieth of the demand; the longest request fills them
STEP_S = 0.03

Key = tuple[str, int]


def requests(method: str = "autoregressive") -> list[Request]:
    """Long ones and short ones, of three tenants; some begin alike, some have two choices or penalties."""
    asked = []
    for number in range(NUM_REQUESTS):
        prompt_len, output_len = SHORT if number % 4 == 3 else LONG
        start = 0 if number % 3 == 0 else 5 * number
        prompt = (STEM[start:] + STEM[:start])[: prompt_len - number % 5]
        fields: dict[str, object] = {"logprobs": 1, "seed": number, "max_tokens": output_len - number % 7}
        if number % 3 == 0:
            prompt = [*prompt[:-4], number, number + 1, number + 2, number + 3]
        if number % 4 == 1:
            fields |= {"frequency_penalty": 0.4, "repetition_penalty": 1.2}
        if number % 5 == 2:
            fields["num_choices"] = 2
        if number == 8:
            fields["prompt_logprobs"] = 1
        one = request(f"r{number}", prompt, tenant="abc"[number % 3], priority=number % 2, **fields)
        asked.append(replace(one, arrival_s=number * STEP_S, method=method))
    return asked


def demand() -> int:
    """Pages that all choices together fill."""
    return sum(
        one.num_choices * -(-(len(one.prompt_ids) + one.sampling.max_tokens) // PAGE_SIZE)
        for one in requests()
    )


@pytest.fixture(scope="module")
def expected() -> dict[Key, Heard]:
    core = tiny_core(num_pages=800, page_size=PAGE_SIZE, max_num_seqs=64)
    heard = run(core, *requests(), checked=False)
    assert core.scheduler.stats().num_preemptions == 0
    return heard


@pytest.fixture
def build() -> Iterator[Callable[..., EngineCore]]:
    """Builds cores with few pages whose clock stands still in a step, and ends their copy threads."""
    cores: list[EngineCore] = []
    scarce = {
        "num_pages": FEW_PAGES,
        "page_size": PAGE_SIZE,
        "max_num_seqs": 6,
        "min_shared_tokens": 16,
    }

    def make(*, settled: bool = False, **settings: object) -> EngineCore:
        clock = ManualClock()
        core = tiny_core(clock=clock, **{**scarce, **settings})  # type: ignore[arg-type]
        cores.append(core)
        step = core.step

        def timed() -> StepOutput:
            clock.advance(STEP_S)
            output = step()
            # Who lost its pages in a plan that computes nothing has lost its page table as well.
            assert core.runner.batches.num_tables <= output.stats.num_running
            if settled:  # the same copies in every run, however busy the machine
                while core.copier.num_in_flight > len(core.copier._ended):
                    time.sleep(0.0002)
            return output

        core.step = timed  # type: ignore[method-assign]
        return core

    yield make
    for core in cores:
        core.close()


def serve(
    core: EngineCore, expected: dict[Key, Heard], steps_between: int = 2, method: str = "autoregressive"
) -> SchedulerStats:
    """Serve all that is asked for, which must come out bit by bit -> what it took."""
    heard = run(core, *requests(method), steps_between=steps_between, checked=False)
    check_empty(core.scheduler)
    assert heard.keys() == expected.keys()
    for key, one in heard.items():
        assert one.finish == expected[key].finish, (key, one.error)
        assert one.tokens == expected[key].tokens, f"{key}: another text"
        assert one.logprobs == expected[key].logprobs, f"{key}: not the same bits"
        assert one.prompt_logprobs == expected[key].prompt_logprobs
    return core.scheduler.stats()


def failures(core: EngineCore) -> list[Tier]:
    """Grows as the core reports copies that failed."""
    seen: list[Tier] = []
    step = core.step

    def noted() -> StepOutput:
        output = step()
        seen.extend(output.failed_copies)
        return output

    core.step = noted  # type: ignore[method-assign]
    return seen


def arrived(stats: SchedulerStats, tier: Tier) -> int:
    return sum(one.num_in for one in stats.tiers if one.tier is tier)


def test_the_pages_are_a_twentieth_of_the_demand():
    assert 0.05 * demand() >= FEW_PAGES


@pytest.mark.parametrize("policy", POLICIES)
def test_recomputed(policy, build, expected):
    stats = serve(build(policy=policy), expected)
    assert stats.num_preempted_for_pages > 0
    assert stats.recomputed_tokens > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_moved_to_the_host_and_back(policy, build, expected):
    stats = serve(build(policy=policy, host_pages=200), expected)
    assert stats.num_preempted_for_pages > 0
    assert arrived(stats, Tier.HOST) > 0
    assert stats.num_pages_up > 0


@pytest.mark.parametrize("policy", ["mlfq", "mlfq-static", "priority", "srpt"])
def test_places_are_taken_as_well(policy, build, expected):
    """Two places, many pages' worth of requests that come later and go first."""
    stats = serve(build(policy=policy, host_pages=200, num_pages=60, max_num_seqs=2), expected, 5)
    assert stats.num_preempted_for_places > 0
    assert stats.num_pages_up > 0


@pytest.mark.parametrize("policy", ["mlfq", "fcfs"])
def test_moved_to_the_disk_and_back(policy, build, expected, tmp_path: Path):
    """The host holds so little that most of what comes back comes from the disk."""
    from_disk: list[Copy] = []

    def note(copy: Copy) -> None:
        if copy.source is Tier.DISK:
            from_disk.append(copy)

    disk = tmp_path / "kv"
    core = build(policy=policy, host_pages=4, disk_pages=400, disk=disk, before=note)
    stats = serve(core, expected)
    assert arrived(stats, Tier.DISK) > 0
    assert from_disk


class Failing:
    """A copier's hook: of each way every other copy fails, the first included."""

    def __init__(self) -> None:
        self.tried: Counter[tuple[Tier, Tier]] = Counter()

    def __call__(self, copy: Copy) -> None:
        way = (copy.source, copy.target)
        self.tried[way] += 1
        if self.tried[way] % 2:
            raise OSError("injected")


@pytest.mark.parametrize("policy", ["mlfq", "fcfs"])
def test_copies_that_fail(policy, build, expected, tmp_path: Path):
    failing = Failing()
    disk = tmp_path / "kv"
    core = build(settled=True, policy=policy, host_pages=8, disk_pages=400, disk=disk, before=failing)
    failed = failures(core)
    stats = serve(core, expected)
    assert len(failing.tried) == 4, "not every way was tried"
    failed_of_way = Counter({way: -(-tried // 2) for way, tried in failing.tried.items()})
    for tier in Tier:
        to_it = sum(count for (_, target), count in failed_of_way.items() if target is tier)
        assert failed.count(tier) == to_it > 0
    assert stats.num_pages_up > 0


@pytest.mark.parametrize("policy", ["mlfq", "fcfs"])
@pytest.mark.parametrize("up", [True, False])
def test_copies_that_are_slow(up, policy, build, expected, tmp_path: Path):
    """Nobody reads a page before its content has landed, nor writes over one that is still being copied."""

    def slow(copy: Copy) -> None:
        if (copy.target is Tier.DEVICE) is up:
            time.sleep(0.002)

    if up:
        core = build(policy=policy, host_pages=200, before=slow)
    else:
        core = build(policy=policy, host_pages=12, disk_pages=400, disk=tmp_path / "kv", before=slow)
    stats = serve(core, expected)
    assert (stats.num_pages_up if up else arrived(stats, Tier.HOST)) > 0


@pytest.mark.parametrize("policy", ["mlfq", "fcfs"])
def test_in_small_chunks_with_windows(policy, build, expected, monkeypatch):
    class Guesser(LineGuesser):
        def decide(self, sequence, draws):
            self.oracle = expected[sequence.request.request_id, sequence.index].tokens
            return super().decide(sequence, draws)

    monkeypatch.setitem(METHODS, "guess", lambda: Guesser([], seed=3))
    core = build(policy=policy, host_pages=200, max_num_batched_tokens=20, max_tenant_running=2)
    stats = serve(core, expected, method="guess")
    assert stats.num_preemptions > 0
    assert stats.num_pages_up > 0


def test_a_common_prefix_is_computed_by_one_and_awaited_by_the_others(build):
    """However many arrive together: the text is that of each alone, and the prefix is computed once."""

    def asked() -> list[Request]:
        return [
            request(f"p{number}", [*STEM[:96], number, 7 * number], seed=number, logprobs=1, max_tokens=9)
            for number in range(6)
        ]

    alone = {key: heard for one in asked() for key, heard in run(tiny_core(), one).items()}
    core = build(num_pages=200, max_num_batched_tokens=128)
    num_computed = 0
    execute = core.runner.execute

    def counting(plan):
        nonlocal num_computed
        num_computed += plan.num_tokens
        return execute(plan)

    core.runner.execute = counting
    heard = run(core, *asked())
    assert core.scheduler._places.num_parkings > 0
    assert {key: one.logprobs for key, one in heard.items()} == {k: one.logprobs for k, one in alone.items()}
    # 96 once, then 2 of the prompt and 8 of the output for each: the ninth is not computed.
    assert num_computed == 96 + 6 * (2 + 8)


@pytest.fixture
def long_ago(tmp_path: Path) -> tuple[Path, list[Heard]]:
    """A disk file that an engine has left behind, and the texts that it had given."""
    disk = tmp_path / "kv"
    core = tiny_core(num_pages=60, page_size=PAGE_SIZE, host_pages=40, disk_pages=400, disk=disk)
    heard = [run(core, again)["r", 0] for again in long_prompts()]
    core.close()
    return disk, heard


def long_prompts() -> list[Request]:
    return [
        request("r", [*STEM[n:], *STEM[:n]], seed=n, logprobs=1, max_tokens=10) for n in range(0, 100, 10)
    ]


def test_the_next_engine_finds_what_the_last_one_left_on_disk(long_ago, build):
    disk, texts = long_ago
    core = build(num_pages=60, page_size=PAGE_SIZE, host_pages=40, disk_pages=400, disk=disk)
    num_cached = 0
    for again, text in zip(long_prompts(), texts, strict=True):
        heard = run(core, again)["r", 0]
        assert heard.logprobs == text.logprobs
        num_cached += heard.num_cached
    assert num_cached > 0
    assert core.scheduler.stats().num_pages_up >= num_cached // PAGE_SIZE


@pytest.mark.parametrize("step", [1, 1009])
def test_a_damaged_disk_file_costs_only_time(step, long_ago, build, caplog):
    """Every `step`-th byte behind the header is another one: entries and pages alike."""
    disk, texts = long_ago
    content = bytearray(disk.read_bytes())
    for place in range(4096, len(content), step):
        content[place] ^= 0x5A
    disk.write_bytes(content)
    core = build(num_pages=60, page_size=PAGE_SIZE, host_pages=40, disk_pages=400, disk=disk)
    failed = failures(core)
    for again, text in zip(long_prompts(), texts, strict=True):
        heard = run(core, again)["r", 0]
        assert heard.logprobs == text.logprobs
        assert heard.num_cached == 0
    # Where all is damaged, so is the table, and no page is looked for.
    assert len(failed) > 1 if step > 1 else not failed
    assert set(failed) <= {Tier.DEVICE}
    assert caplog.text.count("is damaged") <= 1


def test_damaged_pages_are_noticed_one_by_one(long_ago, build):
    """The entries are whole: the engine believes in the pages until it reads them."""
    disk, texts = long_ago
    core = build(num_pages=60, page_size=PAGE_SIZE, host_pages=40, disk_pages=400, disk=disk)
    file = core.copier.disk
    content = bytearray(disk.read_bytes())
    for place in range(file._pages_offset, len(content), 2 * file.page_bytes):
        content[place] ^= 0x5A
    disk.write_bytes(content)  # the same file: it is open
    num_cached = []
    for again, text in zip(long_prompts(), texts, strict=True):
        heard = run(core, again)["r", 0]
        assert heard.logprobs == text.logprobs
        num_cached.append(heard.num_cached)
    assert core.scheduler.stats().num_pages_up > 0
    assert 0 in num_cached


def test_what_was_found_in_the_cache_is_not_cleared_after_numbers_that_are_not_finite(build):
    """Whoever gets pages then finds them cleared, but for those whose content it found."""
    core = build(num_pages=80, host_pages=40)
    asked = request("r", STEM[:80], seed=1, logprobs=1, max_tokens=10)
    text = run(core, asked)["r", 0]
    embedding = core.runner.model.embedding
    kept = embedding[299].clone()
    embedding[299] = torch.nan
    assert run(core, request("bad", [299] * 40, max_tokens=4))["bad", 0].finish is FinishReason.ERROR
    embedding[299] = kept
    assert core.runner.storage.tainted
    again = run(core, asked)["r", 0]
    assert again.num_cached > 0
    assert again.logprobs == text.logprobs


class Gate:
    """A copier's hook that holds back what goes to the device while it is shut."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()

    def __call__(self, copy: Copy) -> None:
        if copy.target is Tier.DEVICE:
            assert self.open.wait(10)


@pytest.fixture
def fetching(build) -> tuple[EngineCore, Gate]:
    """A core whose only request is to find its prompt's pages on the host, and waits for them."""
    gate = Gate()
    core = build(num_pages=24, host_pages=200, before=gate)
    run(core, request("before", STEM[:80], max_tokens=4))
    run(core, request("other", STEM[60:150], max_tokens=4))
    gate.open.clear()
    core.handle(Submit(request("r", STEM[:80], seed=1, max_tokens=4, deadline_s=1000.0)))
    for _ in range(10):
        if not core.can_step:
            break
        core.step()
    assert core.scheduler.stats().num_parked == 1
    return core, gate


def test_who_waits_for_copies_alone_does_not_step(fetching):
    core, gate = fetching
    assert not core.can_step
    before = core.scheduler._num_steps
    for _ in range(1000):
        assert not core.can_step
    gate.open.set()
    num_steps = 0
    while core.has_work:
        if not core.can_step:
            core.copier.wait(5)
        assert core.can_step, "woken for nothing"
        core.step()
        num_steps += 1
    # At the most one for each copy that landed, and those that compute.
    num_landed = core.scheduler.stats().num_pages_up + arrived(core.scheduler.stats(), Tier.HOST)
    assert core.scheduler._num_steps - before == num_steps <= num_landed + 10
    assert core.scheduler.stats().num_pages_up > 0


def test_a_deadline_and_an_abort_end_one_that_waits_for_its_pages(fetching):
    core, gate = fetching
    core.handle(Submit(request("too", STEM[:80], seed=2, max_tokens=4)))
    core.handle(Abort("too"))
    assert core.can_step
    (output,) = core.step().outputs
    assert (output.request_id, output.finish) == ("too", FinishReason.ABORT)
    core.scheduler._clock.advance(2000.0)
    gate.open.set()
    ended = []
    while core.has_work:
        if not core.can_step:
            core.copier.wait(5)
        ended += [(one.request_id, one.finish) for one in core.step().outputs]
    assert ended == [("r", FinishReason.DEADLINE)]
    check_empty(core.scheduler)
