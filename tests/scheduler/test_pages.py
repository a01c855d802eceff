from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduler.pages import PagePool

NUM_PAGES = 6


class PoolMachine(RuleBasedStateMachine):
    """The pool against a model: who holds what, and which content each page has."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.chains: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(count=st.integers(1, NUM_PAGES))
    def take(self, count: int) -> None:
        if count > self.pool.available:
            return
        held = {page for chain in self.chains for page in chain}
        pages = self.pool.take(count)
        assert len(set(pages)) == count
        assert not held & set(pages)
        for page in pages:
            self.content.pop(page, None)
        self.chains.append(pages)

    @precondition(lambda self: self.chains)
    @rule(data=st.data(), key=st.integers(0, 8))
    def register(self, data: st.DataObject, key: int) -> None:
        page = data.draw(st.sampled_from(data.draw(st.sampled_from(self.chains))))
        if page not in self.content:
            name = key.to_bytes(1, "big")
            self.pool.register(page, name)
            if name not in self.content.values():
                self.content[page] = name

    @rule(keys=st.lists(st.integers(0, 8), min_size=1, max_size=3, unique=True))
    def hold(self, keys: list[int]) -> None:
        found = [self.pool.find(key.to_bytes(1, "big")) for key in keys]
        pages = [page for page in found if page is not None]
        for page in pages:
            self.pool.hold(page)
        if pages:
            self.chains.append(pages)

    @precondition(lambda self: self.chains)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chain = data.draw(st.sampled_from(self.chains))
        self.chains = [other for other in self.chains if other is not chain]
        self.pool.release(chain)

    @invariant()
    def agrees(self) -> None:
        held = {page for chain in self.chains for page in chain}
        for page in range(NUM_PAGES):
            assert self.pool.references[page] == sum(chain.count(page) for chain in self.chains)
        assert self.pool.key_of == self.content
        assert self.pool.num_held == len(held)
        assert set(self.pool.cached) == self.content.keys() - held
        assert self.pool.available == NUM_PAGES - len(held)


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def _cached_chain(pool: PagePool, *keys: bytes) -> list[int]:
    pages = pool.take(len(keys))
    for page, key in zip(pages, keys, strict=True):
        pool.register(page, key)
    pool.release(pages)
    return pages


def test_deeper_pages_are_evicted_before_their_parents() -> None:
    pool = PagePool(3)
    _cached_chain(pool, b"root", b"middle", b"leaf")
    pool.take(1)
    assert [pool.find(key) is not None for key in (b"root", b"middle", b"leaf")] == [True, True, False]


def test_the_least_recently_used_content_is_evicted_first() -> None:
    pool = PagePool(2)
    first, _ = _cached_chain(pool, b"a")[0], _cached_chain(pool, b"b")
    pool.hold(first)
    pool.release([first])
    pool.take(1)
    assert pool.find(b"a") == first
    assert pool.find(b"b") is None


def test_unknown_content_is_overwritten_before_known_content() -> None:
    pool = PagePool(3)
    _cached_chain(pool, b"a")
    pool.take(2)
    assert pool.find(b"a") is not None


def test_content_computed_twice_keeps_its_first_page() -> None:
    pool = PagePool(2)
    first, second = pool.take(2)
    pool.register(first, b"a")
    pool.register(second, b"a")
    pool.release([first, second])
    assert pool.find(b"a") == first
    assert pool.free == [second]
