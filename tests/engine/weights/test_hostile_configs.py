"""Whatever a configuration says, it becomes a shape that can be computed, or one line."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.models.config import TransformerConfig
from engine.models.context import for_context
from engine.models.families import from_config_json, from_gguf
from engine.models.gguf_families import GGUF_FAMILIES
from engine.models.rotary import Rotary
from engine.weights.errors import CheckpointError
from tests.engine.weights import test_published as published

CONFIGS = [
    value | {"moe_layers": []}  # of Llama 4, only models without experts get any further
    for value in vars(published).values()
    if isinstance(value, dict) and "architectures" in value
]
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        (0, 1, 2, -1, 3, 16, 2**31, 2**70, 10**400, 5e-324, 0.0, 1.0, -0.5, 1e-300, 1e308, math.inf, math.nan)
    ),
    st.sampled_from(("", "yarn", "linear", "dynamic", "longrope", "llama3", "full_attention")),
    st.lists(st.one_of(st.integers(-2, 3), st.just("sliding_attention"), st.none()), max_size=3),
    st.dictionaries(st.sampled_from(("rope_type", "factor", "sliding_attention")), st.just("x"), max_size=2),
)
ROTARY = (
    "rope_type", "type", "factor", "rope_theta", "partial_rotary_factor", "short_factor", "long_factor",
    "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip
SIZES = {
    "block_count": 4, "context_length": 512, "embedding_length": 48, "feed_forward_length": 56,
    "vocab_size": 131, "attention.head_count": 4, "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5, "attention.sliding_window": 0,
}  # fmt: skip
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24}


def written(architecture: str) -> dict[str, Any]:
    fields = SIZES | (EXPERTS if architecture in ("qwen3moe", "gpt-oss") else {})
    return {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in fields.items()},
    }


GGUF = {family.architecture: written(family.architecture) for family in GGUF_FAMILIES}
GGUF_KEYS = (
    "block_count", "context_length", "embedding_length", "attention.head_count", "attention.key_length",
    "attention.sliding_window", "attention.sliding_window_pattern", "expert_count", "expert_used_count",
    "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_log_multiplier", "attn_logit_softcapping",
    "final_logit_softcapping", "feed_forward_length",
)  # fmt: skip


def assert_computable(shape: TransformerConfig) -> None:
    shape = for_context(shape, shape.max_positions)
    for rope in {layer.rope for layer in shape.layers if layer.rope is not None}:
        if rope.num_rotated <= 4096:
            cos, sin = Rotary(rope, torch.device("cpu"))(torch.tensor([0, 1, 100]))
            assert cos.shape == sin.shape == (3, 1, rope.num_rotated // 2)


def test_what_the_others_begin_with_is_accepted() -> None:
    for config in CONFIGS:
        from_config_json(config)
    for metadata in GGUF.values():
        from_gguf(metadata)


def read(function: Any, *arguments: Any) -> None:
    said = ""
    try:
        assert_computable(function(*arguments))
    except CheckpointError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 300


@pytest.mark.parametrize("name", ["beta_fast", "beta_slow"])
@pytest.mark.parametrize("turns", [5e-324, 1e308])
def test_bounds_of_yarn_that_no_product_holds(name: str, turns: float) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, name: turns}
    assert_computable(from_config_json(published.QWEN2_5_7B | {"rope_scaling": scaling}))


def test_more_heads_than_numbers() -> None:
    """Gemma's largest models scale attention by hidden size over heads."""
    sizes = {"block_count": 46, "embedding_length": 2, "attention.key_length": 16}
    fields = GGUF["gemma2"] | {f"gemma2.{key}": value for key, value in sizes.items()}
    assert from_gguf(fields).attention_scale == 1.0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_config_json(data: st.DataObject) -> None:
    config = dict(data.draw(st.sampled_from(CONFIGS)))
    for name in data.draw(st.lists(st.sampled_from(sorted(config)[1:]), max_size=3)):
        config[name] = data.draw(JUNK)
    if data.draw(st.booleans()):
        rope = config.get("rope_scaling")
        rope = (
            dict(rope)
            if isinstance(rope, dict)
            else {"rope_type": data.draw(st.sampled_from(("yarn", "linear", "dynamic", "llama3")))}
        )
        for name in data.draw(st.lists(st.sampled_from(ROTARY), max_size=4)):
            rope[name] = data.draw(JUNK)
        config[data.draw(st.sampled_from(("rope_scaling", "rope_parameters")))] = rope
    read(from_config_json, config)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_gguf_metadata(data: st.DataObject) -> None:
    metadata = dict(GGUF[data.draw(st.sampled_from(sorted(GGUF)))])
    prefix = metadata["general.architecture"]
    for name in data.draw(st.lists(st.sampled_from(GGUF_KEYS), max_size=5)):
        value = data.draw(JUNK)
        metadata[f"{prefix}.{name}"] = tuple(value) if isinstance(value, list) else value
    factors = {}
    if data.draw(st.booleans()):
        factors["rope_freqs.weight"] = tuple(data.draw(st.lists(st.floats(width=32), max_size=6)))
    read(from_gguf, metadata, (), factors)
