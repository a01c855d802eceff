"""Writes a checkpoint as the folder that Hugging Face would: for comparisons with its own loaders."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from engine.weights.layout_folder import folder_targets
from engine.weights.loader import load_weights
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine.checkpoint import Checkpoint
    from engine.models.config import TransformerConfig


def write_folder(checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir(parents=True)
    ends = list(checkpoint.eos_token_ids)
    ids = {"bos_token_id": checkpoint.bos_token_id, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    write_json(folder / "config.json", config_json(checkpoint.transformer) | ids)
    write_json(folder / "generation_config.json", ids)
    write_tokenizer(checkpoint, folder)
    weights = load_weights(checkpoint, torch.float32, torch.device("cpu"))
    stored = folder_tensors(checkpoint.transformer, weights)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    tokenizer: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    tokenizer |= checkpoint.special_tokens
    write_json(folder / "tokenizer_config.json", tokenizer | {"chat_template": checkpoint.chat_template})
    Tokenizer.from_checkpoint(checkpoint).save(folder / "tokenizer.json")


def folder_tensors(config: TransformerConfig, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Runtime tensors -> what Hugging Face's model keeps: the rows of every piece."""
    return {
        piece.stored: weights[target.name][piece.row : piece.row + piece.shape[0]].clone()
        for target in folder_targets(config, ())
        for piece in target.pieces
    }


def config_json(config: TransformerConfig) -> dict[str, Any]:
    """Of a Llama whose positions are not stretched."""
    rope = config.layers[0].rope
    assert rope is not None, "a Llama has positions"
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "torch_dtype": "float32",
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
