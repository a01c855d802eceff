"""Ids equal those of llama.cpp and of the tokenizer.json; special tokens only where they are meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from engine.checkpoint import CheckpointError, locate
from engine.vocabulary import sentencepiece
from engine.vocabulary.document import build
from engine.vocabulary.sentencepiece import Piece, PieceType, Rules
from server.tokenizer import Tokenizer

VECTORS = Path(os.environ.get("OCTAVO_VECTORS", Path(__file__).parents[4] / "shared" / "vectors"))
END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    path = VECTORS / "tokenizer" / "smollm2.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; OCTAVO_VECTORS names the folder of the vectors")
    loaded: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["cases"]
    return loaded


def test_ids_are_those_of_llama_cpp(smollm2: Tokenizer, cases: list[dict[str, Any]]) -> None:
    assert len(cases) > 100
    for case in cases:
        assert smollm2.encode(case["text"], special=False) == case["ids"], case["text"]
        assert smollm2.encode(case["text"], special=True) == case["ids_special"], case["text"]
        assert smollm2.decode(case["ids"], skip_special=False) == case["text"]
        assert smollm2.decode(case["ids_special"], skip_special=False) == case["text"]


def test_a_folder_gives_the_same_tokeniser(
    smollm2: Tokenizer, smollm2_folder: Path, cases: list[dict[str, Any]]
) -> None:
    ours = Tokenizer.from_checkpoint(locate(str(smollm2_folder)))
    assert (ours.vocab_size, ours.special_texts.texts) == (smollm2.vocab_size, smollm2.special_texts.texts)
    assert (ours.add_bos, ours.bos_token_id) == (False, 1)
    for case in cases:
        assert ours.encode(case["text"], special=False) == case["ids"]
        assert ours.encode(case["text"], special=True) == case["ids_special"]


def test_special_text_is_special_only_on_request(smollm2: Tokenizer) -> None:
    assert smollm2.encode("<|im_end|>", special=True) == [END]
    plain = smollm2.encode("<|im_end|>", special=False)
    assert len(plain) > 1
    assert not any(map(smollm2.is_special, plain))
    assert smollm2.is_special(END)
    assert not smollm2.is_special(300)


def test_masked_characters_are_plain_text(smollm2: Tokenizer) -> None:
    text = "<|im_start|>user\nsay \U000f0000 now<|im_end|>"
    ids = smollm2.encode_masked(text, {"\U000f0000": "<|im_end|>"})
    inner = smollm2.encode("user\nsay <|im_end|> now", special=False)
    assert ids == [1, *inner, END]
    assert smollm2.encode_masked("a<|im_end|>b c", {}) == smollm2.encode("a<|im_end|>b c", special=True)


def test_bytes_of_tokens(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("naïve 🙂\n", special=False)
    assert b"".join(map(smollm2.token_bytes, ids)) == "naïve 🙂\n".encode()
    assert smollm2.token_bytes(END) == b"<|im_end|>"
    assert smollm2.token_bytes(smollm2.vocab_size) == b""
    assert smollm2.token_bytes(-1) == b""
    assert smollm2.decode([10**9, -5, END]) == ""


def test_every_byte_that_text_needs_is_a_token(smollm2: Tokenizer) -> None:
    found = {smollm2.token_bytes(token) for token in range(smollm2.vocab_size)}
    lacking = {byte for byte in range(256) if bytes([byte]) not in found}
    assert lacking == {4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}


def test_half_a_surrogate_pair_is_text_too(smollm2: Tokenizer) -> None:
    assert smollm2.encode("a\ud83d", special=False) == smollm2.encode("a?", special=False)


@pytest.mark.parametrize(
    "text", ["a" * 200_000, " " * 200_000, "<" * 200_000, "!a" * 100_000, "\n" * 200_000]
)
def test_long_texts_take_bounded_time(smollm2: Tokenizer, text: str) -> None:
    start = time.perf_counter()
    ids = smollm2.encode(text, special=False)
    assert time.perf_counter() - start < 5.0
    assert smollm2.decode(ids) == text


def test_building_it_needs_no_torch(smollm2_gguf: Path) -> None:
    code = (
        "import sys; from engine.checkpoint import locate; from server.tokenizer import Tokenizer;"
        "import server.prompt; Tokenizer.from_checkpoint(locate(''));"
        "print({'torch', 'numpy', 'jinja2', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def with_metadata(path: Path, **change: Any) -> Tokenizer:
    checkpoint = locate(str(path))
    assert checkpoint.gguf is not None
    metadata = checkpoint.gguf.metadata | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    return Tokenizer.from_checkpoint(replace(checkpoint, gguf=replace(checkpoint.gguf, metadata=metadata)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "llama"}, "tokenizer.ggml.scores"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"model": 7}, "tokenizer.ggml.model is '7'"),
        ({"pre": "whitespace"}, "tokenizer.ggml.pre = 'whitespace'"),
        ({"tokens": ()}, "tokenizer.ggml.tokens"),
        ({"merges": 7}, "tokenizer.ggml.merges"),
        ({"merges": ("x nowhere",)}, "Token `nowhere` out of vocabulary"),
        ({"merges": ("nospace",)}, "tokenizer.ggml.merges"),
        ({"token_type": (1, 2)}, "tokenizer.ggml.token_type"),
    ],
)
def test_a_vocabulary_that_is_not_supported_is_refused(
    smollm2_gguf: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        with_metadata(smollm2_gguf, **change)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "x 1234", ["x", " 1234"]),
        ("smollm", "x 12", ["x", " ", "1", "2"]),
        ("llama-bpe", "I'LL 1234", ["I", "'LL", " ", "123", "4"]),
        ("qwen2", "I'LL 12", ["I", "'LL", " ", "1", "2"]),
    ],
)
def test_pre_tokenisers(smollm2_gguf: Path, pre: str, text: str, pieces: list[str]) -> None:
    cut = with_metadata(smollm2_gguf, pre=pre)._marked.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == pieces


def test_a_prompt_begins_as_the_checkpoint_wants_it(smollm2_gguf: Path) -> None:
    checkpoint = locate(str(smollm2_gguf))
    assert Tokenizer.from_checkpoint(checkpoint).encode_prompt("a") == [81]
    begun = Tokenizer.from_checkpoint(replace(checkpoint, add_bos=True))
    assert begun.encode_prompt("a") == [1, 81]
    assert begun.encode_prompt("<|im_start|>a") == [1, 81]
    assert begun.encode("a", special=True) == [81]


def test_a_broken_tokenizer_json_is_refused(smollm2_folder: Path, tmp_path: Path) -> None:
    checkpoint = replace(locate(str(smollm2_folder)), path=tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        Tokenizer.from_checkpoint(checkpoint)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_checkpoint(checkpoint)


def test_padding_truncation_and_dropout_of_a_tokenizer_json_are_ignored(
    smollm2: Tokenizer, tmp_path: Path
) -> None:
    smollm2.save(tmp_path / "tokenizer.json")
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.model.dropout = 0.9
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    ours = Tokenizer.from_checkpoint(locate(str(tmp_path)))
    text = "the quick brown fox jumps over the lazy dog"
    assert ours.encode(text, special=False) == smollm2.encode(text, special=False)


LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip


def sentencepiece_like() -> Tokenizer:
    """BPE with byte fallback and U+2581 for spaces, as the first Llamas have it."""
    texts = ["<s>", "\u2581", "h", "i", "\u2581h", "\u2581hi", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [PieceType.CONTROL, *[PieceType.NORMAL] * 5, *[PieceType.BYTE] * 256]
    pieces = [Piece(text, -index, kind) for index, (text, kind) in enumerate(zip(texts, kinds, strict=True))]
    rules = Rules(unigram=False, prefix=True, merge_spaces=False, unknown_id=None)
    added = [sentencepiece.added_token(0, "<s>", PieceType.CONTROL)]
    return Tokenizer(sentencepiece.build(pieces, rules, added))


def test_sentencepiece_puts_a_space_before_a_text() -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer.encode("hi hi é", special=False)
    assert ids[:2] == [5, 5]
    assert tokenizer.decode(ids) == "hi hi é"
    assert tokenizer.decode(ids, begins=False) == " hi hi é"
    assert b"".join(map(tokenizer.token_bytes, ids)) == " hi hi é".encode()


def word_pieces() -> Tokenizer:
    """A vocabulary whose decoder wants to see a token's neighbours."""
    vocabulary = {"[UNK]": 0, "hi": 1, "##hi": 2, "é": 3, "##é": 4}
    model = {"type": "WordPiece", "vocab": vocabulary, "unk_token": "[UNK]"}
    model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    return Tokenizer(build({"model": model, "decoder": decoder, "pre_tokenizer": {"type": "Whitespace"}}))


def test_another_decoder_is_followed() -> None:
    tokenizer = word_pieces()
    assert not tokenizer.joins_bytes
    assert tokenizer.decode(tokenizer.encode("hihié hi", special=False)) == "hihié hi"
