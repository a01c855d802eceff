"""Configurations become the right shape, or are refused by the name of the field."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.models.config import Rope, RopeScaling, ScalingKind, TransformerConfig
from engine.models.families import FAMILIES, from_config_json, from_gguf
from engine.weights.errors import CheckpointError
from tests.engine.weights.gguf_bytes import TINY_METADATA

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def rope(config: TransformerConfig) -> Rope:
    """Of all layers."""
    (found,) = {layer.rope for layer in config.layers}
    assert found is not None
    return found


def test_config_json() -> None:
    config = from_config_json(LLAMA | {"rope_theta": 5e5, "pretraining_tp": 1, "auto_map": {"x": "y.Z"}})
    assert (config.num_kv_heads, config.head_dim, config.num_layers) == (2, 8, 2)
    assert rope(config) == Rope(theta=5e5, num_rotated=8)
    assert config.tie_embeddings
    assert from_config_json(LLAMA | {"head_dim": 16}).head_dim == 16
    assert from_config_json(LLAMA | {"num_key_value_heads": None}).num_kv_heads == 8


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    ],
)
def test_both_spellings_of_the_rotary_settings(written: dict[str, Any]) -> None:
    config = from_config_json(LLAMA | written)
    assert rope(config).theta == 5e5
    assert rope(config).scaling == RopeScaling(
        kind=ScalingKind.LLAMA3,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )


def test_the_older_word_for_the_kind_of_scaling() -> None:
    config = from_config_json(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert rope(config).scaling == RopeScaling(kind=ScalingKind.LINEAR, factor=2.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"architectures": ["OtherForCausalLM"], "auto_map": {"AutoModel": "evil.Model"}},
            "OtherForCausalLM",
        ),
        ({"architectures": None, "model_type": None}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"rope_scaling": {"rope_type": "other", "factor": 4.0}}, "rope_scaling.rope_type = 'other'"),
        ({"rope_parameters": {"rope_type": ["yarn"], "factor": 4.0}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"rope_type": "linear", "twist": 4.0}}, "rope_parameters.twist = 4.0"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks rope_scaling.factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size = '64'"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers = 1073741824"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta = 1000"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"num_key_value_heads": 3}, "8 attention heads"),
        ({"head_dim": 7}, "head size 7"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_config_json(LLAMA | change)
    assert named in str(caught.value)
    assert len(str(caught.value)) < 400


def test_gguf_metadata() -> None:
    config = from_gguf(TINY_METADATA | {"llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06})
    assert (config.hidden_size, config.num_heads, config.head_dim, config.vocab_size) == (32, 4, 8, 4)
    assert config.rms_norm_eps == 1e-5


def test_gguf_factors_of_the_rotary_frequencies() -> None:
    factors = (1.0, 1.0, 1.5, 8.0)
    config = from_gguf(TINY_METADATA, factors={"rope_freqs.weight": factors})
    assert rope(config).scaling == RopeScaling(kind=ScalingKind.FACTORS, factors=factors)
    for wrong in (factors[:3], (*factors[:3], 0.0), (*factors[:3], float("nan"))):
        with pytest.raises(CheckpointError, match="rope_freqs"):
            from_gguf(TINY_METADATA, factors={"rope_freqs.weight": wrong})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"general.architecture": "mamba"},
            "general.architecture = 'mamba' is not supported; these are: llama",
        ),
        ({"llama.expert_count": 8}, "lacks llama.expert_used_count"),
        ({"llama.expert_group_count": 8}, "llama.expert_group_count = 8"),
        ({"llama.attention.sliding_window": 128}, "llama.attention.sliding_window"),
        ({"llama.rope.scaling.type": "other"}, "llama.rope.scaling.type = 'other'"),
        ({"llama.rope.scaling.type": "yarn"}, "lacks llama.rope.scaling.factor"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count = 4"),
        ({"llama.block_count": (1, 2)}, "block_count"),
    ],
)
def test_gguf_metadata_that_is_not_supported(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_gguf(TINY_METADATA | change)
    assert named in str(caught.value)


@pytest.mark.parametrize("architectures", [None, [], ...], ids=["null", "empty", "missing"])
def test_without_architectures_the_model_type_tells_the_family(architectures: Any) -> None:
    config = LLAMA | {"architectures": architectures}
    if architectures is ...:
        del config["architectures"]
    assert from_config_json(config) == from_config_json(LLAMA)
    with pytest.raises(
        CheckpointError, match=r"model_type = 'gpt2' is not supported; these are: llama, mistral"
    ):
        from_config_json(config | {"model_type": "gpt2"})
    with pytest.raises(CheckpointError, match="architectures"):
        from_config_json({name: value for name, value in config.items() if name != "model_type"})


def test_a_known_model_type_excuses_no_other_architecture() -> None:
    with pytest.raises(CheckpointError, match="LlamaForSequenceClassification"):
        from_config_json(LLAMA | {"architectures": ["LlamaForSequenceClassification"]})


def test_model_types_are_those_of_transformers() -> None:
    ours = {family.model_type: family.architecture for family in FAMILIES}
    assert len(ours) == len(FAMILIES)
    assert ours.pop("mimo") == "MiMoForCausalLM"  # whose code comes with the checkpoint
    assert ours == {name: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in ours}
