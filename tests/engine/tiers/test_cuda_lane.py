"""The order of what a GPU is asked for, shown without one.

The tensors lie on the CPU, streams and events are stand-ins that write down their calls, and a dispatch
mode writes down the copies between them, so that the one list shows what is queued before what. What only
a device can show - that transfers really run beside the computing - is not shown here.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.tiers import Copier, HostPool
from engine.tiers.lanes import CudaLane
from scheduler.plan import Copied
from tests.engine.tiers.small import all_ended, back, content, fill, out, small_storage

COPIES = {"copy_", "index_select", "index_copy_"}


@dataclass
class FakeCuda:
    """Streams are names. `fails` holds the names of operations that raise."""

    log: list[tuple[str, ...]] = field(default_factory=list)
    fails: set[str] = field(default_factory=set)
    passed: threading.Event = field(default_factory=threading.Event)  # whether the device gets anywhere
    num_events: int = 0
    stream_now: str = "compute"

    def Stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, "copies")

    def current_stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, "compute")

    def Event(self, blocking: bool = False) -> FakeEvent:
        self.num_events += 1
        return FakeEvent(self, f"event{self.num_events}", blocking)

    @contextmanager
    def stream(self, stream: FakeStream):
        self.stream_now = stream.name
        with _Noting(self):
            yield
        self.stream_now = "compute"


@dataclass
class FakeStream:
    cuda: FakeCuda
    name: str

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.log.append(("wait", event.name, self.name))


@dataclass
class FakeEvent:
    cuda: FakeCuda
    name: str
    blocking: bool

    def record(self, stream: FakeStream) -> None:
        self.cuda.log.append(("record", self.name, stream.name))

    def synchronize(self) -> None:
        assert self.blocking, "the copy thread would spin on a core"
        assert self.cuda.passed.wait(10)
        self.cuda.log.append(("passed", self.name))


class _Noting(TorchDispatchMode):
    """Writes down each operation that moves pages. Modes hold for one thread."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in COPIES:
            if name in self.cuda.fails:
                raise RuntimeError(f"{name} fails")
            self.cuda.log.append((name, self.cuda.stream_now))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cuda():
    found = FakeCuda()
    found.passed.set()
    return found


@pytest.fixture
def storage():
    found = small_storage()
    fill(found)
    return found


@pytest.fixture
def host(storage):
    return HostPool(storage, 16)


def test_out_waits_for_the_computing_and_its_end_is_recorded_after_it(cuda, storage, host):
    """Recorded before the copies, the event would pass while they are still on their way."""
    lane = CudaLane(storage, cuda)
    fence = lane.fence()
    lane.to_host(fence, [(3, 1), (5, 0)], host.cells)
    assert cuda.log == [
        ("record", "event1", "compute"),
        ("wait", "event1", "copies"),
        ("index_select", "copies"),
        ("copy_", "copies"),
        ("copy_", "copies"),
        ("record", "event2", "copies"),
        ("passed", "event2"),
    ]
    assert torch.equal(host.cells[1], content(storage, 3))
    assert torch.equal(host.cells[0], content(storage, 5))


def test_in_waits_for_those_who_still_read_the_target(cuda, storage, host):
    host.cells[2] = content(storage, 50)
    host.cells[4] = content(storage, 51)
    lane = CudaLane(storage, cuda)
    lane.to_device(lane.fence(), [(7, 2), (6, 4)], host.cells)
    assert [entry[0] for entry in cuda.log] == [
        *("record", "wait", "copy_", "copy_", "index_copy_", "record", "passed")
    ]
    assert torch.equal(storage.pages[7], content(storage, 50))
    assert torch.equal(storage.keys[0][6], content(storage, 51)[0, 0])
    assert torch.equal(storage.pages[5], content(storage, 5))


def test_a_copy_is_not_reported_before_its_event_has_passed(cuda, storage, host):
    cuda.passed.clear()
    copier = Copier(storage, host, lane=CudaLane(storage, cuda))
    copier.start([out(1, 0, 0), out(2, 1, 1), back(3, 0, 9)])
    copier.wait(0.05)
    assert copier.finished() == ()
    assert torch.equal(storage.pages[9], content(storage, 9)), "a later group passed an earlier one"
    cuda.passed.set()
    assert all_ended(copier) == [Copied(1), Copied(2), Copied(3)]
    assert torch.equal(storage.pages[9], content(storage, 0))
    copier.close()


def test_the_fence_is_set_when_copies_are_started_not_when_they_run(cuda, storage, host):
    """The copy thread may be late: what is computed by then is no business of the copy."""
    gate = threading.Event()
    copier = Copier(storage, host, lane=CudaLane(storage, cuda), before=lambda copy: gate.wait(10))
    copier.start([out(1, 0, 0)])
    copier.start([out(2, 1, 1)])
    assert cuda.log == [("record", "event1", "compute"), ("record", "event2", "compute")]
    gate.set()
    all_ended(copier)
    waits = [entry for entry in cuda.log if entry[0] == "wait"]
    assert waits == [("wait", "event1", "copies"), ("wait", "event2", "copies")]
    copier.close()


def test_a_transfer_that_fails_is_over_before_it_is_reported(cuda, storage, host):
    """The first transfers of the group may be under way: their pages must not be given to others yet."""
    cuda.fails.add("index_copy_")
    copier = Copier(storage, host, lane=CudaLane(storage, cuda))
    copier.start([back(1, 0, 0), out(2, 1, 1)])
    assert all_ended(copier) == [Copied(1, False), Copied(2)]
    names = [entry[0] for entry in cuda.log]
    assert names == [
        *("record", "wait", "copy_", "record", "passed"),
        *("wait", "index_select", "copy_", "record", "passed"),
    ]
    copier.close()


def test_pinned_memory_is_locked_where_it_lies(monkeypatch, storage, caplog):
    from engine.tiers import host as module

    calls = []

    class Runtime:
        status = 0

        def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
            calls.append((address, num_bytes))
            return self.status

    monkeypatch.setattr(module.torch.cuda, "cudart", Runtime)
    cells = HostPool(storage, 3).cells
    module._pin(cells)
    assert calls == [(cells.data_ptr(), 3 * storage.page_bytes)]
    assert not caplog.text
    Runtime.status = 2
    module._pin(cells)
    assert "could not be pinned" in caplog.text
