"""Stop strings: the result depends on the text alone, never on how it is cut; nothing is held for long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import SequenceOutput
from scheduler.types import FinishReason
from server.detokenizer import IncrementalDetokenizer
from server.stops import StopMatcher
from server.streams import ChoiceReader, Slot, TextOptions
from tests.server.byte_tokenizer import BOS, EOS, ByteTokenizer

words = st.text("ab", min_size=1, max_size=5)


def run(
    text: str, stops: tuple[str, ...], cuts: list[int], include_stop: bool = False
) -> tuple[str, str | None]:
    matcher, out, at, matched = StopMatcher(stops, include_stop), "", 0, None
    for size in [*cuts, len(text)]:
        shown, matched = matcher.push(text[at : at + size])
        out += shown
        at += size
        assert (out + "".join(part for part, _ in matcher._held) == text[:at]) or matched
    return out + matcher.flush(), matched


def obvious(text: str, stops: tuple[str, ...], include_stop: bool = False) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            stop = max(matching, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(words, max_size=4).map(tuple),
    cuts=st.lists(st.integers(0, 4), max_size=20),
    include_stop=st.booleans(),
)
def test_any_cut_gives_what_the_definition_gives(
    text: str, stops: tuple[str, ...], cuts: list[int], include_stop: bool
) -> None:
    assert run(text, stops, cuts, include_stop) == obvious(text, stops, include_stop)


@settings(max_examples=300, deadline=None)
@given(text=st.text("abc", max_size=20), stops=st.lists(words, min_size=1, max_size=3).map(tuple))
def test_only_what_may_still_become_a_stop_is_held_back(text: str, stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops, include_stop=False)
    shown, matched = matcher.push(text)
    if matched is None:
        held = text[len(shown) :]
        may_become = [text[at:] for at in range(len(text)) if any(s.startswith(text[at:]) for s in stops)]
        assert held == (may_become[0] if may_become else "")


def test_examples() -> None:
    assert run("one\n\nUser: two", ("\nUser:",), [4, 2]) == ("one\n", "\nUser:")
    assert run("abcd", ("abcd", "bc"), [1]) == ("a", "bc")  # complete first
    assert run("xabc", ("c", "abc"), []) == ("x", "abc")  # complete at once: the longest
    assert run("xabc", ("abc",), [2], include_stop=True) == ("xabc", "abc")
    assert run("🙂stop", ("🙂s",), [1]) == ("", "🙂s")


def test_after_a_match_nothing_comes() -> None:
    matcher = StopMatcher(("b",), include_stop=False)
    assert matcher.push("abc") == ("a", "b")
    assert matcher.push("abc") == ("", "b")
    assert matcher.flush() == ""


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(("a", ""), include_stop=False)


def test_time_is_linear_on_what_is_worst_for_a_search() -> None:
    matcher = StopMatcher(("a" * 255 + "b", "a" * 128 + "c"), include_stop=False)
    start = time.perf_counter()
    for _ in range(50_000):
        assert matcher.push("aaaa")[1] is None
    assert time.perf_counter() - start < 5.0


TOKENIZER = ByteTokenizer()


class Answer:
    """What a choice was read to: its text, its tokens with the offsets of their texts, and how it ended."""

    def __init__(self, ids: list[int], cuts: list[int], options: TextOptions, *, stopped: bool) -> None:
        reader = ChoiceReader(0, TOKENIZER, options)  # type: ignore[arg-type]
        self.text, self.pieces, at = "", [], 0
        for size in [*cuts, len(ids)]:
            tokens, at = tuple(ids[at : at + size]), at + size
            end = (FinishReason.STOP if stopped else FinishReason.LENGTH) if at >= len(ids) else None
            slot = Slot()
            slot.merge(SequenceOutput("r", 0, tokens, end, ids[-1] if end and stopped else None))
            delta = reader.read(slot)
            self.text += delta.text
            assert delta.text or delta.finish is not None or not delta.pieces, "a chunk without news"
            self.pieces += [(piece.token, piece.start) for piece in delta.pieces]
            if delta.finish is not None:
                break
        self.finish, self.stop_reason = delta.finish, delta.stop_reason


def by_definition(
    ids: list[int], options: TextOptions, *, stopped: bool
) -> tuple[str, list[int], str | int | None]:
    """(text, tokens, stop_reason) by going through the model's text character by character."""
    chars: list[tuple[str, bool, int]] = []  # the character, whether it is shown, its token's number from 1
    places = []
    detokenizer = IncrementalDetokenizer(TOKENIZER, options.skip_special)  # type: ignore[arg-type]
    ends = ids[-1] if stopped else None
    for number, token in enumerate(ids, start=1):
        places.append(len(chars))
        ending = stopped and number == len(ids) and not options.include_stop
        shown = detokenizer.flush() if ending else detokenizer.push((token,))
        chars += [(char, True, number) for char in shown]
        if ending or (options.skip_special and TOKENIZER.is_special(token)):
            hidden = TOKENIZER.token_bytes(token).decode("utf-8", "replace")
            chars += [(char, False, number) for char in hidden]
    # A character that a special token cuts in two comes after it.
    chars += [(char, True, len(ids)) for char in detokenizer.flush()]
    whole = "".join(char for char, _, _ in chars)
    for end in range(1, len(chars) + 1):
        found = [stop for stop in options.stops if whole[:end].endswith(stop)]
        if found and chars[end - 1][2] > options.min_tokens:
            stop = max(found, key=len)
            begin = end - len(stop)
            text = "".join(char for char, shown, _ in chars[:begin] if shown)
            cut = end if options.include_stop else begin
            kept = [token for token, place in zip(ids, places, strict=True) if place < cut]
            return text + (stop if options.include_stop else ""), kept, stop
    return "".join(char for char, shown, _ in chars if shown), ids, ends


letters = st.sampled_from([*b"ab<>eos", *"é".encode(), BOS, EOS])
marks = st.sampled_from(
    ["<bos>", "<eos>", "s>", "<", "a<bos>", "<eos>b", "><", "b<bos>a", "é", "é<e", "\ufffd"]
)


@settings(max_examples=1000, deadline=None)
@given(
    ids=st.lists(letters, min_size=1, max_size=14),
    cuts=st.lists(st.integers(0, 4), max_size=12),
    stops=st.lists(marks | st.text("ab<>os", min_size=1, max_size=3), max_size=3).map(tuple),
    include_stop=st.booleans(),
    skip_special=st.booleans(),
    min_tokens=st.integers(0, 8),
    stopped=st.booleans(),
)
def test_stop_strings_are_found_in_all_that_the_model_wrote_however_it_arrives(
    ids: list[int],
    cuts: list[int],
    stops: tuple[str, ...],
    include_stop: bool,
    skip_special: bool,
    min_tokens: int,
    stopped: bool,
) -> None:
    options = TextOptions(
        stops=stops, include_stop=include_stop, skip_special=skip_special, min_tokens=min_tokens
    )
    streamed, at_once = (Answer(ids, each, options, stopped=stopped) for each in (cuts, []))
    text, tokens, stop_reason = by_definition(ids, options, stopped=stopped)
    assert (streamed.text, streamed.pieces) == (at_once.text, at_once.pieces)
    assert (streamed.finish, streamed.stop_reason) == (at_once.finish, at_once.stop_reason)
    assert at_once.text == text
    assert [token for token, _ in at_once.pieces] == tokens
    assert at_once.stop_reason == stop_reason
    assert at_once.finish == ("stop" if stopped or isinstance(stop_reason, str) else "length")
    starts = [start for _, start in at_once.pieces]
    assert starts == sorted(starts)
    assert all(0 <= start <= len(text) for start in starts)
    shown = at_once.pieces[:-1] if stopped and len(tokens) == len(ids) else at_once.pieces
    ascii_starts = [(token, text[start]) for token, start in shown if token < 128]
    assert all(at in (chr(token), "\ufffd") for token, at in ascii_starts)  # what it completes, or itself


@pytest.mark.parametrize(
    ("ids", "options", "expected"),
    [
        # A special token that is not shown stops, alone and beside ordinary text
        ([*b"ab", BOS, *b"c"], {"stops": ("<bos>",)}, ("ab", "<bos>", [97, 98])),
        ([*b"ab", BOS, *b"c"], {"stops": ("b<bos>c",)}, ("a", "b<bos>c", [97])),
        ([*b"ab", BOS, *b"cd"], {"stops": ("d",)}, ("abc", "d", [97, 98, BOS, 99])),
        # and it is shown where the stop string is asked for
        ([*b"ab", BOS], {"stops": ("<bos>",), "include_stop": True}, ("ab<bos>", "<bos>", [97, 98, BOS])),
        # Begun within min_tokens and ended after it: found; ended within it: passed over
        ([*b"xyz!"], {"stops": ("yz",), "min_tokens": 2}, ("x", "yz", [120])),
        ([*b"xyz!"], {"stops": ("yz",), "min_tokens": 3}, ("xyz!", None, [*b"xyz!"])),
        ([*b"yzyz"], {"stops": ("zyz", "yz"), "min_tokens": 2}, ("y", "zyz", [121])),
        ([*b"yyz"], {"stops": ("y", "yyz"), "min_tokens": 2}, ("", "yyz", [])),
    ],
)
def test_stop_string_examples(
    ids: list[int], options: dict[str, object], expected: tuple[str, str | None, list[int]]
) -> None:
    answer = Answer(ids, [1] * len(ids), TextOptions(**options), stopped=False)  # type: ignore[arg-type]
    assert (answer.text, answer.stop_reason, [token for token, _ in answer.pieces]) == expected


def test_the_text_of_the_end_token_is_a_stop_string_like_any_other() -> None:
    ends = frozenset({EOS})
    for stop, text in (("<eos>", "ab"), ("b<eos>", "a"), ("zz", "ab")):
        answer = Answer([*b"ab", EOS], [1], TextOptions(stops=(stop,), eos_token_ids=ends), stopped=True)
        assert (answer.text, answer.finish) == (text, "stop")
        assert answer.stop_reason == (None if stop == "zz" else stop)
