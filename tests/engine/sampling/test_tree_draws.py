"""Whatever tree is drafted and whatever is asked: the path that stands is what plain decoding says."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decoding import Draws, Speculative
from engine.runner import _paths, _where_drafts_stand
from engine.sampling.places import Place
from engine.sampling.processors import LogitsProcessor
from engine.sampling.sampler import sample
from scheduler.types import Request, SamplingParams, Sequence, Visibility, Window
from tests.engine.sampling.test_candidates import samplings
from tests.engine.sampling.test_sampler import VOCABULARY

PROMPT = (1, 2, 3)
LIKELY = 10  # the first tokens: so texts repeat themselves, and penalties and bad words have something to do
MOST = 6
# What says something else after a draft than before it, on top of whatever else is asked
FOLLOWING = {
    "anything": {},
    "bad words": {"bad_words": tuple((one, one ^ 2 * other) for one in range(LIKELY) for other in range(5))},
    "no end yet": {"min_tokens": 3, "stop_token_ids": tuple(range(0, LIKELY, 2))},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5},
}


class Sums:
    """Forbids every third token, by the sum of all that was said; after some nothing may follow."""

    def __init__(self, sequence: Sequence, dead_end: int | None) -> None:
        self.sequence = sequence
        self.dead_end = dead_end

    def allowed(self, drafted: tuple[int, ...]) -> torch.Tensor | None:
        said = sum(self.sequence.tokens) + sum(drafted)
        if said % 7 == self.dead_end:
            return torch.zeros(VOCABULARY, dtype=torch.bool)
        return (torch.arange(VOCABULARY) + said) % 3 != 0


class Asked(NamedTuple):
    sampling: dict[str, object]
    is_masked: bool
    dead_end: int | None
    index: int
    said: list[int]  # before the step
    nodes: list[tuple[int, bool, int]]  # what it follows, whether it is right, else its token

    def sequence(self) -> Sequence:
        request = Request(request_id="r", prompt_ids=PROMPT, sampling=SamplingParams(**self.sampling))
        return Sequence(0, request, self.index, [*PROMPT, *self.said])

    def processor(self, sequence: Sequence) -> LogitsProcessor:
        mask = Sums(sequence, self.dead_end) if self.is_masked else None
        return LogitsProcessor(sequence, VOCABULARY, torch.device("cpu"), mask)


requests = st.builds(
    Asked,
    samplings,
    st.booleans(),
    st.sampled_from([None, 0, 3]),
    st.integers(0, 2),
    st.lists(st.integers(0, LIKELY - 1), max_size=4),
    st.lists(st.tuples(st.integers(0, 63), st.booleans(), st.integers(0, LIKELY - 1)), max_size=14),
)


def logits_after(tokens: list[int]) -> torch.Tensor:
    """float32 [V]: what a model says, a function of all tokens before."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(tokens).encode()))
    logits = torch.randn(VOCABULARY, generator=generator) * 2
    logits[:LIKELY] += 4
    return logits


def plain(asked: Asked) -> list[int | None]:
    """Of plain decoding, one token at a time; None where it fails, and it goes no further."""
    sequence = asked.sequence()
    processor = asked.processor(sequence)
    tokens: list[int | None] = []
    while len(tokens) < MOST:
        drawn = sample(logits_after(sequence.tokens)[None], [Place(sequence, (), processor)])
        if drawn.errors:
            return [*tokens, None]
        tokens += drawn.tokens
        sequence.tokens += drawn.tokens
    return tokens


def tree(asked: Asked, right: list[int | None]) -> Window:
    """The nodes as a window: those that are right follow `right`, as far as their parent does."""
    tokens: list[int] = []
    parents: list[int] = []
    words: list[int] = []
    depths: list[int] = []
    known = {-1: 0}  # nodes on the right path, and how many tokens of it come before what follows them
    for number, is_right, other in asked.nodes:
        parent = number % (len(tokens) + 1) - 1
        following = right[known[parent]] if parent in known and known[parent] < len(right) else None
        token = following if is_right and following is not None else other
        if (parent, token) in zip(parents, tokens, strict=True):
            continue
        if token == following:
            known[len(tokens)] = known[parent] + 1
        words.append((words[parent] if parent >= 0 else 0) | 1 << len(tokens))
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
        tokens.append(token)
        parents.append(parent)
    return Window(tuple(tokens), tuple(depths), Visibility.ANCESTORS, tuple(words), optional=True)


def path_by_hand(window: Window, right: list[int | None]) -> list[int]:
    """Follow what plain decoding says through the tree; nothing is committed at a place where it fails."""
    committed: list[int] = []
    at, edges = -1, list(zip(window.parents, window.tokens, strict=True))
    for token, after in zip(right, [*right[1:], 0], strict=True):
        assert token is not None, "a root where plain decoding fails has no decision"
        committed.append(token)
        if (at, token) not in edges or after is None or len(committed) == len(right):
            break
        at = edges.index((at, token))
    return committed


@pytest.mark.parametrize("name", FOLLOWING)
@settings(max_examples=50, deadline=None)
@given(st.lists(requests, min_size=1, max_size=3))
def test_the_path_that_stands_is_what_plain_decoding_says(name: str, everybody: list[Asked]) -> None:
    everybody = [asked._replace(sampling=asked.sampling | FOLLOWING[name]) for asked in everybody]
    said = [plain(asked) for asked in everybody]
    windows = [tree(asked, right) for asked, right in zip(everybody, said, strict=True)]
    sequences, places, rows = [], [], []
    for asked, window in zip(everybody, windows, strict=True):
        sequence = asked.sequence()
        sequence.window = window
        processor = asked.processor(sequence)
        paths = tuple(Place(sequence, path, processor) for path in _paths(window))
        sequences.append(sequence)
        places.append(_where_drafts_stand(paths, window))
        rows += [logits_after([*sequence.tokens, *place.drafted]) for place in paths]
    logits = torch.stack(rows)
    drawn = sample(logits, [place for of_one in places for place in of_one])
    first = 0
    for sequence, of_one, right in zip(sequences, places, said, strict=True):
        count = len(of_one)
        errors = drawn.errors_of(first, count)
        tokens = tuple(drawn.tokens[first : first + count])
        draws = Draws(True, tokens, logits, first, of_one, frozenset(errors))
        first += count
        if right[0] is None:
            assert 0 in errors
            continue
        decision = Speculative().decide(sequence, draws)
        expected = path_by_hand(sequence.window, right)
        assert list(decision.committed[:MOST]) == expected
        assert [sequence.window.tokens[draft] for draft in decision.kept] == list(decision.committed[:-1])
