"""What the metadata of a GGUF file says about text: special and end tokens, chat templates, defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.weights.folder_text import TEMPLATE_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.weights.gguf import Value

# What GGUF calls the special tokens, and the words of chat templates for them.
SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "eot": "eot",
    "eom": "eom",
    "unknown": "unk",
    "padding": "pad",
    "seperator": "sep",  # spelt so in the format
    "mask": "mask",
}
_ENDS = ("eos", "eot", "eom")
# Files name one end token, seldom two; the others are known by their texts.
_END_TEXTS = frozenset(
    {
        "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>",
        "<end_of_turn>", "<|end|>", "<|return|>", "<|call|>", "<EOT>", "_<EOT>", "<end_of_utterance>",
    }
)  # fmt: skip
_UNNAMED_EOS = {"llama": 2, "t5": 1}  # by tokenizer.ggml.model, where no id is named (llama.cpp)
# In GPT-OSS's format <|end|> ends a message, after which the model goes on.
_HARMONY = frozenset({"<|return|>", "<|call|>"})
_ADDED = (3, 4)  # control, user-defined: the types of tokens that are no plain text
_TEMPLATE = "tokenizer.chat_template"
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def token_id(metadata: Mapping[str, Value], name: str) -> int | None:
    """The id of a special token by GGUF's name for it; None where there is none."""
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return value if type(value) is int and 0 <= value < 2**31 else None


def special_tokens(metadata: Mapping[str, Value]) -> dict[str, str]:
    """ "bos_token" and its like -> text."""
    texts = _strings(metadata.get("tokenizer.ggml.tokens"))
    named = ((word, token_id(metadata, name)) for name, word in SPECIAL.items())
    return {
        f"{word}_token": texts[token] for word, token in named if token is not None and token < len(texts)
    }


def end_ids(metadata: Mapping[str, Value]) -> tuple[int, ...]:
    """The tokens that end a text or a turn: those that are named, then those known by their text."""
    texts, kinds = _strings(metadata.get("tokenizer.ggml.tokens")), metadata.get("tokenizer.ggml.token_type")
    named = [token for name in _ENDS if (token := token_id(metadata, name)) is not None]
    if token_id(metadata, "eos") is None and metadata.get("tokenizer.ggml.model") in _UNNAMED_EOS:
        named.append(_UNNAMED_EOS[str(metadata["tokenizer.ggml.model"])])
    if not isinstance(kinds, tuple):
        return tuple(dict.fromkeys(named))
    added = ((texts[token], token) for token in range(min(len(kinds), len(texts))) if kinds[token] in _ADDED)
    by_text = {text: token for text, token in added if text in _END_TEXTS}
    if by_text.keys() >= _HARMONY:
        by_text.pop("<|end|>", None)
    return tuple(dict.fromkeys([*named, *by_text.values()]))


def chat_templates(metadata: Mapping[str, Value]) -> dict[str, str]:
    """Templates by name; the usual one is "default"."""
    found = {}
    for key, value in metadata.items():
        if isinstance(value, str) and (key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")):
            name = key.removeprefix(_TEMPLATE).removeprefix(".") or "default"
            if TEMPLATE_NAME.fullmatch(name):
                found[name] = value
    return found


def generation(metadata: Mapping[str, Value]) -> dict[str, Value]:
    """Defaults of sampling, by the names of generation_config.json."""
    return {name: _decimal(metadata[key]) for key, name in _SAMPLING.items() if key in metadata}


def _decimal(value: Value) -> Value:
    """GGUF keeps 32 bits: 0.60000002384 was written for 0.6."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _strings(value: Value | None) -> tuple[str, ...]:
    return value if isinstance(value, tuple) and value and isinstance(value[0], str) else ()
