"""Folders with block-diffusion drafters of random weights, by their published names."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from tests.engine.tiny import TINY

HIDDEN, VOCAB = TINY.hidden_size, TINY.vocab_size
HEADS, KV_HEADS, SIZE, WIDE = 4, 2, 12, 40
BASE = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "attention_bias": False,
    "block_size": 6,
    "head_dim": SIZE,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "layer_types": ["full_attention"] * 2,
    "max_position_embeddings": 2048,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "num_key_value_heads": KV_HEADS,
    "num_target_layers": TINY.num_layers,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
    "dflash_config": {"mask_token_id": 299, "target_layer_ids": [0, 1]},
}
MARKOV = {"markov_rank": 8, "markov_head_type": "vanilla", "enable_confidence_head": False}
DSPARK = (
    BASE
    | MARKOV
    | {
        "architectures": ["Qwen3DSparkModel"],
        "mask_token_id": 299,
        "target_layer_ids": [-1, 0],
        "num_anchors": 4,
        "dflash_config": None,
    }
)
SECOND = BASE | {
    "architectures": ["DFlash2DraftModel"],
    "is_causal": False,
    "sliding_window": 8,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "dflash_config": {
        "mask_token_id": 299,
        "target_layer_ids": [0],
        "block_size": 6,
        "conv_kernel_size": 3,
        "conv_group_size": 8,
        "selector_rank": 4,
        "selector_top_k": 16,
        "output_multiplier": 0.5,
        "input_embedding_scale": 2.0,
        "final_logit_softcapping": 20.0,
    },
}


def merged(config):
    return {**config, **(config.get("dflash_config") or {})}


def tensors(config, seed=0):
    """What a drafter of this configuration consists of."""
    generator = torch.Generator().manual_seed(seed)
    config = merged(config)

    def numbers(*shape, spread=0.3):
        return torch.randn(shape, generator=generator) * spread

    def near_one(count):
        return 1.0 + numbers(count, spread=0.1)

    found = {
        "fc.weight": numbers(HIDDEN, HIDDEN * len(config["target_layer_ids"])),
        "hidden_norm.weight": near_one(HIDDEN),
        "norm.weight": near_one(HIDDEN),
    }
    for index in range(config["num_hidden_layers"]):
        at = f"layers.{index}."
        found |= {
            f"{at}input_layernorm.weight": near_one(HIDDEN),
            f"{at}post_attention_layernorm.weight": near_one(HIDDEN),
            f"{at}self_attn.q_norm.weight": near_one(SIZE),
            f"{at}self_attn.k_norm.weight": near_one(SIZE),
            f"{at}mlp.gate_proj.weight": numbers(WIDE, HIDDEN),
            f"{at}mlp.up_proj.weight": numbers(WIDE, HIDDEN),
            f"{at}mlp.down_proj.weight": numbers(HIDDEN, WIDE),
        }
        for name, rows, columns in (
            ("q_proj", HEADS * SIZE, HIDDEN),
            ("k_proj", KV_HEADS * SIZE, HIDDEN),
            ("v_proj", KV_HEADS * SIZE, HIDDEN),
            ("o_proj", HIDDEN, HEADS * SIZE),
        ):
            found[f"{at}self_attn.{name}.weight"] = numbers(rows, columns)
            if config["attention_bias"]:
                found[f"{at}self_attn.{name}.bias"] = numbers(rows)
        if "conv_kernel_size" in config:
            kernel, groups = config["conv_kernel_size"], HIDDEN // config["conv_group_size"]
            for side in ("attention", "mlp"):
                found[f"{at}{side}_conv.base_kernel"] = numbers(2, kernel, HIDDEN)
                found[f"{at}{side}_conv.kernel_projection.weight"] = numbers(2 * kernel * groups, HIDDEN)
    return found | heads(config, numbers)


def heads(config, numbers):
    found = {}
    known = config.get("draft_vocab_size", VOCAB)
    if rank := config.get("markov_rank"):
        found["markov_head.markov_w1.weight"] = numbers(VOCAB, rank)
        found["markov_head.markov_w2.weight"] = numbers(known, rank, spread=1.0)
        if config["markov_head_type"] == "gated":
            found["markov_head.gate_proj.weight"] = numbers(rank, HIDDEN + rank)
            found["markov_head.gate_proj.bias"] = numbers(rank)
        if config["markov_head_type"] == "rnn":
            found["markov_head.joint_proj.weight"] = numbers(3 * rank, HIDDEN + 2 * rank)
            found["markov_head.joint_proj.bias"] = numbers(3 * rank)
        if config.get("enable_confidence_head"):
            columns = HIDDEN + rank * config.get("confidence_head_with_markov", True)
            found["confidence_head.proj.weight"] = numbers(1, columns)
            found["confidence_head.proj.bias"] = numbers(1)
    if "selector_rank" in config:
        rank = config["selector_rank"]
        found["candidate_selector.hidden_projection.weight"] = numbers(rank, HIDDEN)
        found["candidate_selector.predecessor_codebook"] = numbers(VOCAB, rank)
        found["candidate_selector.successor_codebook"] = numbers(VOCAB, rank, spread=1.0)
    if known != VOCAB:
        chosen = torch.arange(known) * (VOCAB // known)
        found["d2t"] = chosen - torch.arange(known)
        found["lm_head.weight"] = numbers(known, HIDDEN)
    return found


def written(folder, config, found):
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in found.items()}, folder / "model.safetensors")
    return folder
