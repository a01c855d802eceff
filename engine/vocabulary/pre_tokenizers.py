"""How a text is cut into words before the merges of byte-level BPE, by GGUF's name for it.

A GGUF file holds only a name (`tokenizer.ggml.pre`). The names, which of them are the same, and which take a
word that is a token as it is, are llama.cpp's (`src/llama-vocab.cpp`); the patterns are those of the models'
own tokenizer.json, which llama.cpp quotes where it had to change them. So is NFC, which it leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.vocabulary import sentencepiece, words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine.vocabulary.document import Document

Step = dict[str, Any]  # a pre-tokeniser as tokenizer.json writes it


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """The cuts, each made within the pieces of the one before."""

    steps: tuple[Step, ...]
    nfc: bool = False  # the model's own tokeniser composes characters first
    ignore_merges: bool = False  # a word that is a token is taken as it is, whether or not merges lead to it
    add_bos: bool = False  # where the file does not say
    raw: bool = False  # merges of characters with spaces as U+2581, not of bytes

    def document(self, vocabulary: Mapping[str, int], merges: Sequence[str | tuple[str, str]]) -> Document:
        """The tokenizer.json of byte-level BPE with these cuts."""
        return {
            "added_tokens": [],
            "normalizer": self._normalizer(),
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(self.steps)},
            "decoder": sentencepiece.decoder(strip=False) if self.raw else _BYTES,
            "model": {
                "type": "BPE",
                "vocab": dict(vocabulary),
                "merges": list(merges),
                "ignore_merges": self.ignore_merges,
                "byte_fallback": self.raw,
            },
        }

    def _normalizer(self) -> Document | None:
        if self.raw:
            return {"type": "Replace", "pattern": {"String": " "}, "content": sentencepiece.SPACE}
        return {"type": "NFC"} if self.nfc else None


def find(name: str) -> PreTokenizer | None:
    """What `tokenizer.ggml.pre` = `name` means; None when it is not known here."""
    return _BY_NAME.get(name)


def _split(pattern: str) -> Step:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(*, gpt2_words: bool) -> Step:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": gpt2_words}


def _words(*patterns: str) -> PreTokenizer:
    return PreTokenizer((*map(_split, patterns), _byte_level(gpt2_words=False)))


_BYTES = _byte_level(gpt2_words=False)
_GPT2_WORDS = _byte_level(gpt2_words=True)
_EACH_DIGIT: Step = {"type": "Digits", "individual_digits": True}
_THREE_DIGITS = "[0-9][0-9][0-9]"

_gpt2 = PreTokenizer((_GPT2_WORDS,))
_digits = PreTokenizer((_EACH_DIGIT, _GPT2_WORDS))
_llama3 = _words(words.LLAMA3)
_llama3_words = replace(_llama3, ignore_merges=True, add_bos=True)
_qwen2 = replace(_words(words.QWEN2), nfc=True)
_qwen2_words = _words(words.QWEN2)
_deepseek3 = _words(*words.DEEPSEEK3)
_o200k = _words(words.O200K)
_bloom = _words(words.BLOOM)
_glm4 = replace(_llama3, ignore_merges=True)
_bailing = _words(words.BAILING)
_gemma4 = PreTokenizer((_split(r"[^\n]+|[\n]+"),), raw=True, add_bos=True)
_tiny_aya = _words(*words.TINY_AYA)

_BY_NAME: dict[str, PreTokenizer] = {
    # What llama.cpp does with files that name none: a guess.
    "default": PreTokenizer(
        (
            _split(r"[\p{P}\$\+<=>\^~\|]+"),
            _split(words.GPT2),
            _split(r"\p{N}+"),
            _split(_THREE_DIGITS),
            _BYTES,
        )
    ),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "jais", "trillion", "granite-docling"),
        _gpt2,
    ),
    **dict.fromkeys(("jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code"), _gpt2),
    **dict.fromkeys(("modern-bert", "roberta-bpe"), _gpt2),
    **dict.fromkeys(("mpt", "olmo"), replace(_gpt2, nfc=True)),
    **dict.fromkeys(
        ("starcoder", "refact", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"), _digits
    ),
    "command-r": replace(_digits, nfc=True),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral"), _llama3_words),
    **dict.fromkeys(("midm-2.0", "lfm2", "jina-v5-nano"), _llama3_words),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _llama3),
    **dict.fromkeys(("glm4", "glm5"), _glm4),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), _qwen2),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open", "grok-2"), _qwen2_words),
    "qwen35": replace(_words(words.QWEN35), nfc=True),
    "ufakzeka": _words(words.QWEN2.removeprefix(f"{words.CONTRACTIONS}|")),
    "laguna": _words(r"[^\n]+|[\n]+", words.QWEN2),
    "seed-coder": _words(words.SEED),
    "jais-2": _words(words.JAIS2),
    "minicpm5": replace(_words(*words.MINICPM5), ignore_merges=True),
    "deepseek-llm": PreTokenizer(
        (*map(_split, words.DEEPSEEK_LLM), _EACH_DIGIT, _byte_level(gpt2_words=False))
    ),
    "deepseek-coder": PreTokenizer(
        (*map(_split, words.DEEPSEEK_CODER), _EACH_DIGIT, _byte_level(gpt2_words=False))
    ),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _deepseek3),
    "spark2_5": _words(*words.SPARK),
    "youtu": replace(_words(words.YOUTU_SCRIPTS, words.YOUTU), ignore_merges=True),
    "falcon": PreTokenizer(
        (
            {"type": "Punctuation", "behavior": "Contiguous"},
            _GPT2_WORDS,
            {"type": "Digits", "individual_digits": False},
            _split(_THREE_DIGITS),
        )
    ),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), _bloom),
    "viking": _words(words.BLOOM, r"\p{N}"),
    "tekken": replace(_words(words.TEKKEN), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _o200k),
    "granite-embed-multi-97m": replace(_o200k, ignore_merges=True),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _tiny_aya),
    "kimi-k2": _words(words.KIMI),
    "superbpe": _words(*words.SUPERBPE),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _bailing),
    "exaone-moe": _words(words.EXAONE_MOE),
    "afmoe": _words(
        *words.THREES,
        words.AFMOE_SCRIPTS,
        rf"{words.DEEPSEEK3_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{words.SPACES}",
    ),
    "chameleon": PreTokenizer(
        (
            *map(_split, ("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )")),
            _EACH_DIGIT,
            {"type": "Punctuation", "behavior": "Isolated"},
            _GPT2_WORDS,
        ),
        add_bos=True,
    ),
    **dict.fromkeys(("gemma4", "granite-embed-multi-311m"), _gemma4),
    "sarvam-moe": PreTokenizer((_split(r"[^\n]+|[\n]+"),), raw=True),
}
