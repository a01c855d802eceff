"""What spells special tokens is found wherever it stands, at a cost that does not grow with their number."""

from __future__ import annotations

import time

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from engine.vocabulary import Vocabulary
from server.special_text import FreeCharacters, SpecialTextMask, SpecialTexts
from server.tokenizer import Tokenizer


def test_the_leftmost_and_then_the_longest_is_found() -> None:
    special = SpecialTexts(["<a>", "<a>b", "]", "^-x"])
    assert list(special.find("é<a>b<a> ^-x]")) == [
        (1, 5, "<a>b"),
        (5, 8, "<a>"),
        (9, 12, "^-x"),
        (12, 13, "]"),
    ]
    assert list(special.find("none <a")) == []
    assert list(SpecialTexts(()).find("<a>")) == []


def test_the_longest_beginning_at_the_end_counts_but_not_of_words() -> None:
    special = SpecialTexts(["<|im_end|>", "<|", "user>"])
    assert special.begun_at_end("a <|im_<|im_e") == "<|im_e"
    assert special.begun_at_end("<") == "<"
    assert special.begun_at_end("<|im_end|> a") == ""
    assert special.begun_at_end("us") == ""
    assert SpecialTexts(()).begun_at_end("<") == ""


def test_equal_texts_have_one_stand_in() -> None:
    mask = SpecialTextMask(SpecialTexts(["<a>"]), FreeCharacters(["<a>"]))
    masked = mask.apply(["<a>x<a>", {"<a>": "<a"}])
    assert list(mask.plain.values()) == ["<a>", "<a"]
    assert [mask.restore(masked[0]), mask.restore(next(iter(masked[1])))] == ["<a>x<a>", "<a>"]


def test_thousands_of_special_tokens_cost_no_more_than_a_few() -> None:
    texts = [f"<|reserved_{index}|>" for index in range(5_000)]
    special = SpecialTexts(texts)
    vocabulary = Backend(models.BPE(vocab={"<": 0, "a": 1}, merges=[]))
    plain = Backend(models.BPE(vocab={"<": 0, "a": 1}, merges=[]))
    vocabulary.add_special_tokens([AddedToken(text) for text in texts])
    tokenizer = Tokenizer(Vocabulary(vocabulary, plain))
    long = "<" * 20_000 + texts[4_000]
    started_s = time.perf_counter()
    mask = SpecialTextMask(special, FreeCharacters([long]))
    masked = mask.apply([long, *["hello"] * 1000])
    ids = tokenizer.encode_masked(masked[0] + texts[1], mask.plain)
    assert time.perf_counter() - started_s < 1.0  # takes 20 ms; by trying each token it took 5 s
    assert (masked[0][-1], len(masked[0])) == (next(iter(mask.plain)), 20_001)
    assert (ids[:20_000], ids[-1]) == ([0] * 20_000, tokenizer.encode(texts[1], special=True)[0])


def test_tokens_among_masked_text_are_those_of_the_library() -> None:
    """With the white space that they swallow, and only where words end, if they are words."""
    model = Backend(models.BPE(vocab={"a": 0, " ": 1, "b": 2, "\U000f0000": 3}, merges=[]))
    model.add_special_tokens(
        [AddedToken("ab", single_word=True), AddedToken("<x>", lstrip=True, rstrip=True)]
    )
    plain = Backend(models.BPE(vocab={"a": 0, " ": 1, "b": 2}, merges=[]))
    tokenizer = Tokenizer(Vocabulary(model, plain))
    for text in ("ab aba", "a  <x> b", " <x>  <x>ab"):
        whole = tokenizer.encode(text, special=True)
        assert tokenizer.encode_masked(text + " \U000f0000", {"\U000f0000": "a"})[: len(whole)] == whole
