"""Workloads, prompts, figures and the report of `octavo bench`."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from server.bench.client import Client, Outcome
from server.bench.http import Target
from server.bench.prompts import PromptMaker, calibrate
from server.bench.run import BenchError, BenchOptions, run_bench, run_workload
from server.bench.summary import Spread, summarise
from server.bench.trace import TraceError, read_trace
from server.bench.workloads import NAMED, Job, Workload, named
from tests.server.bench.fake_server import FakeServer, fake_server

if TYPE_CHECKING:
    from collections.abc import Iterator

TRACES = Path(__file__).parents[4] / "shared" / "traces"


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """A fake server on a thread of its own, for the command, which runs its own event loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = fake_server()
    yield asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(5)
    asyncio.run_coroutine_threadsafe(server.__aexit__(None, None, None), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


def client_of(fake: FakeServer) -> Client:
    return Client(Target.of(fake.url), model="fake", api="completions", keep_alive=True, timeout_s=10)


def test_the_named_workloads_are_what_their_names_promise() -> None:
    sizes = {name: (named(name).concurrency, len(named(name).jobs)) for name in NAMED}
    assert sizes == {"A": (1, 8), "B": (8, 32), "C": (32, 64), "D": (4, 16), "E": (24, 24)}
    assert {(job.input_tokens, job.output_tokens) for job in named("D").jobs} == {(1024, 16)}
    lengths = sorted(job.output_tokens for job in named("E").jobs)
    assert lengths == [16] * 19 + [512] * 5
    assert len(named("E", 50).jobs) == named("E", 50).concurrency == 50


async def test_concurrency_is_used_and_not_exceeded() -> None:
    async with fake_server(gap_s=0.01) as fake:
        workload = Workload("x", "", tuple(Job(1, 3) for _ in range(12)), 4)
        outcomes = await run_workload(client_of(fake), workload, ["a"] * 12, lambda: None)
    assert len(outcomes) == 12
    assert fake.most_running == 4


async def test_a_trace_sends_each_request_at_its_time() -> None:
    async with fake_server() as fake:
        workload = Workload("trace", "", (Job(1, 1, 0.2), Job(1, 2, 0.0)), None)
        outcomes = await run_workload(client_of(fake), workload, ["a", "b"], lambda: None)
    assert [outcome.output_tokens for outcome in outcomes] == [1, 2]
    assert 0.15 < outcomes[0].start_s - outcomes[1].start_s < 1


async def test_prompts_have_the_wanted_length_by_the_servers_own_count() -> None:
    async with fake_server() as fake:
        maker = await calibrate(client_of(fake))
        assert maker.calibration == "/tokenize"
        prompts = [await maker.make(random.Random("s"), 128) for _ in range(2)]
        outcome = await client_of(fake).measure(Job(128, 1), prompts[0])
    assert outcome.prompt_tokens == 128
    assert prompts[0] == prompts[1]  # the same seed


async def test_prompts_are_scaled_by_a_ratio_where_the_server_cannot_tokenise() -> None:
    async with fake_server(has_tokenize=False) as fake:
        maker = await calibrate(client_of(fake))
        assert "tokens per word" in maker.calibration
        outcome = await client_of(fake).measure(Job(500, 1), await maker.make(random.Random(1), 500))
    assert outcome.prompt_tokens == pytest.approx(500, rel=0.1)


async def test_a_prompt_is_never_empty() -> None:
    assert await PromptMaker(None, 1.0).make(random.Random(0), 0)


def test_percentiles_are_numpys() -> None:
    numpy = pytest.importorskip("numpy")
    values = [random.Random(1).random() for _ in range(37)]
    spread = Spread.of(values)
    assert spread.p50 == pytest.approx(numpy.percentile(values, 50))
    assert spread.p99 == pytest.approx(numpy.percentile(values, 99))
    assert math.isnan(Spread.of([]).p99)


def test_failed_requests_count_as_errors_and_nowhere_else() -> None:
    good = Outcome(Job(1, 4, label="short"), 10.0, 12.0, 0.5, [0.5, 0.5, 0.5], 7, 4)
    bad = Outcome(Job(1, 4, label="long"), 10.0, 14.0, error="status 429", output_tokens=3)
    summary = summarise([good, bad])
    assert (summary.num_requests, summary.num_errors, summary.errors) == (2, 1, {"status 429": 1})
    assert summary.duration_s == 4.0
    assert summary.output_tokens_per_s == 1.0
    assert summary.requests_per_s == 0.25
    assert summary.completion_by_label_s == {"short": Spread(2.0, 2.0, 2.0)}


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.4799600,3,0\n"
)
SERVEGEN = (
    "arrived_at,client_id,num_prefill_tokens,num_decode_tokens,reason_ratio\n1.0,3,4808,10,0.9\n2.5,4,3,0,\n"
)
MOONCAKE = (
    '{"timestamp": 500, "input_length": 4808, "output_length": 10, "hash_ids": [0]}\n'
    '{"timestamp": 2000, "input_length": 3, "output_length": 0, "hash_ids": []}\n'
)


@pytest.mark.parametrize(
    ("name", "text"), [("azure.csv", AZURE), ("servegen.csv", SERVEGEN), ("mooncake.jsonl", MOONCAKE)]
)
def test_traces_of_every_format_are_read_scaled_and_clipped(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    workload = read_trace(tmp_path / name, time_scale=2.0, max_input=100)
    assert workload.concurrency is None
    assert workload.jobs[0] == Job(100, 10, 0.0)
    assert (workload.jobs[1].input_tokens, workload.jobs[1].output_tokens) == (3, 1)
    assert workload.jobs[1].at_s == pytest.approx(3.0)
    assert len(read_trace(tmp_path / name, num_requests=1).jobs) == 1


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "", "arrived_at,num_prefill_tokens,num_decode_tokens\nx,1,1\n"]
)
def test_what_is_no_trace_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=r"other\.csv"):
        read_trace(path)
    with pytest.raises(TraceError, match="cannot read"):
        read_trace(tmp_path / "absent.csv")


@pytest.mark.skipif(not TRACES.is_dir(), reason="the public traces are not beside this checkout")
@pytest.mark.parametrize("path", sorted(TRACES.glob("*.[cj]s*")), ids=lambda path: path.name)
def test_the_public_traces_are_read(path: Path) -> None:
    jobs = read_trace(path, num_requests=500).jobs
    assert len(jobs) == 500
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(jobs))


def run(fake: FakeServer, tmp_path: Path, workloads: list[Workload]) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "results" / "bench.json"
    status = run_bench(workloads, BenchOptions(url=fake.url, json_path=path))
    return status, json.loads(path.read_text())


def test_a_run_prints_a_table_and_writes_the_raw_figures(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, written = run(fake, tmp_path, [named("A", 3), named("E", 5)])
    printed = capsys.readouterr().out
    assert status == 0
    assert "fake at" in printed
    assert "version 9.9" in printed
    assert "short: completion mean" in printed
    first, second = written["workloads"]
    assert [len(request["gaps_ms"]) for request in first["requests"]] == [127] * 3
    assert {request["prompt_tokens"] for request in first["requests"]} == {128}
    assert sorted(second["summary"]["completion_by_label_s"]) == ["long", "short"]
    assert written["machine"]["cores"] >= 1
    assert written["server"] == {"model": "fake", "version": "9.9"}
    prompts = [body["prompt"] for body in fake.bodies]
    assert len(set(prompts)) == len(prompts)


def test_a_failed_request_makes_the_status_one(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.error_after = 8  # the warm-up asks for fewer tokens
    status, written = run(fake, tmp_path, [named("A", 2)])
    assert status == 1
    assert "2 of 2" in capsys.readouterr().out
    assert written["workloads"][0]["summary"]["ttft_s"]["p50"] is None
    assert "engine died" in written["workloads"][0]["requests"][0]["error"]


def test_a_server_that_refuses_ends_the_run_with_its_words(fake: FakeServer) -> None:
    fake.refuse = True
    with pytest.raises(BenchError, match="queue is full"):
        run_bench([named("A", 1)], BenchOptions(url=fake.url))


def test_no_server_is_one_line() -> None:
    with pytest.raises(BenchError, match="cannot measure http://127"):
        run_bench([named("A", 1)], BenchOptions(url="http://127.0.0.1:1"))


@pytest.mark.parametrize("key", [["--api-key", "hunter2"], ["--api-key=hunter2"]])
def test_the_report_does_not_repeat_the_key(
    key: list[str], fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["octavo", "bench", *key])
    path = tmp_path / "bench.json"
    run_bench([named("A", 1)], BenchOptions(url=fake.url, json_path=path))
    assert "hunter2" not in path.read_text()
    assert "<hidden>" in json.loads(path.read_text())["command"]


def test_a_report_that_cannot_be_written_is_one_line(fake: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match="cannot write"):
        run_bench([named("A", 1)], BenchOptions(url=fake.url, json_path=tmp_path / "file" / "bench.json"))
