"""Finds stop strings in text that arrives in pieces, and holds back only what may still become one."""

from __future__ import annotations

from collections import deque


class StopMatcher:
    """The stop string that is complete first wins: of those that end at the same character, the longest.

    That is where a reader who looks at one character at a time would have stopped, so the result does
    not depend on how the text is cut into pieces. Time is linear in the text (Aho and Corasick 1975).

    Hidden text (of special tokens, where they are not shown) is searched like any other and left out of
    what is emitted. Where stopping is not allowed yet, no stop string may end, but one may begin.
    """

    def __init__(self, stops: tuple[str, ...], include_stop: bool) -> None:
        """`include_stop`: the matched stop string, hidden or not, is part of the emitted text. Empty strings
        are refused."""
        if "" in stops:
            raise ValueError("a stop string is empty")
        self.num_passed = 0  # characters emitted or left out, in order
        self._include_stop = include_stop
        self._automaton = _Automaton(stops) if stops else None
        self._state = 0
        self._held: deque[tuple[str, bool]] = deque()  # text that may begin a stop, and whether it is hidden
        self._num_held = 0
        self._matched: str | None = None

    def push(self, text: str, *, hidden: bool = False, may_stop: bool = True) -> tuple[str, str | None]:
        """Take more text -> (what may be shown now, the stop string that ended it or None).

        After a match nothing more is emitted, and the match is reported again.
        """
        if self._matched is not None:
            return "", self._matched
        if self._automaton is None:
            self.num_passed += len(text)
            return "" if hidden else text, None
        if text:
            self._held.append((text, hidden))
            self._num_held += len(text)
        self._state, num_read, self._matched = self._automaton.feed(self._state, text, may_stop=may_stop)
        if self._matched is None:
            return self._let_go(self._num_held - self._automaton.depth[self._state]), None
        behind = len(text) - num_read
        shown = self._let_go(self._num_held - behind - len(self._matched))
        self._held.clear()
        self._num_held = 0
        if self._include_stop:
            self.num_passed += len(self._matched)
            shown += self._matched
        return shown, self._matched

    def flush(self) -> str:
        """The text ends here: what was held back is ordinary text."""
        self._state = 0
        return self._let_go(self._num_held)

    def _let_go(self, count: int) -> str:
        """Emit the first characters of what is held, but for the hidden ones."""
        self.num_passed += count
        self._num_held -= count
        shown = []
        while count:
            text, hidden = self._held.popleft()
            if len(text) > count:
                self._held.appendleft((text[count:], hidden))
                text = text[:count]
            count -= len(text)
            if not hidden:
                shown.append(text)
        return "".join(shown)


class _Automaton:
    """A trie of the stop strings; a node's `fallback` is the longest proper suffix that is in the trie.

    `depth` is the length of a node's text, which is how much of the input may still become a stop.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.fallback = [0]
        self.complete: list[str | None] = [None]  # the longest stop string that ends at this node
        for stop in stops:
            self._insert(stop)
        self._link()

    def feed(self, state: int, text: str, *, may_stop: bool) -> tuple[int, int, str | None]:
        """Read text -> (state, characters read up to the first match, the stop that matched or None)."""
        children, fallback, complete = self.children, self.fallback, self.complete
        for at, char in enumerate(text):
            while state and char not in children[state]:
                state = fallback[state]
            state = children[state].get(char, 0)
            if complete[state] is None:
                continue
            if may_stop:
                return state, at + 1, complete[state]
            while state and not children[state]:  # passed over, and no beginning of another
                state = fallback[state]
        return state, len(text), None

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            node = self.children[node].setdefault(char, len(self.children))
            if node == len(self.children):
                self.children.append({})
                self.depth.append(0)
                self.fallback.append(0)
                self.complete.append(None)
        self.complete[node] = stop

    def _link(self) -> None:
        """Breadth first, so that a node's fallback, which is shorter, is finished before it."""
        queue = deque([0])
        while queue:
            node = queue.popleft()
            for char, child in self.children[node].items():
                self.depth[child] = self.depth[node] + 1
                queue.append(child)
                if node:
                    self.fallback[child] = self._step(self.fallback[node], char)
                if self.complete[child] is None:
                    self.complete[child] = self.complete[self.fallback[child]]

    def _step(self, state: int, char: str) -> int:
        while state and char not in self.children[state]:
            state = self.fallback[state]
        return self.children[state].get(char, 0)
