"""Builds `tokenizers.Tokenizer` from what a checkpoint has: a tokenizer.json, or a GGUF vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from engine.checkpoint import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine.weights.gguf import Value

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types
_MAX_TOKENIZER_BYTES = 256 * 2**20

_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(*, gpt2_words: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_words)


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, _byte_level(gpt2_words=False)])


def _digits_one_by_one() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level(gpt2_words=True)]
    )


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    """How a text is cut before the merges, by GGUF's name for it; None when it is not known here."""
    if name in ("smollm", "starcoder", "refact", "command-r"):
        return _digits_one_by_one()
    if name in ("gpt-2", "default"):
        return _byte_level(gpt2_words=True)
    if name in _LLAMA3_NAMES:
        return _words(_LLAMA3)
    return _words(_QWEN2) if name == "qwen2" else None


def from_json(path: Path) -> Tokenizer:
    """Load tokenizer.json, without what would cut, pad or vary the ids. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: the tokeniser's file is missing")
    if path.stat().st_size > _MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{path}: more than {_MAX_TOKENIZER_BYTES} bytes")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path}: {str(error).splitlines()[0][:200]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    return tokenizer


def from_gguf(metadata: Mapping[str, Value]) -> Tokenizer:
    """Byte-level BPE from a GGUF vocabulary. Raises CheckpointError for any other kind."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(f"tokenizer.ggml.model = {str(kind)[:80]!r} is not supported (only 'gpt2' is)")
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    pre_tokenizer = _pre_tokenizer(pre)
    if pre_tokenizer is None:
        raise CheckpointError(f"tokenizer.ggml.pre = {pre[:80]!r} is not supported")
    tokens, merges = _texts(metadata, "tokens"), _texts(metadata, "merges")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [_pair(merge) for merge in merges]
    try:
        # Llama 3 takes a word that is a token as it is, also where no merges lead to it.
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in _LLAMA3_NAMES)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"tokenizer.ggml.merges: {str(error).splitlines()[0][:200]}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, tokens, metadata)
    return tokenizer


def _add_special(tokenizer: Tokenizer, tokens: tuple[str, ...], metadata: Mapping[str, Value]) -> None:
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    if not isinstance(kinds, tuple) or len(kinds) not in (0, len(tokens)):
        raise CheckpointError("tokenizer.ggml.token_type does not match tokenizer.ggml.tokens in length")
    added = [
        AddedToken(text, special=kind == _CONTROL, normalized=False)
        for text, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED) and text
    ]
    tokenizer.add_tokens(added)


def _texts(metadata: Mapping[str, Value], name: str) -> tuple[str, ...]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, tuple) or not value or not isinstance(value[0], str):
        raise CheckpointError(f"tokenizer.ggml.{name} is missing or not a list of strings")
    return value


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
