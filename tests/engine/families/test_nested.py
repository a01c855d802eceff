"""The text model within one that also sees: Gemma 3 as it is published."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.engine.families.references import CASES, SIZES, VOCAB, make_spiky
from tests.engine.families.served import serve

if TYPE_CHECKING:
    from pathlib import Path

VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def model_that_sees() -> Gemma3ForConditionalGeneration:
    torch.manual_seed(3)
    text = SIZES | CASES["gemma3"].fields
    config = Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config).eval().float()
    make_spiky(model.model.language_model)
    return model


def test_the_text_model_is_served(tmp_path: Path) -> None:
    model = model_that_sees()
    model.save_pretrained(tmp_path)
    prompt = list(range(3, 70))
    (text,) = serve(tmp_path, [prompt], step_tokens=23, num_tokens=8)
    with torch.inference_mode():
        expected = model(torch.tensor([text.tokens])).logits[0, :-1]
    torch.testing.assert_close(text.logits, expected, atol=1e-4, rtol=1e-4)


def test_every_place_of_the_text_model_among_the_tensors(tmp_path: Path) -> None:
    """transformers 5 writes `model.language_model.`, earlier ones `language_model.model.`"""
    model_that_sees().save_pretrained(tmp_path)
    (first,) = serve(tmp_path, [[5, 6, 7, 8]], step_tokens=64, num_tokens=2)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    prefixes = ("model.language_model.", "language_model.model.")
    written = next(prefix for prefix in prefixes if prefix + "norm.weight" in tensors)
    other = next(prefix for prefix in prefixes if prefix != written)
    save_file({name.replace(written, other): value for name, value in tensors.items()}, path)
    (second,) = serve(tmp_path, [[5, 6, 7, 8]], step_tokens=64, num_tokens=2)
    assert torch.equal(first.logits, second.logits)


def test_fields_that_the_published_files_leave_out(tmp_path: Path) -> None:
    """They have the values of the configuration's class."""
    from engine.checkpoint import locate

    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "model_type": "gemma3_text"}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    shape = locate(str(tmp_path)).transformer
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (8, 4, 256)
    assert (shape.vocab_size, shape.max_positions, shape.tie_embeddings) == (262208, 131072, True)
    assert [layer.window for layer in shape.layers[:7]] == [1024] * 5 + [0, 1024]
    assert shape.layers[5].rope is not None
    assert shape.layers[5].rope.theta == 1e6
