"""A priority queue from which anything can be taken out again."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")

Order = tuple[float, int]  # a time, and a number that breaks ties and is unique per item


class Agenda(Generic[T]):
    """Items by ascending order. Every operation is O(log n), amortised.

    Removal is lazy: the heap may hold orders whose item is gone; they are skipped when they surface,
    and swept out when they outnumber the living. Two equal orders in the heap stand for one item.
    """

    def __init__(self) -> None:
        self._heap: list[Order] = []
        self._items: dict[int, tuple[Order, T]] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, number: int) -> bool:
        return number in self._items

    def push(self, order: Order, item: T) -> None:
        assert order[1] not in self._items, "already queued"
        self._items[order[1]] = (order, item)
        heapq.heappush(self._heap, order)

    def discard(self, number: int) -> bool:
        """Take one item out, wherever it stands. Returns whether it was there."""
        found = self._items.pop(number, None) is not None
        if len(self._heap) > 2 * len(self._items) + 16:
            self._heap = [order for order, _ in self._items.values()]
            heapq.heapify(self._heap)
        return found

    def first(self) -> tuple[Order, T] | None:
        while self._heap:
            order = self._heap[0]
            entry = self._items.get(order[1])
            if entry is not None and entry[0] == order:
                return entry
            heapq.heappop(self._heap)
        return None

    def entries(self) -> list[tuple[Order, T]]:
        """All of it in no order: O(n), for checks and counting, not for the step."""
        return list(self._items.values())
