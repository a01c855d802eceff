"""Folders: every file that can hold a vocabulary, what it lacks, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import CheckpointError
from engine.vocabulary import byte_level, document
from engine.vocabulary.folder import from_folder
from server.tokenizer import Tokenizer
from tests.engine.vocabulary.test_sentencepiece import VECTORS, cases

ALPHABET = {char: index for index, char in enumerate(byte_level._BYTE_OF)}
ROWS = 300


def tokenizer_json(**change: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {**ALPHABET, "ab": 256}, "merges": ["a b"]}
    steps = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    usual = {"version": "1.0", "model": model, "pre_tokenizer": steps, "decoder": steps}
    return {**usual, "added_tokens": [added("<s>", 257)], **change}


def added(content: str, token: int, *, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": token, "content": content, "special": special, **flags}


def write(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def read(folder: Path, rows: int = ROWS) -> Tokenizer:
    return Tokenizer(from_folder(folder, rows))


def test_added_tokens_of_other_files_are_put_in(tmp_path: Path) -> None:
    decoder = {"258": added("<|im_end|>", 0), "257": added("<other>", 0)}
    write(
        tmp_path,
        tokenizer__json=tokenizer_json(),
        tokenizer_config__json={"added_tokens_decoder": decoder, "eos_token": {"content": "<|eot|>"}},
        added_tokens__json={"<|eot|>": 259, "<think>": 260, "<s>": 257},
    )
    with pytest.raises(CheckpointError, match="the same id"):
        read(tmp_path)
    del decoder["257"]
    write(tmp_path, tokenizer_config__json={"added_tokens_decoder": decoder, "eos_token": "<|eot|>"})
    tokenizer = read(tmp_path)
    assert tokenizer.special_texts.texts == ("<s>", "<|im_end|>", "<|eot|>")
    assert tokenizer.encode("<s>ab<|eot|><think>", special=True) == [257, 256, 259, 260]
    assert tokenizer.encode("<think>ab", special=False) == [260, 256]


def test_added_tokens_need_not_follow_one_another(tmp_path: Path) -> None:
    entries = [added("<x>", 290, special=False), added("<y>", 270)]
    tokenizer = read(write(tmp_path, tokenizer__json=tokenizer_json(added_tokens=entries)))
    assert tokenizer.encode("<x><y>", special=True) == [290, 270]
    assert tokenizer.encode("<x>ab", special=False) == [290, 256]
    assert tokenizer.vocab_size == 291  # every id is below it


def test_added_tokens_without_a_row_are_forgotten(tmp_path: Path) -> None:
    write(tmp_path, tokenizer__json=tokenizer_json(added_tokens=[added("<s>", 257), added("[PAD]", 258)]))
    assert read(tmp_path, rows=258).special_texts.texts == ("<s>",)
    with pytest.raises(CheckpointError, match="token 256 'ab' is beyond the model's vocabulary of 256"):
        read(tmp_path, rows=256)


@pytest.mark.parametrize("kind", ["bpe", "bpe_no_prefix", "unigram"])
def test_a_lone_tokenizer_model_is_read(kind: str, tmp_path: Path) -> None:
    shutil.copy(VECTORS / f"{kind}.model", tmp_path / "tokenizer.model")
    write(
        tmp_path, added_tokens__json={"<|im_end|>": 700}, tokenizer_config__json={"eos_token": "<|im_end|>"}
    )
    if kind == "bpe":
        tokenizer = read(tmp_path, rows=701)
        assert tokenizer.encode("<|im_end|>", special=True) == [700]
    else:
        (tmp_path / "added_tokens.json").unlink()
        tokenizer = read(tmp_path, rows=701)
    assert (tokenizer.add_bos, tokenizer.bos_token_id) == (True, 1)
    for case in cases(kind)[:100]:
        assert tokenizer.encode(case["text"], special=False) == case["ids"]


def test_vocab_and_merges_of_a_known_class_are_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        vocab__json={**ALPHABET, "ab": 256},
        merges__txt="#version: 0.2\na b\n",
        tokenizer_config__json={
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": {"257": added("<|im_end|>", 0)},
        },
    )
    tokenizer = read(tmp_path)
    assert tokenizer.encode("ab12<|im_end|>", special=True) == [256, ALPHABET["1"], ALPHABET["2"], 257]
    assert not tokenizer.add_bos
    write(tmp_path, tokenizer_config__json={"tokenizer_class": "OtherTokenizer"})
    with pytest.raises(
        CheckpointError, match=r"'OtherTokenizer' without tokenizer\.json .* save the tokeniser"
    ):
        read(tmp_path)


def unigram(**change: Any) -> dict[str, Any]:
    vocabulary = [
        ["<unk>", 0.0],
        ["</s>", 0.0],
        ["a", -1.0],
        ["<", -2.0],
        ["/", -2.0],
        ["s", -2.0],
        [">", -2.0],
    ]
    entries = [added("<unk>", 0), added("</s>", 1)]
    return {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary}, "added_tokens": entries, **change,
    }  # fmt: skip


def test_unigrams_special_tokens_are_no_pieces_of_text(tmp_path: Path) -> None:
    tokenizer = read(write(tmp_path, tokenizer__json=unigram()))
    assert tokenizer.encode("a</s>", special=True) == [2, 1]
    assert tokenizer.encode("a</s>", special=False) == [2, 3, 4, 5, 6]


def test_a_special_token_of_one_character_is_that_character(tmp_path: Path) -> None:
    entries = [added("a", ALPHABET["a"]), added("aa", 257)]
    tokenizer = read(write(tmp_path, tokenizer__json=tokenizer_json(added_tokens=entries)))
    assert tokenizer.encode("aab", special=True) == [257, ALPHABET["b"]]
    assert tokenizer.encode("aab", special=False) == [ALPHABET["a"], 256]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ({}, "there is no 'model'"),
        (tokenizer_json(model={"type": "Magic"}), "model type 'Magic'"),
        (tokenizer_json(model={"type": "BPE", "vocab": [], "merges": []}), "does not map texts to ids"),
        (tokenizer_json(model={"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}), "the same id"),
        (tokenizer_json(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}), "negative"),
        (tokenizer_json(model={"type": "BPE", "vocab": {"a": "x"}, "merges": []}), "does not map"),
        (tokenizer_json(model={"type": "BPE", "vocab": {}, "merges": [["a", 1]]}), "the vocabulary"),
        (tokenizer_json(model={"type": "BPE", "vocab": {}, "merges": ["a b c"]}), "not a list of pairs"),
        (tokenizer_json(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}), "out of vocabulary"),
        (tokenizer_json(model={"type": "BPE", "vocab": {}, "merges": [], "unk_token": 5}), "the vocabulary"),
        (tokenizer_json(added_tokens=[{"content": "x"}]), "has no id"),
        (tokenizer_json(added_tokens=[{"id": 3}]), "has no content"),
        (tokenizer_json(added_tokens=[added("a", 280)]), "added token 'a' is 280"),
        (tokenizer_json(added_tokens={}, decoder={"type": "Nothing"}), "the vocabulary"),
        (tokenizer_json(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}), "the vocabulary"),
        (unigram(model={"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}), "the vocabulary"),
        (unigram(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", "b"]]}), "not a list of"),
        (unigram(normalizer={"type": "Precompiled", "precompiled_charsmap": "////"}), "the vocabulary"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, value: Any, named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(write(tmp_path, tokenizer__json=value))
    assert named in str(caught.value)
    assert str(caught.value).startswith("tokenizer.json")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_vocabulary_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: there is no tokenizer\.json; save the tokeniser"):
        read(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: it is damaged"):
        read(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**33), 2**33) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MODEL_KEYS = ["type", "vocab", "merges", "unk_token", "byte_fallback", "ignore_merges", "unk_id", "fuse_unk"]
TOP_KEYS = ["model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation"]


@settings(max_examples=400, deadline=None)
@given(
    top=st.dictionaries(st.sampled_from(TOP_KEYS), json_values, max_size=2),
    model=st.dictionaries(st.sampled_from(MODEL_KEYS), json_values, max_size=2),
    base=st.sampled_from([tokenizer_json, unigram]),
)
def test_hostile_documents_are_read_or_refused(top: Any, model: Any, base: Any) -> None:
    made = json.loads(json.dumps(base()))
    made["model"] |= model
    made |= top
    with contextlib.suppress(CheckpointError):
        document.drop_beyond(made, ROWS)
        Tokenizer(document.build(made)).encode("a b<s>", special=False)
