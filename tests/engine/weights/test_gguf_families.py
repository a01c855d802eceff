"""What GGUF metadata leaves out follows from the architecture, as llama.cpp has it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.models.config import Layer, QKNorm, Rope, ScalingKind, TemperatureTuning, TransformerConfig
from engine.models.families import from_gguf
from engine.weights.errors import CheckpointError

SIZES = {
    "block_count": 8, "context_length": 4096, "embedding_length": 96, "feed_forward_length": 64,
    "vocab_size": 100, "attention.head_count": 4, "attention.head_count_kv": 2,
    "attention.key_length": 32, "attention.value_length": 32,
    "attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
}  # fmt: skip


def read(
    architecture: str,
    fields: dict[str, Any] | None = None,
    tensors: tuple[str, ...] = (),
    factors: dict[str, tuple[float, ...]] | None = None,
) -> TransformerConfig:
    own = {f"{architecture}.{key}": value for key, value in (SIZES | (fields or {})).items()}
    return from_gguf({"general.architecture": architecture, **own}, tensors, factors)


def rope(layer: Layer) -> Rope:
    assert layer.rope is not None
    return layer.rope


def test_gemma_scales_attention_by_the_head_except_in_its_largest_models() -> None:
    window = {"attention.sliding_window": 64}
    for architecture, largest in (("gemma2", 46), ("gemma3", 62)):
        small = read(architecture, window)
        large = read(architecture, window | {"block_count": largest})
        assert small.attention_scale == 32**-0.5
        assert large.attention_scale == (96 // 4) ** -0.5
        assert not small.norm_offset, "files have it added"
        assert small.embedding_scale == math.sqrt(96)


def test_gemma_2_has_caps_and_a_window_by_default() -> None:
    shape = read("gemma2")
    assert (shape.attention_soft_cap, shape.logit_soft_cap) == (50.0, 30.0)
    assert [layer.window for layer in shape.layers[:3]] == [4096, 0, 4096]


def test_gemma_3_stretches_the_positions_of_global_layers_only() -> None:
    fields = {
        "attention.sliding_window": 64, "rope.freq_base": 1e6, "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }  # fmt: skip
    shape = read("gemma3", fields)
    assert [layer.window for layer in shape.layers] == [64] * 5 + [0] + [64] * 2
    assert rope(shape.layers[0]) == Rope(theta=10000.0, num_rotated=32)
    stretched = rope(shape.layers[5])
    assert stretched.theta == 1e6
    assert stretched.scaling is not None
    assert (stretched.scaling.kind, stretched.scaling.factor) == (ScalingKind.LINEAR, 8.0)
    assert (shape.attention_soft_cap, shape.logit_soft_cap) == (0.0, 0.0)
    assert len(set(read("gemma3").layers)) == 1, "no window, no local layers"


def test_what_images_need_is_no_part_of_the_text() -> None:
    """Google's own files of Gemma 3 say it beside the text model; the tensors lie in another file."""
    text = {"attention.sliding_window": 64}
    images = {"mm.tokens_per_image": 256, "vision.block_count": 27, "vision.attention.head_count": 16}
    assert read("gemma3", text | images) == read("gemma3", text)


def test_a_file_may_say_which_layers_are_local() -> None:
    fields = {"attention.sliding_window": 64, "attention.sliding_window_pattern": 3}
    assert [layer.window for layer in read("gemma3", fields).layers[:4]] == [64, 64, 0, 64]
    fields["attention.sliding_window_pattern"] = (True, False) * 4  # type: ignore[assignment]
    assert [layer.window for layer in read("gemma3", fields).layers[:4]] == [64, 0, 64, 0]
    fields["attention.sliding_window_pattern"] = (True, False)  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="8 values are needed"):
        read("gemma3", fields)


def test_smollm_3_has_no_positions_in_every_fourth_layer() -> None:
    layers = read("smollm3").layers
    assert [layer.rope is None for layer in layers] == [False, False, False, True] * 2


def test_llama_4_chunks_unless_its_window_is_0() -> None:
    chunked = read("llama4")
    assert [(layer.chunk, layer.rope is None) for layer in chunked.layers[2:4]] == [(8192, False), (0, True)]
    assert chunked.temperature_tuning == TemperatureTuning(floor=8192, scale=0.1)
    plain = read("llama4", {"attention.sliding_window": 0})
    assert set(plain.layers) == {Layer(rope=Rope(theta=10000.0, num_rotated=32))}
    assert plain.temperature_tuning is None
    assert plain.qk_norm is QKNorm.UNIT
    with pytest.raises(CheckpointError, match="expert_count = 16"):
        read("llama4", {"expert_count": 16}, ("blk.0.ffn_gate_inp.weight",))


def test_phi_3_takes_its_window_and_its_two_lists_of_factors() -> None:
    fields = {
        "attention.sliding_window": 2047, "rope.dimension_count": 24, "context_length": 131072,
        "rope.scaling.original_context_length": 4096, "rope.scaling.attn_factor": 1.1902380714238083,
    }  # fmt: skip
    factors = {"rope_factors_short.weight": (1.0,) * 12, "rope_factors_long.weight": (2.0,) * 12}
    shape = read("phi3", fields, factors=factors)
    found = rope(shape.layers[0])
    assert (shape.layers[0].window, found.num_rotated) == (2047, 24)
    assert found.scaling is not None
    assert (found.scaling.kind, found.scaling.long_factors) == (ScalingKind.LONGROPE, (2.0,) * 12)
    assert found.scaling.attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))
    with pytest.raises(CheckpointError, match=r"rope_factors_short.* 12 numbers"):
        read("phi3", fields, factors=factors | {"rope_factors_short.weight": (1.0,)})


@pytest.mark.parametrize(
    ("change", "attention"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"rope.scaling.yarn_log_multiplier": 1.0}, 1.0),
        ({"rope.scaling.yarn_attn_factor": 0.75}, 0.75),
        ({"rope.scaling.attn_factor": 0.5}, 0.5 * (0.1 * math.log(4) + 1)),
    ],
)
def test_yarn(change: dict[str, Any], attention: float) -> None:
    fields = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 4096,
    }  # fmt: skip
    shape = read("qwen3", fields | change)
    scaling = rope(shape.layers[0]).scaling
    assert scaling is not None
    assert scaling.attention_factor == pytest.approx(attention, rel=1e-6)
    assert shape.max_positions == 4 * 4096
    assert scaling.truncate
    with pytest.raises(CheckpointError, match="yarn_ext_factor"):
        read("qwen3", fields | {"rope.scaling.yarn_ext_factor": 0.5})


def test_gpt_oss_does_not_round_the_bounds_of_yarn() -> None:
    fields = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "expert_count": 4, "expert_used_count": 2,
        "rope.scaling.original_context_length": 4096, "expert_feed_forward_length": 64,
        "attention.sliding_window": 128,
    }  # fmt: skip
    shape = read("gpt-oss", fields, tuple(f"blk.{index}.ffn_gate_inp.weight" for index in range(8)))
    scaling = rope(shape.layers[0]).scaling
    assert scaling is not None
    assert not scaling.truncate
    assert [layer.window for layer in shape.layers[:2]] == [128, 0]
    assert all(layer.experts for layer in shape.layers)


def test_tensors_say_what_metadata_does_not() -> None:
    biases = tuple(f"blk.0.{name}.bias" for name in ("attn_q", "attn_output", "ffn_up"))
    shape = read("llama", tensors=("output.weight", *biases))
    assert (shape.qkv_bias, shape.out_bias, shape.mlp_bias, shape.tie_embeddings) == (True, True, True, False)
    assert read("llama").tie_embeddings


@pytest.mark.parametrize(
    ("architecture", "change", "named"),
    [
        ("qwen3moe", {}, "lacks qwen3moe.expert_count"),
        ("qwen3moe", {"expert_count": 4, "expert_used_count": 8}, "8 experts per token of 4"),
        ("gpt-oss", {"expert_count": 4, "expert_used_count": 2, "expert_gating_func": 2}, "gating_func = 2"),
        ("olmo2", {"attention.sliding_window": 4096}, "olmo2.attention.sliding_window = 4096"),
        ("qwen2", {"attention.value_length": 16}, "qwen2.attention.value_length = 16"),
        ("qwen2", {"rope.dimension_count": 16}, "qwen2.rope.dimension_count = 16"),
        ("llama", {"attention.scale": 0.5}, "llama.attention.scale = 0.5"),
        ("llama", {"block_count": 2000}, "llama.block_count = 2000 is not supported; the limit is 1024"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    architecture: str, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(architecture, change)
    assert named in str(caught.value)
