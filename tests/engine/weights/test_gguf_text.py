"""What GGUF metadata says about text: end tokens by name and by text, templates, defaults of sampling."""

from __future__ import annotations

from typing import Any

import gguf
import pytest

from engine.weights import gguf_text

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def vocabulary(*tokens: tuple[str, int], **ids: int) -> dict[str, Any]:
    texts, kinds = zip(*tokens, strict=True)
    named = {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()}
    return {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": kinds, **named}


def test_ends_are_named_or_known_by_their_text() -> None:
    gemma = vocabulary(("<eos>", CONTROL), ("a", NORMAL), ("<end_of_turn>", USER_DEFINED), eos=0)
    assert gguf_text.end_ids(gemma) == (0, 2)
    llama = vocabulary(("<|end_of_text|>", CONTROL), ("<|eot_id|>", CONTROL), ("<|eom_id|>", CONTROL), eos=1)
    assert gguf_text.end_ids(llama) == (1, 0, 2)
    assert gguf_text.end_ids(vocabulary(("<EOT>", NORMAL), eos=0, eot=3, eom=4)) == (0, 3, 4)
    assert gguf_text.end_ids({}) == ()
    assert gguf_text.end_ids({"tokenizer.ggml.model": "llama"}) == (2,)


def test_in_harmony_the_end_of_a_message_is_not_the_end() -> None:
    tokens = [(text, CONTROL) for text in ("<|return|>", "<|end|>", "<|call|>", "<|endoftext|>")]
    assert gguf_text.end_ids(vocabulary(*tokens, eos=0)) == (0, 2, 3)
    assert gguf_text.end_ids(vocabulary(*tokens[1:2])) == (0,)


def test_special_tokens_have_the_words_of_templates() -> None:
    metadata = vocabulary(
        ("<s>", CONTROL), ("</s>", CONTROL), ("<unk>", CONTROL), bos=0, eos=1, unknown=2, padding=9
    )
    assert gguf_text.special_tokens(metadata) == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }


@pytest.mark.parametrize("value", [-1, 2**32 - 1, "0", True, 1.0, (1,)])
def test_an_id_that_is_none_is_absent(value: Any) -> None:
    assert gguf_text.token_id({"tokenizer.ggml.bos_token_id": value}, "bos") is None


def test_templates_have_names() -> None:
    key = gguf.Keys.Tokenizer
    metadata = {
        key.CHAT_TEMPLATE: "a",
        key.CHAT_TEMPLATE_N.format(name="tool_use"): "b",
        key.CHAT_TEMPLATE_N.format(name="rag"): 5,
        key.CHAT_TEMPLATE_N.format(name="\x1b[31m"): "escapes for the terminal that lists it",
        key.CHAT_TEMPLATES: ("tool_use",),
    }
    assert gguf_text.chat_templates(metadata) == {"default": "a", "tool_use": "b"}
    assert gguf_text.chat_templates({}) == {}


def test_sampling_is_named_as_in_generation_config() -> None:
    key = gguf.Keys.General
    metadata = {
        key.SAMPLING_TEMP: 0.6000000238418579,
        key.SAMPLING_TOP_K: 20,
        key.SAMPLING_TOP_P: 0.949999988079071,
        key.SAMPLING_MIN_P: 0.0,
        key.SAMPLING_PENALTY_REPEAT: 1.100000023841858,
        key.SAMPLING_MIROSTAT: 1,
    }
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.1}
    assert gguf_text.generation(metadata) == expected
