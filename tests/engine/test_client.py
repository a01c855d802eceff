"""The client and its journal against an engine process that dies, hangs and talks nonsense on command."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq

from engine.child import engine_command
from engine.client import EngineDead, EngineProcess
from engine.config import EngineConfig
from engine.messages import Abort, Failed, SequenceOutput
from scheduler.types import FinishReason, Request, SamplingParams
from tests.engine.fake_process import CRASH, HANG, HARMLESS, POISON, SLOW

COMMAND = [sys.executable, str(Path(__file__).with_name("fake_process.py"))]


@pytest.fixture
def make(tmp_path):
    def client(plan: str, **options) -> EngineProcess:
        count = tmp_path / "count"
        count.touch()
        return EngineProcess(EngineConfig(model=f"{count}|{plan}"), command=COMMAND, **options)

    return client


@asynccontextmanager
async def started(client: EngineProcess):
    try:
        await client.start()
        yield client
    finally:
        await client.close()


async def until(seen: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not seen():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def pid_of(client: EngineProcess) -> int:
    """Of an engine that was spawned, and nobody listens to yet."""
    child = client._child
    assert child is not None

    def heard() -> bool:
        if child.pid is None:
            child._hear()
        return child.pid in children()

    await until(heard)
    assert child.pid is not None
    return child.pid


def children() -> set[int]:
    """Of this process, those that ended and were not reaped included."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


class Stream:
    """What a request heard, by choice; `ended` once every choice has."""

    def __init__(
        self, client: EngineProcess, name: str = "r", choices: int = 1, prompt=(0, 2), **sampling
    ) -> None:
        self.outputs: list[SequenceOutput] = []
        self.choices = choices
        self.ended = asyncio.Event()
        client.submit(
            Request(
                request_id=name,
                prompt_ids=prompt,
                num_choices=choices,
                sampling=SamplingParams(**{"max_tokens": 6, **sampling}),
            ),
            self.hear,
        )

    def hear(self, output: SequenceOutput) -> None:
        self.outputs.append(output)
        if sum(one.finish is not None for one in self.outputs) == self.choices:
            self.ended.set()

    async def tokens(self, index: int = 0) -> list[int]:
        await asyncio.wait_for(self.ended.wait(), 10)
        return [token for one in self.outputs if one.index == index for token in one.tokens]


async def test_a_stream_goes_on_where_dead_engines_left_it(make):
    async with started(make("die:2,die:1,serve")) as client:
        stream = Stream(client, choices=2)
        assert await stream.tokens(0) == [0, 1, 2, 3, 4, 5]
        assert await stream.tokens(1) == [10, 11, 12, 13, 14, 15]
        assert client.num_restarts == 2


async def test_prompt_scores_are_not_repeated_by_a_replay(make):
    async with started(make("die:2,serve")) as client:
        stream = Stream(client, prompt_logprobs=1)
        await stream.tokens()
        # The fake sends one score with each of its outputs: 2 before its death, 4 after; the first 2 of
        # those 4 stand for the ones that were delivered.
        assert sum(len(one.prompt_logprobs or ()) for one in stream.outputs) == 4


async def test_an_aborted_choice_stays_aborted_after_a_restart(make):
    async with started(make("die:1,serve")) as client:
        stream = Stream(client, choices=2)
        client.abort("r", 1)
        await asyncio.sleep(1.0)
        assert [one.tokens for one in stream.outputs if one.index == 1] in ([], [(10,)])
        assert [one.tokens[0] for one in stream.outputs if one.index == 0] == [0, 1, 2, 3, 4, 5]


async def test_how_a_choice_ended_survives_a_restart(make):
    client = make("serve")
    stream = Stream(client, choices=3)
    client.abort("r", 1, natural=True)
    client.abort("r", 2)
    entry = client._journal.entries["r"]
    assert entry.give()[1:] == [Abort("r", 1, natural=True), Abort("r", 2)]
    assert not stream.outputs


async def test_a_request_that_kills_every_engine_is_given_up_and_the_engine_lives(make):
    async with started(make("die:0,die:0,serve")) as client:
        poison = Stream(client)
        await asyncio.wait_for(poison.ended.wait(), 10)
        assert poison.outputs[-1].finish is FinishReason.ERROR
        assert await Stream(client, "next").tokens() == [0, 1, 2, 3, 4, 5]


async def test_a_request_that_only_waited_is_not_blamed(make):
    async with started(make("die:0:1,die:0:1,serve")) as client:
        poison, bystander = Stream(client), Stream(client, "waits")
        assert await asyncio.wait_for(bystander.tokens(), 20) == [0, 1, 2, 3, 4, 5]
        assert poison.outputs[-1].finish is FinishReason.ERROR


async def test_a_request_that_kills_engines_before_they_can_say_so_is_given_up(make):
    async with started(make("crash,crash,serve")) as client:
        poison = Stream(client)
        await asyncio.wait_for(poison.ended.wait(), 10)
        assert poison.outputs[-1].finish is FinishReason.ERROR
        assert await Stream(client, "next").tokens() == [0, 1, 2, 3, 4, 5]


async def test_a_process_that_was_never_ready_is_nobodys_fault(make):
    async with started(make("die:2,exit,serve")) as client:
        stream = Stream(client)
        assert await stream.tokens() == [0, 1, 2, 3, 4, 5]
        assert stream.outputs[-1].finish is FinishReason.LENGTH
        assert client.num_restarts == 2


async def test_deaths_during_a_restart_count_like_any_other(make):
    async with started(make("die:1,exit,exit,serve")) as client:
        # Two deaths without a token of it: it must have made progress to survive them.
        bystander = Stream(client)
        await asyncio.wait_for(bystander.ended.wait(), 10)
        assert await Stream(client, "next").tokens() == [0, 1, 2, 3, 4, 5]
        assert client.num_restarts == 3


async def test_too_many_deaths_end_every_stream_with_the_cause(make):
    async with started(make("die:1,exit", max_restarts=1)) as client:
        stream = Stream(client)
        await asyncio.wait_for(stream.ended.wait(), 10)
        assert "died 2 times" in (stream.outputs[-1].error or "")
        assert "died 2 times" in await client.died()


@pytest.mark.parametrize(
    ("plan", "cause"),
    [
        ("fail", "no such model"),
        ("exit", "status 7"),
        (f"signal:{signal.SIGBUS}", "a file that it read shrank, or its disk failed"),
        (f"signal:{signal.SIGKILL}", "the system's memory ran out"),
    ],
)
async def test_an_engine_that_cannot_start_is_one_line(make, plan, cause):
    client = make(plan)
    with pytest.raises(EngineDead, match=cause):
        await client.start()
    await client.close()


async def test_what_an_engine_said_before_anybody_listened_is_heard(make):
    """The server's own start may take longer than the engine's end."""
    client = make("fail")
    client.spawn()
    await asyncio.to_thread(os.waitid, os.P_PID, await pid_of(client), os.WEXITED | os.WNOWAIT)
    with pytest.raises(EngineDead, match="no such model"):
        await client.start()
    await client.close()


async def test_what_comes_in_one_turn_of_the_loop_with_the_engines_end_is_heard(tmp_path):
    """Whoever looks whether something is left to read must not take the reader's wake-up away."""
    (tmp_path / "count").touch()
    client = EngineProcess(EngineConfig(model=f"{tmp_path / 'count'}|fail"), command=COMMAND)
    client.spawn()
    child = client._child
    assert child is not None
    reading = asyncio.create_task(child.receive())
    pid = await pid_of(client)
    # The loop stands still while ZeroMQ's own thread reads all of it.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
    time.sleep(0.1)  # noqa: ASYNC251
    try:
        async with asyncio.timeout(5):
            await child.all_received()
        assert reading.result() == Failed("no such model")
    finally:
        client.kill()


async def test_an_engine_that_is_never_ready_is_killed(make):
    client = make("hang", start_timeout_s=0.6)
    with pytest.raises(EngineDead, match="engine_start_timeout_s"):
        await client.start()
    await client.close()


async def test_an_engine_that_says_nothing_while_it_has_work_is_replaced(make):
    async with started(make("silent,serve", stall_timeout_s=0.5)) as client:
        assert await Stream(client).tokens() == [0, 1, 2, 3, 4, 5]
        assert client.num_restarts == 1


async def test_an_engine_that_talks_nonsense_is_replaced(make):
    async with started(make("garbage,serve")) as client:
        assert await Stream(client).tokens() == [0, 1, 2, 3, 4, 5]


async def test_an_engine_that_is_killed_for_nonsense_did_not_run_out_of_memory(make):
    async with started(make("garbage", max_restarts=0)) as client:
        assert "sent what is no message" in await client.died()


async def test_what_fails_in_a_listener_stays_there(make):
    async with started(make("serve")) as client:

        def broken(_: object) -> None:
            raise ValueError

        client.on_step = broken
        request = Request(request_id="bad", prompt_ids=(1,), sampling=SamplingParams(max_tokens=3))
        client.submit(request, broken)
        assert await Stream(client, "good").tokens() == [0, 1, 2, 3, 4, 5]


async def test_inspections_are_answered_each_with_its_own(make):
    async with started(make("serve")) as client:
        answers = await asyncio.gather(*(client.inspect(count) for count in (1, 2, 3)))
        assert [answer.stats.num_running for answer in answers] == [1, 2, 3]
        assert not client._inspections


async def test_an_inspection_of_an_engine_that_dies_fails_and_the_next_one_works(make):
    async with started(make("die:9,serve")) as client:
        with pytest.raises(EngineDead, match="before it answered"):
            await asyncio.wait_for(client.inspect(1), 10)
        with pytest.raises(EngineDead, match="not ready"):
            await client.inspect(1)
        assert await Stream(client).tokens() == [0, 1, 2, 3, 4, 5]
        assert (await client.inspect(5)).stats.num_running == 5
        assert not client._inspections


GIVEN_UP = "the engine dies whenever it computes this request"


async def other_engine(client: EngineProcess, pid: int) -> int:
    """Wait for the one after `pid` to be ready."""
    await until(lambda: client.ready is not None and client.pid not in (None, pid))
    assert client.pid is not None
    return client.pid


@pytest.mark.parametrize("kind", [POISON, CRASH])
@pytest.mark.parametrize("place", [0, 6, 15])
async def test_one_of_sixteen_kills_engines_and_it_alone_is_given_up(make, kind, place):
    async with started(make("serve")) as client:
        prompts = [(kind if number == place else HARMLESS, number) for number in range(16)]
        streams = [Stream(client, str(prompt[1]), prompt=prompt, max_tokens=40) for prompt in prompts]
        for number, stream in enumerate(streams):
            if number == place:
                assert await stream.tokens() == []
                assert stream.outputs[-1].error == GIVEN_UP
            else:
                assert await stream.tokens() == list(range(40))
        # All, 8, 4, 2, and at last the one; fewer where others of its group were cleared before, more where
        # those of its engine were.
        assert 2 <= client.num_restarts <= 9


async def test_two_that_kill_engines_are_both_found(make):
    async with started(make("serve")) as client:
        prompts = [(POISON if number in (3, 12) else HARMLESS, number) for number in range(16)]
        streams = [Stream(client, str(prompt[1]), prompt=prompt) for prompt in prompts]
        answers = [await stream.tokens() for stream in streams]
        assert [number for number, answer in enumerate(answers) if not answer] == [3, 12]


async def test_requests_that_kill_engines_do_not_end_the_server_however_many(make):
    async with started(make("serve", max_restarts=1)) as client:
        for number in range(5):
            poison = Stream(client, f"poison-{number}", prompt=(POISON,))
            assert await poison.tokens() == []
            assert poison.outputs[-1].error == GIVEN_UP
        assert await Stream(client).tokens() == [0, 1, 2, 3, 4, 5]


async def test_kills_from_outside_are_nobodys_fault_and_do_not_count_while_streams_get_on(make):
    async with started(make("serve", max_restarts=1)) as client:
        prompts = [(SLOW, 0, number) for number in range(4)]
        streams = [Stream(client, str(prompt[2]), prompt=prompt) for prompt in prompts]
        pid = client.pid
        for _ in range(4):
            os.kill(pid, signal.SIGKILL)
            pid = await other_engine(client, pid)
            others = Stream(client, f"after-{pid}")
            assert await others.tokens() == [0, 1, 2, 3, 4, 5]
        for stream in streams:
            async with asyncio.timeout(60):
                await stream.ended.wait()
            assert stream.outputs[-1].finish is FinishReason.LENGTH


async def test_an_idle_engine_that_somebody_kills_is_replaced_more_often_than_one_that_dies(make):
    async with started(make("serve", max_restarts=1)) as client:
        pid = client.pid
        for _ in range(5):
            os.kill(pid, signal.SIGKILL)
            pid = await other_engine(client, pid)
        assert await Stream(client).tokens() == [0, 1, 2, 3, 4, 5]


async def test_no_restart_is_none(make):
    async with started(make("serve", max_restarts=0)) as client:
        os.kill(client.pid, signal.SIGKILL)
        assert "SIGKILL" in await asyncio.wait_for(client.died(), 10)


async def test_a_kill_from_outside_while_one_is_on_probation_blames_nobody(make):
    async with started(make("die:0,serve")) as client:
        pid = client.pid
        stream = Stream(client, prompt=(SLOW,))
        pid = await other_engine(client, pid)
        assert client._journal._blame._groups == [["r"]]
        os.kill(pid, signal.SIGKILL)
        assert await stream.tokens() == [0, 1, 2, 3, 4, 5]


async def test_a_kill_for_want_of_memory_is_the_engines_own_death(make, monkeypatch, caplog):
    kills = iter(range(100))
    monkeypatch.setattr("engine.client.oom_kills", lambda: next(kills))
    async with started(make(f"serve,signal:{signal.SIGKILL}", max_restarts=1)) as client:
        os.kill(client.pid, signal.SIGKILL)
        await asyncio.wait_for(client.died(), 10)
    assert "signal=SIGKILL cause=engine" in caplog.text


async def test_an_idle_engine_that_dies_again_and_again_ends_the_server(make):
    async with started(make("idle-death", max_restarts=2)) as client:
        assert "died 3 times in a row" in await asyncio.wait_for(client.died(), 20)


async def test_an_engine_outlives_its_zygote_and_the_next_has_another(make, caplog):
    async with started(make("serve")) as client:
        first, zygote = client.pid, client.zygote_pid
        stream = Stream(client, prompt=(SLOW,))
        os.kill(zygote, signal.SIGKILL)
        assert await stream.tokens() == [0, 1, 2, 3, 4, 5]
        assert client.pid == first
        await until(lambda: client.zygote_pid not in (None, zygote))
        os.kill(first, signal.SIGKILL)
        await other_engine(client, first)
        assert await Stream(client, "next").tokens() == [0, 1, 2, 3, 4, 5]
        assert client.num_restarts == 1


@pytest.mark.parametrize("first", ["zygote", "engine"])
async def test_both_killed_at_once_is_a_cold_start_and_the_same_text(make, first):
    async with started(make("serve")) as client:
        stream = Stream(client, prompt=(SLOW,))
        zygote = client.zygote_pid
        if first == "engine":
            os.kill(client.zygote_pid, signal.SIGSTOP)  # so that it is killed after it was asked for another
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: client.ready is None and client._child is not None)
        os.kill(zygote, signal.SIGKILL)
        if first == "zygote":
            os.kill(client.pid, signal.SIGKILL)
        assert await stream.tokens() == [0, 1, 2, 3, 4, 5]
        assert client.num_restarts == 1


async def test_how_an_engine_ended_is_known_without_a_zygote(make, monkeypatch, caplog):
    monkeypatch.setattr("engine.client.FIRST_PAUSE_S", 30.0)
    client = make("serve")
    client._zygote_pause_s = 30.0
    async with started(client):
        os.kill(client.zygote_pid, signal.SIGKILL)
        stream = Stream(client, prompt=(CRASH,))
        await asyncio.wait_for(stream.ended.wait(), 10)
        assert stream.outputs[-1].error == GIVEN_UP
    assert "signal=SIGSEGV cause=engine suspects=1" in caplog.text


@pytest.mark.parametrize("how", [f"signal:{signal.SIGKILL}", "stillborn"])
async def test_an_engine_killed_before_it_is_ready_is_no_reason_for_a_cold_start(make, how):
    plan = ",".join(["serve", *[how] * 20, "serve"])  # more than ten, of which each once counted for a tenth
    strays = children()  # of other tests
    async with started(make(plan, max_restarts=1)) as client:
        zygote = client.zygote_pid
        stream = Stream(client, prompt=(SLOW,))
        os.kill(client.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            await stream.ended.wait()
        assert await stream.tokens() == [0, 1, 2, 3, 4, 5]
        assert client.num_restarts == 21
        assert client.zygote_pid == zygote
        assert children() - strays == {client.zygote_pid, client.pid}


async def test_an_engine_that_ends_by_itself_before_it_is_ready_is_followed_by_another_zygotes(make):
    async with started(make("die:1,exit,serve")) as client:
        zygote = client.zygote_pid
        assert await Stream(client).tokens() == [0, 1, 2, 3, 4, 5]
        assert client.zygote_pid != zygote


async def test_a_zygote_that_ends_before_there_is_an_engine_is_the_cause(make):
    client = make("zygote-exits")
    with pytest.raises(EngineDead, match="status 11"):
        await client.start()
    await client.close()


async def test_loading_that_goes_on_may_take_longer_than_the_start_timeout(make):
    async with started(make("load", start_timeout_s=0.6)) as client:
        assert await Stream(client).tokens() == [0, 1, 2, 3, 4, 5]


async def test_a_step_that_is_predicted_to_be_long_is_no_stall(make):
    async with started(make("serve", stall_timeout_s=0.5)) as client:
        stream = Stream(client, prompt=(SLOW, 2000))  # milliseconds, of which it may take ten times as many
        await asyncio.wait_for(stream.ended.wait(), 10)
        assert client.num_restarts == 0
        assert client.step_limit_s == 0


async def test_a_step_that_is_slower_than_predicted_is_not_given_up(make):
    async with started(make("serve", stall_timeout_s=0.3)) as client:
        assert await Stream(client, prompt=(SLOW,)).tokens() == [0, 1, 2, 3, 4, 5]
        assert client.num_restarts >= 2


async def test_a_request_that_stalls_engines_is_given_up_and_the_others_go_on(make):
    async with started(make("serve", stall_timeout_s=0.3)) as client:
        prompts = [(HANG if number == 2 else HARMLESS, number) for number in range(4)]
        streams = [Stream(client, str(prompt[1]), prompt=prompt) for prompt in prompts]
        for stream in streams[:2] + streams[3:]:
            assert await stream.tokens() == [0, 1, 2, 3, 4, 5]
        await asyncio.wait_for(streams[2].ended.wait(), 10)
        assert streams[2].outputs[-1].error == GIVEN_UP


async def test_a_path_that_cannot_be_bound_is_one_line(make, tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    client = make("serve")
    with pytest.raises(EngineDead, match="cannot be reached"):
        await client.start()
    await client.close()


async def test_a_start_that_fails_halfway_leaves_nothing_behind(make, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def no_more_files(*_: object) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    with monkeypatch.context() as patch:
        patch.setattr("zmq.asyncio.Socket.get_monitor_socket", no_more_files)
        client = make("serve")
        with pytest.raises(EngineDead, match="Too many open files"):
            client.spawn()
    assert os.listdir(tmp_path) == ["count"]
    client.kill()


async def test_a_close_does_not_wait_for_an_engine_that_is_not_ready(make):
    client = make("hang")
    client.spawn()
    await pid_of(client)
    await asyncio.wait_for(client.close(), 3)  # it would be asked to end, and given five seconds


async def test_a_close_that_is_cancelled_still_ends_the_engine(make):
    client = make("serve")
    await client.start()
    pid = client.pid
    os.kill(pid, signal.SIGSTOP)  # it will not end by itself
    closing = asyncio.create_task(client.close())
    await asyncio.sleep(0.1)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_close_ends_what_waits_for_a_dead_engines_last_words(make):
    client = make("exit")
    client.spawn()
    await asyncio.to_thread(os.waitid, os.P_PID, await pid_of(client), os.WEXITED | os.WNOWAIT)
    starting = asyncio.create_task(client.start())
    await asyncio.sleep(0.1)
    await client.close()
    with pytest.raises(EngineDead):
        await starting
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_close_ends_inspections(make, monkeypatch):
    monkeypatch.setattr("engine.child.STOP_TIMEOUT_S", 0.1)
    async with started(make("serve")) as client:
        os.kill(client.pid, signal.SIGSTOP)  # it will not answer
        asking = asyncio.create_task(client.inspect(1))
        await asyncio.sleep(0)
    with pytest.raises(EngineDead, match="before it answered"):
        await asyncio.wait_for(asking, 5)
    with pytest.raises(EngineDead, match="not ready"):
        await asyncio.wait_for(client.inspect(1), 5)


async def test_nothing_is_left_behind(make, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with started(make("die:1,serve")) as client:
        await Stream(client).tokens()
        pid = client.pid
    assert os.listdir(tmp_path) == ["count"]
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_module_of_the_users_folder_is_not_ours(tmp_path):
    """The engine's command runs in whatever folder the user is in."""
    import subprocess

    for name in ("zmq", "torch", "engine", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    done = subprocess.run(
        [*engine_command(), "not json", "info"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "shadowed" not in done.stderr
    assert "DecodeError" in done.stderr
