"""Every runtime tensor is filled by its pieces without a gap, whatever a checkpoint calls them."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

from engine.models.config import Experts, Layer, NormPlacement, QKNorm, Rope, TransformerConfig
from engine.weights.layout import Piece, Target
from engine.weights.layout_folder import folder_targets
from engine.weights.layout_gguf import gguf_targets
from engine.weights.layout_order import (
    alternating_columns_to_rows,
    alternating_to_halves,
    columns_to_rows,
    pairs_to_halves,
)

ROPE = Rope(theta=10000.0, num_rotated=4)
DENSE = TransformerConfig(
    architecture="llama", vocab_size=11, hidden_size=8, intermediate_size=6, layers=(Layer(rope=ROPE),) * 2,
    num_heads=4, num_kv_heads=2, head_dim=4, rms_norm_eps=1e-5, max_positions=64,
)  # fmt: skip
EXPERTS = Experts(count=3, per_token=2, intermediate_size=5)
SPARSE = replace(DENSE, layers=(Layer(rope=ROPE, experts=True),) * 2, experts=EXPERTS)
SHAPES = {
    "llama": DENSE,
    "biases": replace(DENSE, qkv_bias=True, out_bias=True, mlp_bias=True),
    "phi3": replace(DENSE, architecture="phi3", tie_embeddings=True),
    "gemma3": replace(
        DENSE, architecture="gemma3", norm_placement=NormPlacement.SANDWICH, qk_norm=QKNorm.HEAD
    ),
    "olmo2": replace(DENSE, architecture="olmo2", norm_placement=NormPlacement.POST, qk_norm=QKNorm.WHOLE),
    "mixtral": replace(SPARSE, architecture="mixtral"),
    "qwen3_moe": replace(SPARSE, architecture="qwen3_moe", layers=(SPARSE.layers[0], DENSE.layers[0])),
    "gpt-oss": replace(
        SPARSE, architecture="gpt-oss", sinks=True, qkv_bias=True, experts=replace(EXPERTS, bias=True)
    ),
}  # fmt: skip


def fill(target: Target, piece: Piece, filled: torch.Tensor) -> None:
    """Counts what the piece fills, as the layout defines it."""
    stored = torch.ones(piece.shape)
    part = stored if piece.arrange is None else piece.arrange(stored)
    if piece.stacked:
        filled[:, piece.row : piece.row + part.shape[1]] += part
    else:
        rows = filled.view(-1, target.shape[-1]) if len(target.shape) > 1 else filled
        part = part.reshape(-1, *rows.shape[1:])
        rows[piece.row : piece.row + len(part)] += part


@pytest.mark.parametrize("targets", [folder_targets, gguf_targets])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_pieces_fill_their_targets_once(targets, config: TransformerConfig) -> None:
    """Of tensors that are all apart, and of those that have them together."""
    apart = list(targets(config, ()))
    together = {
        piece.stored.replace(one, other)
        for target in apart
        for piece in target.pieces
        for one, other in (
            ("attn_q.", "attn_qkv."), ("ffn_gate.0", "ffn_gate_exps"), ("ffn_down.0", "ffn_down_exps"),
            ("experts.0.gate_proj.weight", "experts.gate_up_proj"),
            ("experts.0.down_proj.weight", "experts.down_proj"),
        )
    }  # fmt: skip
    for found in (apart, list(targets(config, together))):
        assert len({target.name for target in found}) == len(found)
        assert len({piece.stored for target in found for piece in target.pieces}) == sum(
            len(target.pieces) for target in found
        )
        for target in found:
            filled = torch.zeros(target.shape)
            for piece in target.pieces:
                fill(target, piece, filled)
            assert torch.equal(filled, torch.ones(target.shape)), target.name
        assert sum(prod(target.shape) for target in found) == sum(prod(target.shape) for target in apart)


def test_adapters_name_the_modules_of_the_model_whatever_the_file_calls_them() -> None:
    """Where the order of rows is another one than the module's, no adapter can."""

    def modules(targets) -> set[str]:
        return {piece.module for target in targets for piece in target.pieces if piece.module}

    in_folder, in_gguf = modules(folder_targets(DENSE, ())), modules(gguf_targets(DENSE, ()))
    assert in_folder == in_gguf
    assert "model.layers.1.self_attn.q_proj" in in_folder
    llama4 = replace(DENSE, architecture="llama4")
    for targets in (folder_targets(llama4, ()), gguf_targets(llama4, ())):
        named = modules(targets)
        assert "model.layers.1.self_attn.v_proj" in named
        assert "model.layers.1.self_attn.q_proj" not in named


def test_norms_sinks_and_routers_that_must_stay_exact() -> None:
    exact = {target.name for target in folder_targets(SHAPES["gpt-oss"], ()) if target.exact}
    assert exact == {
        f"layers.{index}.{name}" for index in (0, 1) for name in ("sinks", "router.weight", "router.bias")
    }
    assert "layers.0.q_norm" in {target.name for target in gguf_targets(SHAPES["gemma3"], ()) if target.exact}
    assert not any(target.exact for target in folder_targets(DENSE, ()))


def test_orders_of_rows() -> None:
    rows = torch.arange(16)
    turned = pairs_to_halves(2)(rows)
    assert turned.tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert pairs_to_halves(2)(rows[:, None].expand(16, 3))[:, 1].tolist() == turned.tolist()
    experts = torch.arange(2 * 3 * 4).view(2, 3, 4)  # [E, in, out]
    assert torch.equal(columns_to_rows(experts), experts.transpose(1, 2))
    gate_first = alternating_columns_to_rows(experts)
    assert torch.equal(gate_first[1], experts[1].T[[0, 2, 1, 3]])
    assert torch.equal(alternating_to_halves(experts[:, 0])[0], experts[0, 0, [0, 2, 1, 3]])


def test_a_layout_is_listed_lazily() -> None:
    first = next(iter(folder_targets(replace(SPARSE, experts=replace(EXPERTS, count=2**30)), ())))
    assert first.name == "embedding"
