"""Traces are read, shaped and dealt out as documented."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.replay.load import (
    BURST_S,
    LoadError,
    clipped,
    divided,
    fitted,
    offered_load,
    routed,
    with_burst,
    work_s,
)
from scheduler.replay.run import Shaping
from scheduler.replay.ticks import seconds
from scheduler.replay.trace import Trace, TraceError, TraceRequest, read_trace
from tests.scheduler.replay.machines import machine, run


def trace_of(*rows: tuple[float, int, int]) -> Trace:
    return Trace("made up", tuple(TraceRequest(*row) for row in rows))


EVEN = trace_of(*((float(k), 8, 4) for k in range(1000)))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "azure.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
            "2023-11-16 18:17:04.4799600,3180,0\n",
        ),
        (
            "servegen.csv",
            "arrived_at,client_id,num_prefill_tokens,num_decode_tokens,reason_ratio\n"
            "1.0,,4808,10,0.9\n1.5,,3180,0,0.9\n",
        ),
        (
            "mooncake.jsonl",
            '{"timestamp": 1000, "input_length": 4808, "output_length": 10, "hash_ids": [0]}\n'
            '{"timestamp": 1500, "input_length": 3180, "output_length": 0, "hash_ids": []}\n',
        ),
        ("own.csv", "arrival,input,output\n7.5,3180,0\n7,4808,10\n"),
    ],
)
def test_every_format_is_read(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    requests = read_trace(path).requests
    assert [(one.prompt_len, one.output_len) for one in requests] == [(4808, 10), (3180, 1)]
    assert [one.arrival_s for one in requests] == pytest.approx([0.0, 0.5])
    assert len(read_trace(path, limit=1).requests) == 1


def test_tenants_are_read(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("arrival,input,output,tenant,priority\n0,1,1,me,3\n")
    assert read_trace(path).requests == (TraceRequest(0.0, 1, 1, "me", 3),)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"a,b\n1,2\n",
        b"arrival,input,output\n0,1,x\n",
        b"arrival,input,output\nnan,1,1\n",
        b"arrival,input,output\n" + 200_000 * b"9",
        5000 * b"\xff",
    ],
    ids=["empty", "another", "no number", "nan", "endless", "no text"],
)
def test_what_is_no_trace_is_refused_in_a_line(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(text)
    with pytest.raises(TraceError, match=r"bad\.csv") as refused:
        read_trace(path)
    assert len(str(refused.value)) < 400


def test_work_is_what_a_replay_charges() -> None:
    on = machine(max_num_seqs=4)
    requests = [TraceRequest(0.0, 21, 9), TraceRequest(0.0, 3, 1), TraceRequest(0.0, 8, 2)]
    replica = run("fcfs", on, requests)
    for job, one in zip(replica.jobs, requests, strict=True):
        assert job.attained_s == pytest.approx(work_s(one, on), abs=1.0 / 4)  # a chunk may be split


def test_a_load_of_one_is_what_the_machine_just_serves() -> None:
    on = machine(max_num_seqs=4, max_num_batched_tokens=64)
    trace = Shaping(load=1.0).apply(trace_of(*((float(k), 8, 40) for k in range(1000))), on, 1)
    assert offered_load(trace, on) == pytest.approx(1.0, rel=0.02)
    replica = run("fcfs", on, trace.requests)
    assert seconds(replica.counts.end) == pytest.approx(trace.requests[-1].arrival_s, rel=0.02)


def test_a_load_is_of_all_machines_together() -> None:
    on = machine(max_num_seqs=4)
    alone, together = (Shaping(load=0.5).apply(EVEN, on, count) for count in (1, 4))
    assert alone.requests[-1].arrival_s == pytest.approx(4 * together.requests[-1].arrival_s, rel=0.05)


def test_a_load_of_what_comes_at_once_is_refused() -> None:
    with pytest.raises(LoadError, match="at once"):
        Shaping(load=0.5).apply(trace_of((0.0, 1, 1), (0.0, 1, 1)), machine(), 1)


def test_a_burst_is_twice_the_capacity_for_a_minute() -> None:
    on = machine(max_num_seqs=4)
    before = Shaping(load=0.7).apply(EVEN, on, 1)
    after = with_burst(before, on)
    begin_s = after.requests[500].arrival_s
    inside = [one for one in after.requests if begin_s <= one.arrival_s < begin_s + BURST_S]
    assert sum(work_s(one, on) for one in inside) == pytest.approx(2 * BURST_S, rel=0.05)
    assert after.requests[:501] == before.requests[:501]
    with pytest.raises(LoadError, match="too few"):
        with_burst(trace_of((0.0, 1, 1), (1.0, 1, 1)), on)


def test_lengths_are_changed_and_it_is_said() -> None:
    trace = trace_of((0.0, 100, 50), (1.0, 5000, 10), (2.0, 3, 3000))
    shorter = clipped(divided(trace, 2.0), 20)
    assert [(one.prompt_len, one.output_len) for one in shorter.requests] == [(50, 20), (2500, 5), (2, 20)]
    assert shorter.notes == ("lengths divided by 2", "outputs clipped to 20 tokens (2 of them)")
    fits = fitted(trace, machine(max_model_len=1000))
    assert [(one.prompt_len, one.output_len) for one in fits.requests] == [(100, 50), (999, 1), (3, 997)]
    assert fits.notes == ("2 requests cut to 1,000 tokens",)


@pytest.mark.parametrize("routing", ["round-robin", "least-work"])
def test_every_request_goes_to_one_machine(routing: str) -> None:
    parts = routed(EVEN, machine(), 7, routing)
    assert sorted((one for part in parts for one in part), key=lambda one: one.arrival_s) == list(
        EVEN.requests
    )
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_least_loaded_machine_is_sent_the_next_request() -> None:
    trace = trace_of((0.0, 80, 2), (0.1, 1, 2), (0.2, 1, 2), (0.3, 1, 2))
    long, short = routed(trace, machine(), 2, "least-work")
    assert len(long) == 1
    assert len(short) == 3
