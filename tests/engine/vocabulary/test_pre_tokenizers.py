"""Byte-level BPE cuts texts where the models' own tokenisers do, in time near linear in their length."""

from __future__ import annotations

import random
import time
import unicodedata

import pytest
from tokenizers import Regex, pre_tokenizers

from engine.vocabulary import byte_level, words
from engine.vocabulary.document import build
from engine.vocabulary.pre_tokenizers import _BY_NAME, PreTokenizer, find
from server.tokenizer import Tokenizer
from tests.server.text.awkward import texts

TEXTS = texts(joined=150)
BYTES = {char: index for index, char in enumerate(byte_level._BYTE_OF)}
DISTINCT = {repr(rules.steps): name for name, rules in _BY_NAME.items() if not rules.raw}.values()


def tokenizer(name: str) -> Tokenizer:
    """Bytes alone are its tokens: what matters is the cuts."""
    rules = find(name)
    assert rules is not None
    if rules.raw:
        pieces = [*"aA1 é", "\u2581", *(f"<0x{byte:02X}>" for byte in range(256))]
        return Tokenizer(build(rules.document({piece: index for index, piece in enumerate(pieces)}, [])))
    return Tokenizer(build(rules.document(BYTES, [])))


def cuts(pre_tokenizer: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]


def words_of(name: str, text: str) -> list[str]:
    return cuts(tokenizer(name)._marked.pre_tokenizer, text)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("default", "it's a-b 12345!", "it|'|s| a|-|b| |123|45|!"),
        ("gpt-2", "it's  a 12345!", "it|'s| | a| 12345|!"),
        ("exaone4", "a 123", "a| 123"),
        ("smollm", "a 123", "a| |1|2|3"),
        ("command-r", "a 123", "a| |1|2|3"),
        ("llama-bpe", "I'LL 1234", "I|'LL| |123|4"),
        ("glm4", "a\n\n b", "a|\n\n| b"),
        ("qwen2", "I'LL 12 नि", "I|'LL| |1|2| न|ि"),
        ("qwen35", "12 नि", "1|2| नि"),
        ("ufakzeka", "Ali'nin", "Ali|'nin"),
        ("laguna", "a\n\nb  c", "a|\n\n|b| | c"),
        ("seed-coder", "a!\nb", "a|!|\n|b"),
        ("jais-2", "a" + " " * 6 + "b", "a|    | | b"),
        ("minicpm5", "a 12345", "a| |123|45"),
        ("deepseek-llm", "Ab 12中文 x", "Ab| |1|2|中文| x"),
        ("deepseek-coder", "नि 12", "न|ि| |1|2"),
        ("deepseek-v3", "a.b 1234中", "a|.b| |123|4|中"),
        ("spark2_5", "a.\n 12", "a|.|\n| |1|2"),
        ("youtu", "안녕 HelloWorld 12", "안녕| Hello|World| |1|2"),
        ("falcon", "a.b 12345", "a|.|b| |123|45"),
        ("bloom", "ab, cd (x)", "ab|,| cd| (|x|)"),
        ("viking", "ab 12", "ab| |1|2"),
        ("tekken", "HelloWORLDs 12'll", "Hello|WORLDs| |1|2|'ll"),
        ("gpt-4o", "HelloWORLD's 1234/\n", "Hello|WORLD's| |123|4|/\n"),
        ("tiny_aya", "12345 12345a", "12|345| |123|45|a"),
        ("kimi-k2", "a中文b 1234", "a|中文|b| |123|4"),
        ("superbpe", "one two 12345", "one two |12|345"),
        ("bailingmoe", "a\n\nb it's", "a|\n\n|b| it|'s"),
        ("exaone-moe", "a b c 12", "a b c| |1|2"),
        ("afmoe", "a 12345 中文", "a| |12|345| |中文"),
        ("chameleon", "a    b (c) IMGIMGABZ", "a|    |b| |(|c|)| |IMGIMGABZ"),
        ("gemma4", "a b\n\nc", "a b|\n\n|c"),
    ],
)
def test_cuts(name: str, text: str, expected: str) -> None:
    assert words_of(name, text) == expected.split("|")


@pytest.mark.parametrize("name", DISTINCT)
def test_bytes_come_back(name: str) -> None:
    ours, rules = tokenizer(name), find(name)
    assert rules is not None
    for text in TEXTS:
        expected = unicodedata.normalize("NFC", text) if rules.nfc else text
        ids = ours.encode(text, special=False)
        assert ours.decode(ids) == expected
        assert len(ids) == len(expected.encode())


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("part", ["1", " ", "a\u0301", "'s", "\n", " \n"])
def test_time_is_near_linear(name: str, part: str) -> None:
    text = part * (30_000 // len(part)) + "a"
    start = time.perf_counter()
    tokenizer(name).encode(text, special=False)
    assert time.perf_counter() - start < 5.0


ORIGINAL_PATTERNS = {
    "tiny_aya": (r"\d{1,3}(?=(?:\d{3})*\b)", words.O200K),
    "superbpe": (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
}


@pytest.mark.parametrize("name", ORIGINAL_PATTERNS)
def test_numbers_are_cut_where_the_quadratic_patterns_cut_them(name: str) -> None:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in ORIGINAL_PATTERNS[name]]
    original = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    ours = tokenizer(name)._marked.pre_tokenizer
    source = random.Random(1)
    rows = ["".join(source.choices("0123456789a ._½४", k=source.randint(1, 25))) for _ in range(2000)]
    for text in [*TEXTS, *rows]:
        assert cuts(ours, text) == cuts(original, text), text


@pytest.mark.parametrize(
    ("name", "module", "class_name"),
    [
        ("qwen2", "qwen2.tokenization_qwen2", "Qwen2Tokenizer"),
        ("qwen35", "qwen3_5.tokenization_qwen3_5", "Qwen3_5Tokenizer"),
        ("command-r", "cohere.tokenization_cohere", "CohereTokenizer"),
        ("olmo", "gpt_neox.tokenization_gpt_neox", "GPTNeoXTokenizer"),
        ("gpt-2", "gpt2.tokenization_gpt2", "GPT2Tokenizer"),
    ],
)
def test_the_same_as_transformers(name: str, module: str, class_name: str) -> None:
    found = pytest.importorskip(f"transformers.models.{module}")
    reference = getattr(found, class_name)(vocab=dict(BYTES), merges=[]).backend_tokenizer
    ours = tokenizer(name)._marked
    for text in TEXTS:
        normal = reference.normalizer.normalize_str(text) if reference.normalizer else text
        assert (ours.normalizer.normalize_str(text) if ours.normalizer else text) == normal
        expected = reference.pre_tokenizer.pre_tokenize_str(normal)
        assert ours.pre_tokenizer.pre_tokenize_str(normal) == expected


def test_the_tiktoken_pattern_is_that_of_transformers() -> None:
    converters = pytest.importorskip("transformers.convert_slow_tokenizer")
    assert converters.TikTokenConverter(vocab_file=None).pattern == words.LLAMA3


def test_names_of_llama_cpp_are_known() -> None:
    """Those of src/llama-vocab.cpp but "whitespace", which needs another kind of merges."""
    names = """
    default minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano
    deepseek-llm deepseek-coder deepseek-v3 spark2_5 youtu falcon mpt starcoder gpt-2 phi-2 jina-es
    jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jais-2 gemma4 sarvam-moe
    jina-v1-en jina-v2-code roberta-bpe refact command-r qwen2 deepseek-r1-qwen kormo f2llmv2 qwen35
    stablelm2 olmo dbrx smaug-bpe poro-chat chatglm-bpe glm4 glm5 viking jais tekken smollm
    codeshell bloom gpt3-finnish exaone exaone4 exaone-moe chameleon minerva-7b megrez gpt-4o llama4
    kanana2 talkie granite-embed-multi-97m tiny_aya cohere2moe superbpe trillion granite-docling
    bailingmoe bailingmoe2 llada-moe seed-coder hunyuan hunyuan-dense hy_v4 joyai-llm kimi-k2
    ufakzeka grok-2 afmoe laguna minimax-m2 solar-open mellum2 granite-embed-multi-311m
    """
    assert [name for name in names.split() if not isinstance(find(name), PreTokenizer)] == []
    assert find("whitespace") is None
    assert find("") is None
