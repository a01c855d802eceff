"""Vocabularies for tests: trained on a few lines, byte-level or SentencePiece."""

from __future__ import annotations

import json
import random
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.drafting.vocabularies.speller import Speller
from engine.vocabulary import document, folder
from tests.engine.vocabulary.test_sentencepiece import VECTORS

TEXTS = [
    "the cat sat on the mat and the other cat sat there, nothing else was said about it all day long.",
    "def fibonacci(number):\n    return 1 if number < 2 else fibonacci(number - 1) + fibonacci(number - 2)",
    "Gr\u00f6\u00dfe, na\u00efve caf\u00e9s, \u4f60\u597d\uff0c\u4e16\u754c\u3002 "
    "\U0001f642\U0001f680 \u2013 it\u2019s 2026!",
    "international internationalisation internal interned national nation notions",
]
ROWS = 10**6


def byte_level(size: int, special: tuple[str, ...] = (), texts: tuple[str, ...] = tuple(TEXTS)) -> Speller:
    """Byte-level BPE of up to `size` tokens; the special ones come first."""
    return Speller(document.build(json.loads(trained(size, special, texts))))


def trained(size: int, special: tuple[str, ...], texts: tuple[str, ...]) -> str:
    """A tokenizer.json."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return str(backend.to_str())


def bytes_in_any_order(seed: int) -> Speller:
    """Every byte is a token, behind one special token."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    random.Random(seed).shuffle(characters)
    backend = Tokenizer(models.BPE({"<|end|>": 0} | {char: 1 + k for k, char in enumerate(characters)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|end|>"])
    return Speller(document.build(json.loads(backend.to_str())))


@cache
def spellers() -> dict[str, Speller]:
    """By name; the texts of their special tokens differ."""
    return {
        "coarse": byte_level(420, ("<|end|>", "<|user|>")),
        "fine": byte_level(300, ("<|stop|>", "<|user|>"), tuple(TEXTS[::-2])),
        "bytes": bytes_in_any_order(0),
        "bpe": pieces("bpe"),
        "bpe_no_prefix": pieces("bpe_no_prefix"),
        "unigram": pieces("unigram"),
    }


def pieces(kind: str) -> Speller:
    """SentencePiece."""
    return Speller(folder._from_pieces(VECTORS / f"{kind}.model", [], {}, ROWS))
