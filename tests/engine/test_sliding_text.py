"""Models with windows: the same bits whatever became of the pages behind them; long texts in few pages."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from engine.decoding import METHODS
from engine.messages import Submit
from engine.models.config import Layer, Rope
from engine.models.kv_groups import kv_spans
from scheduler.invariants import check
from tests.engine.tiny import SETTINGS, TINY, Heard, core_around, random_weights, request, run
from tests.engine.windows import LineGuesser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from engine.core import EngineCore
    from engine.messages import StepOutput
    from engine.models.config import TransformerConfig
    from scheduler.plan import StepPlan
    from scheduler.types import Request

PAGE_SIZE = 4
STEM = [(7 * n * n + 3 * n) % 300 for n in range(240)]
WHOLE = Layer(rope=Rope(theta=10000.0, num_rotated=16))
LOCAL = replace(WHOLE, window=21)
CHUNKED = replace(WHOLE, chunk=32)
MODELS = {
    "all_slide": (LOCAL, LOCAL),
    "few_whole": (LOCAL, LOCAL, WHOLE, LOCAL, LOCAL, LOCAL),  # three groups of two, one of them short of one
    "chunks": (CHUNKED, CHUNKED, CHUNKED, Layer()),
}


def model(name: str) -> TransformerConfig:
    return replace(TINY, layers=MODELS[name])


def requests() -> list[Request]:
    """Prompts within and beyond the windows, some that begin alike, some with several choices."""
    asked = []
    for number, (prompt_len, output_len) in enumerate([(9, 20), (60, 30), (110, 6), (60, 45), (18, 60)]):
        prompt = STEM[:prompt_len] if number % 2 else STEM[7 * number :][:prompt_len]
        fields: dict[str, object] = {"logprobs": 1, "seed": number, "max_tokens": output_len}
        if number == 3:
            fields["num_choices"] = 3
        if number == 2:
            fields["prompt_logprobs"] = 1
        asked.append(request(f"r{number}", prompt, **fields))
    return asked


def core_for(name: str, **settings: object) -> EngineCore:
    """`num_pages`: those that a sequence of 120 tokens takes at most, so many times over."""
    scheduling = replace(SETTINGS, page_size=PAGE_SIZE, max_num_batched_tokens=24, max_num_seqs=6)
    disk = settings.pop("disk", None)
    spans = kv_spans(model(name), PAGE_SIZE)
    settings["num_pages"] = int(spans.most_pages(120, 24) * settings.pop("times", 1))  # type: ignore[call-overload]
    scheduling = replace(scheduling, **settings)  # type: ignore[arg-type]
    return core_around(model(name), random_weights(model(name)), scheduling, disk=disk)  # type: ignore[arg-type]


@pytest.fixture
def build() -> Iterator[Callable[..., EngineCore]]:
    cores: list[EngineCore] = []

    def make(name: str, **settings: object) -> EngineCore:
        cores.append(core_for(name, **settings))
        return cores[-1]

    yield make
    for core in cores:
        core.close()


@pytest.fixture(scope="module")
def texts() -> dict[str, dict[tuple[str, int], Heard]]:
    """One after the other, on an engine with many pages that computes prompts whole and finds none."""
    plain = {"times": 8, "max_num_batched_tokens": 512, "max_num_seqs": 3, "prefix_cache": False}
    return {name: serve(core_for(name, **plain), *requests(), steps_between=1000) for name in MODELS}


def serve(core: EngineCore, *asked: Request, steps_between: int = 0) -> dict[tuple[str, int], Heard]:
    return run(core, *asked, checked=False, steps_between=steps_between)


def same(heard: dict[tuple[str, int], Heard], expected: dict[tuple[str, int], Heard]) -> None:
    assert heard.keys() == expected.keys()
    for key, one in heard.items():
        assert one.tokens == expected[key].tokens, f"{key}: another text"
        assert one.logprobs == expected[key].logprobs, f"{key}: not the same bits"
        assert one.prompt_logprobs == expected[key].prompt_logprobs


@pytest.mark.parametrize("name", MODELS)
def test_side_by_side_from_few_pages(name, texts, build):
    core = build(name)
    same(run(core, *requests()), texts[name])  # the invariants hold in every step
    assert core.scheduler.stats().num_preemptions > 0


@pytest.mark.parametrize("name", MODELS)
def test_what_was_preempted_comes_back_from_host_and_disk(name, texts, build, tmp_path):
    core = build(name, host_pages=40, disk_pages=400, disk=tmp_path / "pages", policy="mlfq")
    for _ in range(2):
        same(serve(core, *requests(), steps_between=2), texts[name])
    assert core.scheduler.stats().num_pages_up > 0


@pytest.mark.parametrize("name", MODELS)
def test_what_one_engine_wrote_to_disk_serves_the_next(name, texts, build, tmp_path: Path):
    tiers = {"times": 2, "host_pages": 400, "disk_pages": 400, "disk": tmp_path / "pages"}
    first = build(name, **tiers)
    same(serve(first, *requests()), texts[name])
    crowd_out(first)
    first.close()
    second = build(name, **tiers)
    same(serve(second, *requests()), texts[name])
    assert second.scheduler.stats().num_pages_up > 0


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_is_found_by_what_the_next_token_sees(name, texts, build):
    core = build(name, times=8)
    serve(core, request("before", STEM[:59], max_tokens=1, temperature=0.0))
    heard = serve(core, *requests())
    same(heard, texts[name])
    assert heard["r1", 0].num_cached == heard["r3", 1].num_cached == 56
    # Most of what was behind the windows then is still there for those who branch off earlier.
    again = serve(core, request("shorter", STEM[:33], max_tokens=3, seed=1))["shorter", 0]
    assert again.num_cached == 32
    alone = serve(core_for(name, times=8), request("shorter", STEM[:33], max_tokens=3, seed=1))["shorter", 0]
    assert again.tokens == alone.tokens


@pytest.mark.parametrize("name", MODELS)
def test_drafts_at_the_edge_of_a_window(name, texts, build, monkeypatch):
    long = texts[name]["r4", 0]
    monkeypatch.setitem(METHODS, "guess", lambda: LineGuesser(long.tokens, seed=3))
    core = build(name, times=1.2)
    drafted = replace(requests()[4], method="guess")
    heard = serve(core, drafted, *requests()[:4], replace(drafted, request_id="again"))
    assert heard["r4", 0].tokens == heard["again", 0].tokens == long.tokens
    assert heard["r4", 0].logprobs == long.logprobs


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_read_from_pages_that_nobody_holds(name, texts, build):
    core = build(name, times=8, prefix_cache=False)
    execute, pool = core.runner.execute, core.scheduler._pool

    def execute_among_rubbish(plan: StepPlan) -> object:
        idle = [page for page, count in enumerate(pool.references) if not count]
        core.runner.storage.pages[idle] = torch.nan
        return execute(plan)

    core.runner.execute = execute_among_rubbish
    asked = [one for one in requests() if one.num_choices == 1]
    same(serve(core, *asked), {key: heard for key, heard in texts[name].items() if key[0] != "r3"})


def test_a_long_text_stays_within_a_bounded_number_of_pages(build):
    core = build("all_slide")
    core.handle(Submit(request("r", STEM[:100], max_tokens=300)))
    sequence, most = core.scheduler.sequence(0), 0
    while core.has_work:
        core.step()
        check(core.scheduler)
        if sequence.num_computed > 100:
            most = max(most, core.scheduler.stats().num_pages_held)
    assert sequence.num_output == 300
    assert (
        most == 20 // PAGE_SIZE + 1
    )  # what a window of 21 covers of full pages, and the page that is written


def test_pages_freed_behind_a_window_serve_others_at_once(build):
    core = build("all_slide")
    pool = core.scheduler._pool
    serve(core, request("r", STEM[:8], max_tokens=200, temperature=0.0))
    # Of output only the last window is kept, and the prompt.
    assert len(pool.cached) == 2 + 20 // PAGE_SIZE
    assert not pool.references.count(1)


def test_numbers_that_went_wrong_behind_a_window_harm_nobody(build):
    core = build("all_slide")
    serve(core, request("r", STEM[:8], max_tokens=100, temperature=0.0))
    assert core.runner.storage.tainted  # nobody could have noticed
    core.runner.storage.pages.fill_(torch.nan)
    core.scheduler._pool.release(core.scheduler._pool.take(core.scheduler._pool.available))
    heard = serve(core, request("s", STEM[:50], max_tokens=40, temperature=0.0))["s", 0]
    assert heard.error is None


def crowd_out(core: EngineCore) -> None:
    """Others take all pages of the device, so that what was there is on the disk or nowhere."""
    for number in range(3):
        prompt = [(11 * n + number) % 300 for n in range(110)]
        serve(core, request(f"crowd{number}", prompt, max_tokens=1))
    while core.copier is not None and core.copier.num_in_flight:
        step_after_copies(core)


def step_after_copies(core: EngineCore) -> StepOutput:
    assert core.copier is not None
    core.copier.wait(5.0)
    return core.step()
